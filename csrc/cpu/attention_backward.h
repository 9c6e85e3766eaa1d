// The gradients of local_attention.
//
//   P = softmax(S), dP = dO v^T, D = rowsum(P * dP), dS = P * (dP - D + dLSE), and then
//   dV = P^T dO, dQ = scale dS K, dK = scale dS^T Q; the bias' is dS, and a sink's, a score whose value is 0, like it.
//
// P is exp(S - LSE), divided by its own sum: so the rounding of the log-sum-exp cancels, and dS does where it should. D is summed
// of the same numbers for that reason. A tile's P and dP are kept while they fit in, else they are made twice.
//
// A unit has a chunk of rows and sums the gradients of all keys that these see, run by run. Keys that no other chunk's rows see
// are written at once; the others' sums are left in the call's scratch, and added in the order of the chunks in a second pass.
#pragma once

#include "attention.h"
#include "attention_tile.h"
#include "dropout.h"

namespace attnreg::cpu {
namespace {

// Bytes of a tile's weights and their gradients that are kept rather than made again.
constexpr int64_t kKeptBytes = int64_t{2} << 20;

// The keys [first, last) that a chunk's rows see, with what lies between them.
struct Span {
  int64_t first = 0, last = 0;

  bool empty() const { return first == last; }
};

// How the backward of a call is cut, and what lies where in its scratch.
struct Cut {
  int64_t rows, chunks, items;   // rows of a chunk; chunks of a key head; all chunks
  int64_t key_width, value_width;
  bool keys, values, weights;    // which gradients are wanted: of keys, of values, of anything that needs dS
  int64_t slot_keys;             // what an item leaves to the second pass
  bool of_bias, bias_by_row;     // whether the bias' is wanted, and whether it has rows
  bool over_batch, over_heads;   // what a unit has to sum it over
  int64_t bias_heads, bias_slots;
  size_t slots, biases, sinks, spans, bytes;  // offsets
};

// Enough for the threads of most machines.
constexpr int64_t kManyChunks = 64;

template <class T>
inline Cut cut_of(const AttentionBackward& call) {
  const Sizes& sizes = call.sizes;
  Cut cut;
  const int64_t window = slots_of(sizes, call.rows);
  // Room for the keys that chunks share: for 2 W of each, at the most. So where there are chunks enough for many threads, they
  // are long.
  cut.bias_by_row = call.grad_bias.data != nullptr && call.grad_bias.l != 0;
  const int64_t long_enough = sizes.batch * sizes.kv_heads * sizes.query_length / kManyChunks;
  const int64_t longer = cut.bias_by_row ? 0 : rounded_up(least(4 * window, long_enough), 64);
  cut.rows = least(most(most(512, rounded_up(window / 2, 64)), longer), sizes.query_length);
  cut.chunks = chunks_of(sizes, cut.rows);
  cut.items = sizes.batch * sizes.kv_heads * cut.chunks;
  cut.keys = call.grad_key.data != nullptr;
  cut.values = call.grad_value.data != nullptr;
  cut.of_bias = call.grad_bias.data != nullptr;
  cut.weights = cut.keys || cut.of_bias || call.grad_query.data != nullptr || call.grad_sinks.data != nullptr;
  cut.key_width = cut.keys ? padded<T>(sizes.head_dim) : 0;
  cut.value_width = cut.values ? padded<T>(sizes.value_dim) : 0;
  cut.slot_keys = 0;
  if (cut.chunks > 1 && (cut.keys || cut.values)) {
    cut.slot_keys = least(2 * window, sizes.key_length);
    if (call.rows.cu_seqlens_q.data == nullptr) cut.slot_keys = least(cut.slot_keys, cut.rows + window);
  }
  cut.over_batch = cut.bias_by_row && call.grad_bias.n == 0;
  cut.over_heads = cut.bias_by_row && call.grad_bias.h == 0;
  cut.bias_heads = call.grad_bias.h == 0 ? 1 : sizes.heads / sizes.kv_heads;
  cut.bias_slots = call.grad_bias.w == 0 ? 1 : call.rows.left + call.rows.right + 1;
  const auto items = static_cast<size_t>(cut.items);
  cut.slots = 0;
  cut.biases = cut.slots + items * static_cast<size_t>(cut.slot_keys * (cut.key_width + cut.value_width)) * sizeof(T);
  cut.biases = (cut.biases + 63) / 64 * 64;
  cut.sinks = cut.biases;
  if (cut.of_bias && !cut.bias_by_row) {
    cut.sinks += items * static_cast<size_t>(cut.bias_heads * cut.bias_slots) * sizeof(double);
  }
  cut.spans = cut.sinks;
  if (call.grad_sinks.data != nullptr) {
    cut.spans += items * static_cast<size_t>(sizes.heads / sizes.kv_heads) * sizeof(double);
  }
  cut.bytes = cut.spans + items * sizeof(Span);
  return cut;
}

inline int64_t item_of(const Sizes& sizes, const Cut& cut, int64_t n, int64_t kv_head, int64_t chunk) {
  return (n * sizes.kv_heads + kv_head) * cut.chunks + chunk;
}

// The first row of [begin, end) that sees a key, or the last one: false where none does.
inline bool find_row(const AttentionBackward& call, int64_t n, int64_t begin, int64_t end, bool last, Place* found) {
  constexpr int64_t kAtOnce = 64;
  Place places[kAtOnce];
  // As a rule it is the first one to be looked at.
  for (int64_t some = 1; begin < end; some = kAtOnce) {
    const int64_t count = least(some, end - begin), from = last ? end - count : begin;
    place_rows(call.sizes, call.rows, n, from, count, places);
    for (int64_t i = 0; i < count; ++i) {
      const Place& place = places[last ? count - 1 - i : i];
      if (place.first < place.last) {
        *found = place;
        return true;
      }
    }
    (last ? end : begin) += last ? -count : count;
  }
  return false;
}

inline Span span_of(const AttentionBackward& call, const Cut& cut, int64_t n, int64_t chunk) {
  const int64_t begin = chunk * cut.rows, end = least(begin + cut.rows, call.sizes.query_length);
  Place first, last;
  if (!find_row(call, n, begin, end, false, &first)) return {};
  find_row(call, n, begin, end, true, &last);
  return {first.first, last.last};
}

// The span of the nearest chunk before, or after, that has one. Of rows that see nothing it takes long to find that out: the
// second pass, which asks for the spans of all chunks, has those that the first one left.
template <class SpanAt>
inline Span span_before(const SpanAt& span_at, int64_t chunk) {
  while (chunk-- > 0) {
    const Span span = span_at(chunk);
    if (!span.empty()) return span;
  }
  return {};
}

template <class SpanAt>
inline Span span_after(const SpanAt& span_at, int64_t chunks, int64_t chunk) {
  while (++chunk < chunks) {
    const Span span = span_at(chunk);
    if (!span.empty()) return span;
  }
  return {};
}

// A chunk's keys: [first, left) and [right, last) other chunks' rows see, too.
struct Shared {
  int64_t first, last, left, right;

  // Where the sums of a key that others see are left.
  int64_t index(int64_t key) const { return key < left ? key - first : left - first + key - right; }
};

template <class SpanAt>
inline Shared shared_of(const SpanAt& span_at, int64_t chunks, int64_t chunk, const Span& span) {
  if (span.empty()) return {};
  const Span before = span_before(span_at, chunk), after = span_after(span_at, chunks, chunk);
  Shared shared = {span.first, span.last, span.first, span.last};
  if (!before.empty()) shared.left = clamp(before.last, span.first, span.last);
  if (!after.empty()) shared.right = clamp(after.first, span.first, span.last);
  shared.right = most(shared.right, shared.left);
  return shared;
}

template <class T>
struct BackwardSpace {
  T *queries, *query_rows, *grads, *grad_rows, *weights, *grad_weights, *slopes, *sums, *spare, *bias_rows;
  bool* key_is_seen;
  bool keeps;
  PairSpace<T> pairs;

  BackwardSpace(const AttentionBackward& call, const Cut& cut, int64_t most_keys, Scratch& scratch) : pairs(scratch) {
    const Sizes& sizes = call.sizes;
    const int64_t of_query = padded<T>(sizes.head_dim) * kRows<T>, of_value = padded<T>(sizes.value_dim) * kRows<T>;
    queries = scratch.take<T>(of_query);
    query_rows = scratch.take<T>(of_query);
    grads = scratch.take<T>(of_value);
    grad_rows = scratch.take<T>(of_value);
    sums = scratch.take<T>(of_query);
    spare = scratch.take<T>(most(of_query, of_value));
    const bool capped = call.softcap > 0;
    keeps = most_keys * kRows<T> * static_cast<int64_t>(sizeof(T)) * (capped ? 3 : 2) <= kKeptBytes;
    const int64_t of_keys = ((keeps ? most_keys : kKeys) + kLanes<T>) * kRows<T>;
    weights = scratch.take<T>(of_keys);
    grad_weights = scratch.take<T>(of_keys);
    slopes = capped ? scratch.take<T>(of_keys) : nullptr;
    key_is_seen = call.bias.data == nullptr ? nullptr : scratch.take<bool>(keeps ? most_keys : kKeys);
    bias_rows = cut.of_bias ? scratch.take<T>(kRows<T> * Scoring<T>::kWidth) : nullptr;
  }
};

// What the tiles of a run add to: the gradients of its keys and values, [keys][padded size], and a bias' or a sink's.
template <class T>
struct RunSums {
  T *keys, *values;
  int64_t first;
  T* bias_of_rows;        // [rows of the chunk][slots], or null
  double* bias_of_slots;  // [slots], or null
  double* sink;           // or null
};

// sums [keys][width] += over the rows of a tile of `weights` [keys][kRows] times `rows` [kRows][width], for keys [first, last).
template <class T, int kN>
inline void add_to_keys(const Tile& tile, int64_t first, int64_t last, const T* weights, const T* rows, int64_t width,
                        [[maybe_unused]] bool in_pairs, [[maybe_unused]] const PairSpace<T>& pairs, T* sums) {
#if defined(ATTNREG_PAIRS)
  if constexpr (sizeof(T) == sizeof(float)) {
    if (in_pairs) {
      const int64_t begin = kN == 1 ? last : clamp(tile.both_first, first, last), end = clamp(tile.both_last, begin, last);
      int64_t k = 0;
      for (const T* from = weights; k < last - first; ++k, from += kRows<T>) {
        const Vector<T> a = kN == 1 || first + k < end ? load(from) : Vector<T>{};
        const Vector<T> b = first + k >= begin ? load(from + kLanes<T>) : Vector<T>{};
        split_pair(a, b, pairs.upper + k * kLanes<T>, pairs.lower + k * kLanes<T>);
      }
      for (; k % kRowsOfPairs != 0; ++k) split_pair(Vector<T>{}, Vector<T>{}, pairs.upper + k * kLanes<T>, pairs.lower + k * kLanes<T>);
      return add_pairs_to_keys(last - first, width, pairs.upper, pairs.lower, rows, sums);
    }
  }
#endif
  each_section<kN>(tile, first, last, [&](auto count, int vector, int64_t begin, int64_t end) {
    constexpr int64_t terms = count.kValue * kLanes<T>;
    const int lane = vector * kLanes<T>;
    const T* const from = weights + (begin - first) * kRows<T> + lane;
    const T* const right = rows + lane * width;
    T* const to = sums + (begin - first) * width;
    int64_t c = 0;
    for (; c + 2 * kLanes<T> <= width; c += 2 * kLanes<T>) {
      multiply<T, 2, Lies::kStepped, kRows<T>>(end - begin, terms, from, 0, right + c, width, to + c, width, true);
    }
    if (c < width) {
      multiply<T, 1, Lies::kStepped, kRows<T>>(end - begin, terms, from, 0, right + c, width, to + c, width, true);
    }
  });
}

template <class T, int kN>
class TileBackward {
 public:
  TileBackward(const AttentionBackward& call, const Cut& cut, Scoring<T>& scoring, const BackwardSpace<T>& space,
               const Keys<T>& keys, const Keys<T>& values, int64_t n, int64_t h, const Tile& tile, const Place* places)
      : call_(call), cut_(cut), scoring_(scoring), space_(space), keys_(keys), values_(values), n_(n), h_(h), tile_(tile),
        places_(places), lanes_(tile, places), dropout_(dropout_of(call, n, h)),
        kept_(static_cast<T>(1.0 / (1.0 - call.dropout_p))) {}

  // `row` is where the tile begins in its chunk.
  void run(const RunSums<T>& sums, int64_t row) {
    const Sizes& sizes = call_.sizes;
    fetch_rows();
    const int64_t kv_head = h_ / (sizes.heads / sizes.kv_heads), next = tile_.row + tile_.rows;
    const auto fetch = [&](const View& view, int64_t head, int64_t size, int64_t begin, int64_t length) {
      if (view.data != nullptr) fetch_ahead(view, call_.type, n_, head, size, begin, kRows<T>, length);
    };
    fetch(call_.query, h_, sizes.head_dim, next, sizes.query_length);
    fetch(call_.grad_output, h_, sizes.value_dim, next, sizes.query_length);
    fetch(call_.key, kv_head, sizes.head_dim, tile_.last, sizes.key_length);
    fetch(call_.value, kv_head, sizes.value_dim, tile_.last, sizes.key_length);
    fetch(call_.grad_query, h_, sizes.head_dim, tile_.row, sizes.query_length);
    for (int v = 0; v < kN; ++v) total_[v] = row_sum_[v] = Vector<T>{};
    const int64_t parts = parts_of(tile_);
    for (int64_t part = 0; part < parts; ++part) make_part(part, parts);
    finish_sums(sums);
    zero(space_.sums, sizes.head_dim * kRows<T>);
    for (int64_t part = 0; part < parts; ++part) {
      if (!space_.keeps) {
        // The sums are complete: what is added to them now is of no use.
        Vector<T> row_sum[kN];
        for (int v = 0; v < kN; ++v) row_sum[v] = row_sum_[v];
        make_part(part, parts);
        for (int v = 0; v < kN; ++v) row_sum_[v] = row_sum[v];
      }
      use_part(part, parts, sums, row);
    }
    if (call_.grad_query.data == nullptr) return;
    alignas(64) T factor[kRows<T>];
    for (int i = 0; i < kRows<T>; ++i) factor[i] = used_[i] ? scoring_.scale : T(0);
    unpack<T>(space_.sums, factor, space_.spare, call_.grad_query, call_.type, n_, h_, tile_, sizes.head_dim);
  }

 private:
  // A row that sees nothing may hold NaN: zeros stand for it.
  void fetch_rows() {
    const Sizes& sizes = call_.sizes;
    const int64_t line = (n_ * sizes.heads + h_) * sizes.query_length + tile_.row;
    const T* const log_sum_exp = static_cast<const T*>(call_.log_sum_exp) + line;
    const T* const grad = static_cast<const T*>(call_.grad_log_sum_exp);
    alignas(64) T shift[kRows<T>], pull[kRows<T>];
    for (int i = 0; i < kRows<T>; ++i) {
      used_[i] = lanes_.sees[i] && log_sum_exp[i] != -Limits<T>::kInfinity;
      shift[i] = used_[i] ? log_sum_exp[i] : 0;
      pull[i] = used_[i] && grad != nullptr ? grad[line + i] : 0;
    }
    for (int v = 0; v < kN; ++v) {
      shift_[v] = load(shift + v * kLanes<T>);
      pull_[v] = load(pull + v * kLanes<T>);
    }
    pack<T>(call_.query, call_.type, n_, h_, tile_, used_, sizes.head_dim, cut_.keys ? space_.query_rows : nullptr,
            space_.spare, space_.queries);
    pack<T>(call_.grad_output, call_.type, n_, h_, tile_, used_, sizes.value_dim,
            cut_.values ? space_.grad_rows : nullptr, space_.spare, space_.grads);
  }

  // Where a part's numbers lie.
  int64_t offset(int64_t first) const { return space_.keeps ? first - tile_.first : 0; }

  // exp(S - LSE), below 0 where it is dropped, and dP; and what they add to the sums.
  void make_part(int64_t part, int64_t parts) {
    const int64_t first = part_begin(tile_, part, parts), last = part_begin(tile_, part + 1, parts);
    const int64_t begin = offset(first) * kRows<T>;
    T* const weights = space_.weights + begin;
    T* const grads = space_.grad_weights + begin;
    T* const slopes = space_.slopes == nullptr ? nullptr : space_.slopes + begin;
    if (scoring_.has_bias) scoring_.key_is_seen = space_.key_is_seen + offset(first);
    Highest<T, kN> highest = {};
    make_scores<T, kN>(scoring_, tile_, places_, lanes_, keys_, space_.queries, call_.sizes.head_dim, first, last, weights,
                       slopes, highest);
    exponentials<T, kN>(tile_, first, last, weights, shift_, total_);
    if (!cut_.weights) {
      if (dropout_.threshold > 0) {
        dropout_.each<T>(tile_.row, kN * kLanes<T>, first, last, [&](int64_t k, int lane, Mask<T> dropped) {
          T* const weight = weights + k * kRows<T> + lane;
          store(weight, dropped ? -load(weight) : load(weight));
        });
      }
      return;
    }
    multiply_keys<T, kN>(tile_, values_, space_.grads, call_.sizes.value_dim, first, last, grads);
    if (dropout_.threshold > 0) {
      dropout_.each<T>(tile_.row, kN * kLanes<T>, first, last, [&](int64_t k, int lane, Mask<T> dropped) {
        T* const weight = weights + k * kRows<T> + lane;
        T* const grad = grads + k * kRows<T> + lane;
        store(weight, dropped ? -load(weight) : load(weight));
        store(grad, dropped ? Vector<T>{} : load(grad) * kept_);
      });
    }
    each_section<kN>(tile_, first, last, [&](auto vectors, int vector, int64_t from, int64_t to) {
      Vector<T> sum[vectors.kValue];
      for (int v = 0; v < vectors.kValue; ++v) sum[v] = Vector<T>{};
      for (int64_t k = from - first; k < to - first; ++k) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors.kValue; ++v) {
          const int64_t index = k * kRows<T> + (vector + v) * kLanes<T>;
          const Vector<T> weight = absolute<T>(load(weights + index));
          // What a row does not see may be NaN.
          const Vector<T> grad = weight == T(0) ? Vector<T>{} : load(grads + index);
          sum[v] = multiply_add(weight, grad, sum[v]);
          store(grads + index, grad);
        }
      }
      for (int v = 0; v < vectors.kValue; ++v) row_sum_[vector + v] += sum[v];
    });
  }

  void finish_sums(const RunSums<T>& sums) {
    const bool has_sink = call_.sinks.data != nullptr;
    alignas(64) T of_sink[kRows<T>] = {}, used[kRows<T>];
    const T sink = has_sink ? widen_one<T>(call_.sinks, h_) : 0;
    for (int i = 0; i < kRows<T>; ++i) used[i] = used_[i] ? T(1) : T(0);
    for (int v = 0; v < kN; ++v) {
      const Vector<T> is_used = load(used + v * kLanes<T>);
      Vector<T> share = {};
      if (has_sink) {
        share = exponential<T>(sink - shift_[v]);
        total_[v] += share;
      }
      const Vector<T> total = is_used > T(0) ? total_[v] : all(T(1));
      factor_[v] = T(1) / total;
      row_sum_[v] = row_sum_[v] * factor_[v] - pull_[v];
      if (has_sink) store(of_sink + v * kLanes<T>, is_used > T(0) ? share * factor_[v] * row_sum_[v] : Vector<T>{});
    }
    if (sums.sink != nullptr) {
      for (int i = 0; i < tile_.rows; ++i) *sums.sink -= of_sink[i];
    }
  }

  void use_part(int64_t part, int64_t parts, const RunSums<T>& sums, int64_t row) {
    const int64_t first = part_begin(tile_, part, parts), last = part_begin(tile_, part + 1, parts);
    const int64_t begin = offset(first) * kRows<T>;
    T* const weights = space_.weights + begin;
    T* const grads = space_.grad_weights + begin;
    each_section<kN>(tile_, first, last, [&](auto vectors, int vector, int64_t from, int64_t to) {
      for (int64_t k = from - first; k < to - first; ++k) {
#pragma GCC unroll 2
        for (int v = vector; v < vector + vectors.kValue; ++v) {
          T* const weight = weights + k * kRows<T> + v * kLanes<T>;
          T* const grad = grads + k * kRows<T> + v * kLanes<T>;
          const Vector<T> signed_weight = load(weight);
          const Vector<T> scaled = absolute<T>(signed_weight) * factor_[v];
          store(weight, signed_weight < T(0) ? Vector<T>{} : scaled * kept_);
          if (cut_.weights) store(grad, scaled == T(0) ? Vector<T>{} : scaled * (load(grad) - row_sum_[v]));
        }
      }
    });
    const int64_t key = first - sums.first;
    if (cut_.values) {
      add_to_keys<T, kN>(tile_, first, last, weights, space_.grad_rows, cut_.value_width, values_.pairs != nullptr,
                         space_.pairs, sums.values + key * cut_.value_width);
    }
    if (!cut_.weights) return;
    if (cut_.of_bias) add_to_bias(first, last, grads, sums, row);
    if (space_.slopes != nullptr) {
      const T* const slopes = space_.slopes + begin;
      each_section<kN>(tile_, first, last, [&](auto vectors, int vector, int64_t from, int64_t to) {
        for (int64_t k = from - first; k < to - first; ++k) {
          for (int v = vector; v < vector + vectors.kValue; ++v) {
            const int64_t index = k * kRows<T> + v * kLanes<T>;
            const Vector<T> grad = load(grads + index);
            // A hidden key's slope may be NaN.
            store(grads + index, grad == T(0) ? grad : grad * load(slopes + index));
          }
        }
      });
    }
    if (cut_.keys) {
      add_to_keys<T, kN>(tile_, first, last, grads, space_.query_rows, cut_.key_width, keys_.pairs != nullptr, space_.pairs,
                         sums.keys + key * cut_.key_width);
    }
    if (call_.grad_query.data != nullptr) {
      if (scoring_.has_bias) scoring_.key_is_seen = space_.key_is_seen + offset(first);
      add_weighted<T, kN>(scoring_, tile_, keys_, call_.sizes.head_dim, first, last, grads, space_.pairs, space_.sums);
    }
  }

  void add_to_bias(int64_t first, int64_t last, const T* grads, const RunSums<T>& sums, int64_t row) {
    if (cut_.bias_slots == 1) {
      alignas(64) T of_rows[kRows<T>] = {};
      for (int v = 0; v < kN; ++v) {
        Vector<T> sum = {};
        const int64_t begin = v == 0 ? first : clamp(tile_.both_first, first, last);
        const int64_t end = kN == 2 && v == 0 ? clamp(tile_.both_last, begin, last) : last;
        for (int64_t k = begin - first; k < end - first; ++k) sum += load(grads + k * kRows<T> + v * kLanes<T>);
        store(of_rows + v * kLanes<T>, sum);
      }
      for (int i = 0; i < tile_.rows; ++i) {
        if (!used_[i]) continue;
        if (sums.bias_of_rows != nullptr) {
          sums.bias_of_rows[row + i] += of_rows[i];
        } else {
          *sums.bias_of_slots += of_rows[i];
        }
      }
      return;
    }
    constexpr int64_t width = Scoring<T>::kWidth;
    transpose<T>(padded<T>(last - first), kN * kLanes<T>, grads, kRows<T>, space_.bias_rows, width);
    for (int i = 0; i < tile_.rows; ++i) {
      if (!used_[i]) continue;
      const int64_t begin = most(first, places_[i].first), end = least(last, places_[i].last);
      const T* const from = space_.bias_rows + i * width + (begin - first);
      const int64_t slot = begin - places_[i].origin;
      if (sums.bias_of_rows != nullptr) {
        T* const to = sums.bias_of_rows + (row + i) * cut_.bias_slots + slot;
        for (int64_t k = 0; k < end - begin; ++k) to[k] += from[k];
      } else {
        double* const to = sums.bias_of_slots + slot;
        for (int64_t k = 0; k < end - begin; ++k) to[k] += from[k];
      }
    }
  }

  const AttentionBackward& call_;
  const Cut& cut_;
  Scoring<T>& scoring_;
  const BackwardSpace<T>& space_;
  const Keys<T>& keys_;
  const Keys<T>& values_;
  const int64_t n_, h_;
  const Tile& tile_;
  const Place* const places_;
  const Lanes<T> lanes_;
  const Dropout dropout_;
  const T kept_;
  bool used_[kRows<T>];
  // By lane: the log-sum-exp, its gradient, the sum of exp(S - LSE), 1 over it, D - dLSE.
  Vector<T> shift_[kN], pull_[kN], total_[kN], factor_[kN], row_sum_[kN];
};

inline void zero_keys(const View& view, Type type, int64_t n, int64_t kv_head, int64_t size, int64_t first, int64_t last) {
  for (int64_t key = first; key < last; ++key) {
    memset(at(view.data, type, n * view.n + kv_head * view.h + key * view.l), 0,
           static_cast<size_t>(size * bytes_of(type)));
  }
}

// Sums of a run's keys: to where they belong, or to the item's slot where other chunks add to them.
template <class T>
inline void hand_over(const View& view, Type type, int64_t n, int64_t kv_head, int64_t size, const Run& run,
                      const Shared& shared, const T* sums, T scale, T* slot) {
  const int64_t width = padded<T>(size);
  for (int64_t key = run.first; key < run.last; ++key) {
    const T* const from = sums + (key - run.first) * width;
    if (key >= shared.left && key < shared.right) {
      narrow_to(from, scale, size, at(view.data, type, n * view.n + kv_head * view.h + key * view.l), type);
    } else {
      memcpy(slot + shared.index(key) * width, from, static_cast<size_t>(width) * sizeof(T));
    }
  }
}

// One chunk of one key head. `bias_of_rows`: the unit's sums [bias_heads][rows][slots], or null.
template <class T>
void go_back_through_item(const AttentionBackward& call, const Cut& cut, char* shared_scratch, int64_t n, int64_t kv_head,
                          int64_t chunk, T* bias_of_rows, Scratch& scratch, const Scratch::Mark& mark) {
  scratch.back_to(mark);
  const Sizes& sizes = call.sizes;
  const int64_t group = sizes.heads / sizes.kv_heads, item = item_of(sizes, cut, n, kv_head, chunk);
  const int64_t row = chunk * cut.rows, count = least(cut.rows, sizes.query_length - row);
  Place* const places = scratch.take<Place>(count);
  Tile* const tiles = scratch.take<Tile>(count);
  place_rows(sizes, call.rows, n, row, count, places);
  const int64_t made = make_tiles<T>(places, row, count, tiles);
  int64_t most_keys = 1, most_of_run = 0;
  for (int64_t i = 0; i < made; ++i) most_keys = most(most_keys, tiles[i].last - tiles[i].first);
  for (Run run = run_of(tiles, 0, made); run.begin < made; run = run_of(tiles, run.end, made)) {
    most_of_run = most(most_of_run, run.last - run.first);
  }
  Scoring<T> scoring(call, scratch);
  const BackwardSpace<T> space(call, cut, most_keys, scratch);
  const bool converts = call.type != kTypeOf<T>;
  const Sums of_queries = call.grad_query.data == nullptr                      ? Sums::kNone
                          : slots_of(sizes, call.rows) < kManyKeys ? Sums::kFew
                                                                   : Sums::kMany;
  T* const key_space = converts ? scratch.take<T>(room_of_keys(most_of_run, sizes.head_dim)) : nullptr;
  T* const value_space = converts ? scratch.take<T>(room_of_keys(most_of_run, sizes.value_dim)) : nullptr;
  RunSums<T> sums = {};
  sums.keys = cut.keys ? scratch.take<T>(most_of_run * cut.key_width) : nullptr;
  sums.values = cut.values ? scratch.take<T>(most_of_run * cut.value_width) : nullptr;
  T* const slot_of_keys =
      reinterpret_cast<T*>(shared_scratch + cut.slots) + item * cut.slot_keys * (cut.key_width + cut.value_width);
  T* const slot_of_values = slot_of_keys + cut.slot_keys * cut.key_width;
  double* slots_of_bias = nullptr;
  if (cut.of_bias && !cut.bias_by_row) {
    const int64_t size = cut.bias_heads * cut.bias_slots;
    slots_of_bias = reinterpret_cast<double*>(shared_scratch + cut.biases) + item * size;
    zero(slots_of_bias, size);
  }
  double* of_sinks = nullptr;
  if (call.grad_sinks.data != nullptr) {
    of_sinks = reinterpret_cast<double*>(shared_scratch + cut.sinks) + item * group;
    zero(of_sinks, group);
  }
  const Span span = span_of(call, cut, n, chunk);
  reinterpret_cast<Span*>(shared_scratch + cut.spans)[item] = span;
  const auto span_at = [&](int64_t other) { return span_of(call, cut, n, other); };
  const Shared shared = shared_of(span_at, cut.chunks, chunk, span);
  int64_t written = span.first;
  for (Run run = run_of(tiles, 0, made); run.begin < made; run = run_of(tiles, run.end, made)) {
    const int64_t run_keys = run.last - run.first;
    const auto keys = keys_of<T>(call.key, call.type, n, kv_head, sizes.head_dim, run.first, run.last, of_queries, key_space);
    const auto values =
        keys_of<T>(call.value, call.type, n, kv_head, sizes.value_dim, run.first, run.last, Sums::kNone, value_space);
    if (cut.keys) zero(sums.keys, run_keys * cut.key_width);
    if (cut.values) zero(sums.values, run_keys * cut.value_width);
    sums.first = run.first;
    for (int64_t g = 0; g < group; ++g) {
      const int64_t h = kv_head * group + g, bias_head = cut.bias_heads > 1 ? g : 0;
      scoring.begin_head(n, h);
      sums.sink = of_sinks == nullptr ? nullptr : of_sinks + g;
      sums.bias_of_rows = bias_of_rows == nullptr ? nullptr : bias_of_rows + bias_head * cut.rows * cut.bias_slots;
      sums.bias_of_slots = slots_of_bias == nullptr ? nullptr : slots_of_bias + bias_head * cut.bias_slots;
      for (int64_t i = run.begin; i < run.end; ++i) {
        const Tile& tile = tiles[i];
        const int64_t in_chunk = tile.row - row;
        if (tile.vectors == 1) {
          TileBackward<T, 1>(call, cut, scoring, space, keys, values, n, h, tile, places + in_chunk).run(sums, in_chunk);
        } else {
          TileBackward<T, 2>(call, cut, scoring, space, keys, values, n, h, tile, places + in_chunk).run(sums, in_chunk);
        }
      }
    }
    if (run_keys == 0) continue;
    // Keys between two runs are seen by no row of any chunk.
    if (cut.keys) {
      zero_keys(call.grad_key, call.type, n, kv_head, sizes.head_dim, written, run.first);
      hand_over(call.grad_key, call.type, n, kv_head, sizes.head_dim, run, shared, sums.keys, scoring.scale, slot_of_keys);
    }
    if (cut.values) {
      zero_keys(call.grad_value, call.type, n, kv_head, sizes.value_dim, written, run.first);
      hand_over(call.grad_value, call.type, n, kv_head, sizes.value_dim, run, shared, sums.values, T(1), slot_of_values);
    }
    written = run.last;
  }
}

template <class T>
void go_back(const AttentionBackward& call, void* shared_scratch, int64_t begin, int64_t end) {
  const Sizes& sizes = call.sizes;
  const Cut cut = cut_of<T>(call);
  const int64_t of_batch = cut.over_batch ? sizes.batch : 1, of_heads = cut.over_heads ? sizes.kv_heads : 1;
  const int64_t groups_of_heads = sizes.kv_heads / of_heads;
  [[maybe_unused]] const PairRegisters registers;
  for (int64_t unit = begin; unit < end; ++unit) {
    Scratch& scratch = Scratch::begin();
    const int64_t chunk = unit % cut.chunks, first_head = unit / cut.chunks % groups_of_heads * of_heads;
    const int64_t first_n = unit / cut.chunks / groups_of_heads * of_batch;
    const int64_t row = chunk * cut.rows, count = least(cut.rows, sizes.query_length - row);
    const int64_t head_rows = cut.rows * cut.bias_slots;
    T* bias_of_rows = nullptr;
    if (cut.bias_by_row) {
      bias_of_rows = scratch.take<T>(cut.bias_heads * head_rows);
      for (int64_t g = 0; g < cut.bias_heads; ++g) zero(bias_of_rows + g * head_rows, count * cut.bias_slots);
    }
    const Scratch::Mark mark = scratch.mark();
    for (int64_t n = first_n; n < first_n + of_batch; ++n) {
      for (int64_t head = first_head; head < first_head + of_heads; ++head) {
        go_back_through_item<T>(call, cut, static_cast<char*>(shared_scratch), n, head, chunk, bias_of_rows, scratch, mark);
      }
    }
    if (bias_of_rows == nullptr) continue;
    const Bias& to = call.grad_bias;
    for (int64_t g = 0; g < cut.bias_heads; ++g) {
      const int64_t h = first_head * cut.bias_heads + g;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t index = first_n * to.n + h * to.h + (row + i) * to.l;
        narrow_to(bias_of_rows + g * head_rows + i * cut.bias_slots, T(1), cut.bias_slots, at(to.data, to.type, index),
                  to.type, to.w);
      }
    }
  }
}

// What all chunks together make of a chunk's keys, up to the next chunk's.
template <class T>
void add_shared(const AttentionBackward& call, const Cut& cut, const char* scratch, int64_t n, int64_t kv_head,
                int64_t chunk, const View& view, int64_t size, int64_t offset, T scale, T* sum) {
  const Sizes& sizes = call.sizes;
  const Span* const spans = reinterpret_cast<const Span*>(scratch + cut.spans) + item_of(sizes, cut, n, kv_head, 0);
  const auto span_at = [&](int64_t other) { return spans[other]; };
  const Span span = spans[chunk];
  if (span.empty()) {
    if (chunk == 0 && span_after(span_at, cut.chunks, chunk).empty()) {
      zero_keys(view, call.type, n, kv_head, size, 0, sizes.key_length);
    }
    return;
  }
  const Span before = span_before(span_at, chunk), after = span_after(span_at, cut.chunks, chunk);
  zero_keys(view, call.type, n, kv_head, size, before.last, span.first);
  if (after.empty()) zero_keys(view, call.type, n, kv_head, size, span.last, sizes.key_length);
  const int64_t end = least(before.last, after.empty() ? sizes.key_length : after.first), width = padded<T>(size);
  if (span.first >= end) return;
  int64_t earliest = chunk;
  for (int64_t c = chunk; c-- > 0;) {
    const Span other = spans[c];
    if (other.empty()) continue;
    if (other.last <= span.first) break;
    earliest = c;
  }
  zero(sum, (end - span.first) * width);
  for (int64_t c = earliest; c <= chunk; ++c) {
    const Span other = spans[c];
    if (other.empty()) continue;
    const Shared shared = shared_of(span_at, cut.chunks, c, other);
    const T* const slot = reinterpret_cast<const T*>(scratch + cut.slots) +
                          item_of(sizes, cut, n, kv_head, c) * cut.slot_keys * (cut.key_width + cut.value_width) + offset;
    for (int64_t key = span.first; key < least(end, other.last); ++key) {
      const T* const from = slot + shared.index(key) * width;
      T* const to = sum + (key - span.first) * width;
      for (int64_t i = 0; i < width; i += kLanes<T>) store(to + i, load(to + i) + load(from + i));
    }
  }
  for (int64_t key = span.first; key < end; ++key) {
    narrow_to(sum + (key - span.first) * width, scale, size,
              at(view.data, call.type, n * view.n + kv_head * view.h + key * view.l), call.type);
  }
}

// The gradients that are sums over all items.
template <class T>
void add_items(const AttentionBackward& call, const Cut& cut, const char* scratch, Scratch& own) {
  const Sizes& sizes = call.sizes;
  const int64_t group = sizes.heads / sizes.kv_heads;
  if (call.grad_sinks.data != nullptr) {
    const double* const of_items = reinterpret_cast<const double*>(scratch + cut.sinks);
    for (int64_t h = 0; h < sizes.heads; ++h) {
      double sum = 0;
      for (int64_t n = 0; n < sizes.batch; ++n) {
        for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
          sum += of_items[item_of(sizes, cut, n, h / group, chunk) * group + h % group];
        }
      }
      const Numbers& to = call.grad_sinks;
      narrow_to(&sum, 1.0, 1, at(to.data, to.type, h * to.stride), to.type);
    }
  }
  if (!cut.of_bias || cut.bias_by_row) return;
  const Bias& to = call.grad_bias;
  const double* const of_items = reinterpret_cast<const double*>(scratch + cut.biases);
  const int64_t lines = cut.bias_heads, size = cut.bias_slots;
  const int64_t ns = call.grad_bias.n == 0 ? 1 : sizes.batch, hs = call.grad_bias.h == 0 ? 1 : sizes.heads;
  double* const sum = own.take<double>(size);
  for (int64_t n = 0; n < ns; ++n) {
    for (int64_t h = 0; h < hs; ++h) {
      zero(sum, size);
      for (int64_t item_n = n; item_n < (ns == 1 ? sizes.batch : n + 1); ++item_n) {
        const int64_t first = hs == 1 ? 0 : h / group, last = hs == 1 ? sizes.kv_heads : first + 1;
        for (int64_t kv_head = first; kv_head < last; ++kv_head) {
          for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
            const int64_t line = item_of(sizes, cut, item_n, kv_head, chunk) * lines + (lines > 1 ? h % group : 0);
            for (int64_t slot = 0; slot < size; ++slot) sum[slot] += of_items[line * size + slot];
          }
        }
      }
      narrow_to(sum, 1.0, size, at(to.data, to.type, n * to.n + h * to.h), to.type, to.w);
    }
  }
}

template <class T>
void finish_back(const AttentionBackward& call, void* shared_scratch, int64_t begin, int64_t end) {
  const Sizes& sizes = call.sizes;
  const Cut cut = cut_of<T>(call);
  const char* const from = static_cast<const char*>(shared_scratch);
  for (int64_t unit = begin; unit < end; ++unit) {
    Scratch& scratch = Scratch::begin();
    if (unit == cut.items) {
      add_items<T>(call, cut, from, scratch);
      continue;
    }
    const int64_t chunk = unit % cut.chunks, kv_head = unit / cut.chunks % sizes.kv_heads;
    const int64_t n = unit / cut.chunks / sizes.kv_heads;
    T* const sum = scratch.take<T>(least(slots_of(sizes, call.rows), sizes.key_length) *
                                   most(cut.key_width, cut.value_width));
    if (cut.keys) {
      add_shared<T>(call, cut, from, n, kv_head, chunk, call.grad_key, sizes.head_dim, 0, static_cast<T>(call.scale), sum);
    }
    if (cut.values) {
      add_shared<T>(call, cut, from, n, kv_head, chunk, call.grad_value, sizes.value_dim, cut.slot_keys * cut.key_width,
                    T(1), sum);
    }
  }
}

template <class T>
inline Work plan_back(const AttentionBackward& call) {
  const Sizes& sizes = call.sizes;
  const Cut cut = cut_of<T>(call);
  Work work;
  work.units = cut.items / (cut.over_batch ? sizes.batch : 1) / (cut.over_heads ? sizes.kv_heads : 1);
  work.finishing = cut.items + 1;
  work.scratch = cut.bytes;
  work.operations = 2.5 * plan_attention(call).operations;
  return work;
}

inline Work plan_attention_backward(const AttentionBackward& call) {
  return call.type == Type::kDouble ? plan_back<double>(call) : plan_back<float>(call);
}

inline void run_attention_backward(const AttentionBackward& call, void* scratch, int64_t begin, int64_t end) {
  if (call.type == Type::kDouble) {
    go_back<double>(call, scratch, begin, end);
  } else {
    go_back<float>(call, scratch, begin, end);
  }
}

inline void finish_attention_backward(const AttentionBackward& call, void* scratch, int64_t begin, int64_t end) {
  if (call.type == Type::kDouble) {
    finish_back<double>(call, scratch, begin, end);
  } else {
    finish_back<float>(call, scratch, begin, end);
  }
}

}  // namespace
}  // namespace attnreg::cpu
