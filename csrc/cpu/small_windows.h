// Products of bands of small windows, pair by pair: a tile's product would be wasted on keys that few of its rows see.
#pragma once

#include "band.h"

namespace attnreg::cpu {
namespace {

constexpr int64_t kSmallWindow = 16;
// The same for sums by key.
constexpr int64_t kSmallWindowOfKeys = 8;
// Pairs of a row and a key whose products are summed up together.
constexpr int64_t kPairsAtOnce = 256;
constexpr int64_t kRowsCopiedAtOnce = 16, kPairsOfCopies = 128;

// The products of a row, of numbers of any type, with `count` keys, a vector of sums for each.
template <class T, int N, class S>
ATTNREG_INLINE void multiply_keys(const S* row, const T* keys, int64_t keys_row, int64_t count, T* sums) {
  Vector<T> left[N];
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) left[v] = load_as<T>(row + v * kLanes<T>);
  for (int64_t c = 0; c < count; ++c, keys += keys_row) {
    Vector<T> sum = left[0] * load(keys);
#pragma GCC unroll 8
    for (int v = 1; v < N; ++v) sum = multiply_add(left[v], load(keys + v * kLanes<T>), sum);
    store(sums + c * kLanes<T>, sum);
  }
}

template <class T, class S>
inline void multiply_keys(int64_t vectors, const S* row, const T* keys, int64_t keys_row, int64_t count, T* sums) {
  switch (vectors) {
    case 1:
      return multiply_keys<T, 1>(row, keys, keys_row, count, sums);
    case 2:
      return multiply_keys<T, 2>(row, keys, keys_row, count, sums);
    case 4:
      return multiply_keys<T, 4>(row, keys, keys_row, count, sums);
    case 8:
      return multiply_keys<T, 8>(row, keys, keys_row, count, sums);
    default:
      for (int64_t c = 0; c < count; ++c, keys += keys_row) {
        Vector<T> sum = load_as<T>(row) * load(keys);
        for (int64_t v = 1; v < vectors; ++v) sum = multiply_add(load_as<T>(row + v * kLanes<T>), load(keys + v * kLanes<T>), sum);
        store(sums + c * kLanes<T>, sum);
      }
  }
}

// Adds up the lanes of `2 * kStep` vectors, of which the first kStep hold the sums of two each from then on; until one is left.
template <class T, int kStep = kLanes<T> / 2>
ATTNREG_INLINE void add_lanes(Vector<T>* vectors) {
#pragma GCC unroll 16
  for (int i = 0; i < kStep; ++i) {
    exchange<T, kStep>(vectors[i], vectors[i + kStep]);
    vectors[i] += vectors[i + kStep];
  }
  if constexpr (kStep > 1) add_lanes<T, kStep / 2>(vectors);
}

// to[i] = the sum of the lanes of vector i; rounded up to as many as a vector has.
template <class T>
__attribute__((noinline)) void sum_lanes(const T* sums, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    Vector<T> vectors[kLanes<T>];
#pragma GCC unroll 16
    for (int v = 0; v < kLanes<T>; ++v) vectors[v] = load(sums + (i + v) * kLanes<T>);
    add_lanes<T>(vectors);
    store(to + i, vectors[0]);
  }
}

// Rows that are taken together: fewer where they are copied first, so that the copies stay in the first cache.
inline int64_t rows_at_once(int64_t slots, bool ready) {
  return ready ? kPairsAtOnce / slots : least(kPairsOfCopies / slots, kRowsCopiedAtOnce);
}

// How many rows from `row` on see keys so close together that they are read together: `span` at most, or one row.
inline int64_t rows_within(const Place* places, int64_t row, int64_t count, int64_t most_rows, int64_t span) {
  int64_t together = 1;
  while (together < most_rows && row + together < count && places[row + together].last - places[row].first <= span) ++together;
  return together;
}

// The keys of a unit that are read one group of rows after the other: where they lie, or copies, each made once as a rule.
template <class T>
class MovingKeys {
 public:
  MovingKeys(const Band& call, int64_t n, int64_t kv_head, int64_t at_most, Scratch& scratch)
      : call_(call), n_(n), kv_head_(kv_head), padded_(whole_vectors<T>(call.sizes.head_dim)), room_(2 * at_most),
        copy_(lies_ready<T>(call.type, call.sizes.head_dim) ? nullptr : scratch.take<T>(room_ * padded_)) {}

  // Keys [first, last), as many as `at_most` says; what was returned before must not be used any more.
  Operand<T> keys(int64_t first, int64_t last) {
    const auto some = [&](int64_t from, T* to) {
      return operand<T>(call_.keys, call_.type, n_, kv_head_, from, last - from, call_.sizes.head_dim, to);
    };
    if (copy_ == nullptr) return some(first, nullptr);
    if (first < base_ || first > end_ || last > base_ + room_) base_ = end_ = first;
    if (last > end_) {
      some(end_, copy_ + (end_ - base_) * padded_);
      end_ = last;
    }
    return {copy_ + (first - base_) * padded_, padded_};
  }

 private:
  const Band& call_;
  const int64_t n_, kv_head_, padded_, room_;
  T* const copy_;
  int64_t base_ = 0, end_ = 0;
};

// One unit of units_of_rows(), of a small window.
template <class T>
inline void multiply_to_small_band(const Band& call, int64_t n, int64_t kv_head, int64_t begin, int64_t count,
                                   const Place* places) {
  const int64_t width = call.sizes.head_dim, padded = whole_vectors<T>(width), slots = call.slots();
  const bool has_bias = call.bias.data != nullptr, are_whole = has_whole_vectors<T>(call.type, width);
  const int64_t most_rows = rows_at_once(slots, lies_ready<T>(call.type, width)), span = 2 * most_rows + slots;
  Scratch& scratch = Scratch::begin();
  MovingKeys<T> moving_keys(call, n, kv_head, span, scratch);
  T* const copy_of_rows = scratch.take<T>(are_whole ? 0 : most_rows * padded);
  T* const sums = scratch.take<T>((kPairsAtOnce + kLanes<T>) * kLanes<T>);
  T* const scores = scratch.take<T>(kPairsAtOnce + 2 * kLanes<T>);
  T* const bias = scratch.take<T>(slots + kLanes<T>);
  const T lowest = lowest_score<T>(call);
  memset(sums, 0, (kPairsAtOnce + kLanes<T>) * kLanes<T> * sizeof(T));
  for (int64_t r = 0, together; r < count; r += together) {
    together = rows_within(places, r, count, most_rows, span);
    const int64_t first = places[r].first, last = places[r + together - 1].last;
    if (first >= last) continue;
    const Operand<T> keys = moving_keys.keys(first, last);
    for (int64_t g = 0; g < call.group(); ++g) {
      const int64_t h = kv_head * call.group() + g;
      int64_t pairs = 0;
      const auto multiply = [&](const auto* rows, int64_t rows_row) {
        for (int64_t m = 0; m < together; ++m) {
          const Place& place = places[r + m];
          multiply_keys<T>(padded / kLanes<T>, rows + m * rows_row, keys.data + (place.first - first) * keys.row, keys.row,
                           place.last - place.first, sums + pairs * kLanes<T>);
          pairs += place.last - place.first;
        }
      };
      if (are_whole) {
        void* const rows = at(call.rows.data, call.type, place_of(call.rows, n, h, begin + r));
        with_numbers<T>(rows, call.type, [&](const auto* data) { multiply(data, call.rows.l); });
      } else {
        operand<T>(call.rows, call.type, n, h, begin + r, together, width, copy_of_rows);
        multiply(copy_of_rows, padded);
      }
      sum_lanes<T>(sums, pairs, scores);
      if (pairs == together * slots && !has_bias && call.band.l == slots) {
        finish_scores<T>(call, pairs, scores, nullptr, lowest, place_of(call.band, n, h, begin + r));
        continue;
      }
      const T* from = scores;
      for (int64_t m = 0; m < together; ++m) {
        const Place& place = places[r + m];
        finish_row<T>(call, n, h, begin + r + m, place, place.first, place.last, from, bias, lowest);
        from += place.last - place.first;
      }
    }
  }
}

// Vectors side by side, as numbers of any type that has vectors.
template <class T, int N, class S>
ATTNREG_INLINE void store_all(S* to, const Vector<T>* vectors) {
#pragma GCC unroll 8
  for (int v = 0; v < N; v += 2) {
    if constexpr (sizeof(S) == sizeof(T)) {
      store(to + v * kLanes<T>, vectors[v]);
      if (v + 1 < N) store(to + (v + 1) * kLanes<T>, vectors[v + 1]);
    } else if (v + 1 < N) {
      store_two(to + v * kLanes<T>, vectors[v], vectors[v + 1]);
    } else {
      store_shorts(to + v * kLanes<T>, narrowed(vectors[v], S()));
    }
  }
}

// sums[vectors] += sum over `count` terms of weight * the vectors of row; or scale times that, whatever was there before.
template <class T, int N, bool kAdd, class Weight, class S>
ATTNREG_INLINE void add_some(int64_t count, const Weight& weight, const T* rows, int64_t rows_row, T scale, S* sums) {
  Vector<T> total[N];
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) total[v] = kAdd ? load_as<T>(sums + v * kLanes<T>) : Vector<T>{};
  for (int64_t c = 0; c < count; ++c, rows += rows_row) {
    T number;
    if (!weight(c, number)) continue;
    const Vector<T> left = all(number);
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) total[v] = multiply_add(left, load(rows + v * kLanes<T>), total[v]);
  }
  if constexpr (!kAdd) {
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) total[v] *= scale;
  }
  store_all<T, N>(sums, total);
}

// The same of any number of vectors; `weight(c, number)` says whether there is one.
template <class T, bool kAdd, class Weight, class S>
ATTNREG_INLINE void add_weighted(int64_t vectors, int64_t count, const Weight& weight, const T* rows, int64_t rows_row, T scale,
                                 S* sums) {
  for (; vectors >= 4; vectors -= 4, rows += 4 * kLanes<T>, sums += 4 * kLanes<T>) {
    add_some<T, 4, kAdd>(count, weight, rows, rows_row, scale, sums);
  }
  if (vectors >= 2) {
    add_some<T, 2, kAdd>(count, weight, rows, rows_row, scale, sums);
    vectors -= 2;
    rows += 2 * kLanes<T>;
    sums += 2 * kLanes<T>;
  }
  if (vectors > 0) add_some<T, 1, kAdd>(count, weight, rows, rows_row, scale, sums);
}

// One unit of units_of_rows(), of a small window.
template <class T>
inline void average_to_small_rows(const Band& call, int64_t n, int64_t kv_head, int64_t begin, int64_t count,
                                  const Place* places) {
  const int64_t width = call.sizes.head_dim, padded = whole_vectors<T>(width), slots = call.slots();
  const bool has_bias = call.bias.data != nullptr, are_whole = has_whole_vectors<T>(call.type, width);
  const bool direct = call.type == kTypeOf<T>;
  const int64_t most_rows = rows_at_once(slots, lies_ready<T>(call.type, width)), span = 2 * most_rows + slots;
  const T scale = static_cast<T>(call.scale);
  Scratch& scratch = Scratch::begin();
  MovingKeys<T> moving_keys(call, n, kv_head, span, scratch);
  T* const copy_of_weights = scratch.take<T>(direct || has_bias ? 0 : most_rows * slots);
  T* const copy_of_sums = scratch.take<T>(are_whole ? 0 : most_rows * padded);
  T* const few = scratch.take<T>(slots);
  T* const bias = scratch.take<T>(slots);
  uint8_t* const seen = scratch.take<uint8_t>(slots);
  for (int64_t r = 0, together; r < count; r += together) {
    together = rows_within(places, r, count, most_rows, span);
    const int64_t first = places[r].first, last = places[r + together - 1].last;
    Operand<T> keys = {nullptr, padded};
    if (first < last) keys = moving_keys.keys(first, last);
    for (int64_t g = 0; g < call.group(); ++g) {
      const int64_t h = kv_head * call.group() + g, start = place_of(call.band, n, h, begin + r);
      Operand<T> weights = {copy_of_weights, slots};
      if (direct) {
        weights = {static_cast<const T*>(call.band.data) + start, call.band.l};
      } else if (!has_bias) {
        widen_rows(at(call.band.data, call.type, start), call.type, call.band.l, together, slots, copy_of_weights, slots);
      }
      void* const to = at(call.rows.data, call.type, place_of(call.rows, n, h, begin + r));
      const auto average = [&](auto* sums, int64_t sums_row) {
        for (int64_t m = 0; m < together; ++m, sums += sums_row) {
          const Place& place = places[r + m];
          const int64_t visible = place.last - place.first;
          if (visible == 0) {
            memset(sums, 0, padded * sizeof(*sums));
            continue;
          }
          const T* right = keys.data + (place.first - first) * keys.row;
          if (!has_bias) {
            const T* const from = weights.data + m * weights.row + (place.first - place.origin);
            const auto weight = [&](int64_t c, T& number) { return number = from[c], true; };
            add_weighted<T, false>(padded / kLanes<T>, visible, weight, right, keys.row, scale, sums);
          } else {
            memset(seen, 0, slots);
            read_weights<T>(call, n, h, begin + r + m, place, place.first, visible, bias, few, seen);
            const auto weight = [&](int64_t c, T& number) { return number = few[c], seen[c] != 0; };
            add_weighted<T, false>(padded / kLanes<T>, visible, weight, right, keys.row, scale, sums);
          }
        }
      };
      if (are_whole) {
        with_numbers<T>(to, call.type, [&](auto* data) { average(data, call.rows.l); });
      } else {
        average(copy_of_sums, padded);
        narrow_rows(copy_of_sums, padded, T{1}, together, width, to, call.type, call.rows.l);
      }
    }
  }
}

}  // namespace
}  // namespace attnreg::cpu
