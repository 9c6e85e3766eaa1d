// local_attention: softmax(scale * q . k, capped, + bias) v over the keys that a row sees, and the log-sum-exp of its scores.
//
// The keys of a tile are visited in parts, with a running maximum: nothing is made of the size of the keys.
#pragma once

#include "attention_tile.h"
#include "dropout.h"

namespace attnreg::cpu {
namespace {

// Rows of a unit.
constexpr int64_t kForwardRows = 256;
// Enough units for the threads of most machines; no unit has fewer rows than a tile.
constexpr int64_t kManyUnits = 64, kFewestRows = 32;

// Rows of a unit, which has all query heads of a key head: fewer where these are many and there would be few units.
inline int64_t rows_of_unit(const Sizes& sizes) {
  const int64_t group = sizes.heads / sizes.kv_heads;
  int64_t rows = kForwardRows;
  while (rows > kFewestRows && rows * group > kForwardRows &&
         sizes.batch * sizes.kv_heads * chunks_of(sizes, rows) < kManyUnits) {
    rows /= 2;
  }
  return rows;
}

template <class T>
struct AttentionSpace {
  T *queries, *scores, *sums, *spare;
  PairSpace<T> pairs;

  AttentionSpace(const Sizes& sizes, Scratch& scratch) : pairs(scratch) {
    const int64_t width = padded<T>(most(sizes.head_dim, sizes.value_dim));
    queries = scratch.take<T>(width * kRows<T>);
    scores = scratch.take<T>(Scoring<T>::kWidth * kRows<T>);
    sums = scratch.take<T>(width * kRows<T>);
    spare = scratch.take<T>(width * kRows<T>);
  }
};

inline Dropout dropout_of(const Attention& call, int64_t n, int64_t h) {
  Dropout dropout;
  dropout.threshold = static_cast<uint32_t>(call.dropout_p * 0x1p32);
  dropout.seed = call.seed;
  dropout.n = static_cast<uint32_t>(n);
  dropout.h = static_cast<uint32_t>(h);
  return dropout;
}

// exp of scores [keys][kRows] of keys [first, last) minus each lane's shift, in place; the sums are added to `total`.
template <class T, int kN>
ATTNREG_INLINE void exponentials(const Tile& tile, int64_t first, int64_t last, T* scores, const Vector<T>* shift,
                                 Vector<T>* total) {
  each_section<kN>(tile, first, last, [&](auto count, int vector, int64_t begin, int64_t end) {
    Vector<T> sum[count.kValue], minus[count.kValue];
    for (int v = 0; v < count.kValue; ++v) {
      sum[v] = Vector<T>{};
      minus[v] = shift[vector + v];
    }
    T* row = scores + (begin - first) * kRows<T> + vector * kLanes<T>;
    for (int64_t k = begin; k < end; ++k, row += kRows<T>) {
#pragma GCC unroll 2
      for (int v = 0; v < count.kValue; ++v) {
        const Vector<T> weight = exponential<T>(load(row + v * kLanes<T>) - minus[v]);
        sum[v] += weight;
        store(row + v * kLanes<T>, weight);
      }
    }
    for (int v = 0; v < count.kValue; ++v) total[vector + v] += sum[v];
  });
}

template <class T, int kN>
__attribute__((noinline)) void attend_tile(const Attention& call, Scoring<T>& scoring, const AttentionSpace<T>& space,
                                           const Keys<T>& keys, const Keys<T>& values, int64_t n, int64_t h,
                                           const Tile& tile, const Place* places) {
  const Sizes& sizes = call.sizes;
  const Lanes<T> lanes(tile, places);
  pack<T>(call.query, call.type, n, h, tile, lanes.sees, sizes.head_dim, nullptr, space.spare, space.queries);
  Highest<T, kN> highest;
  Vector<T> high[kN], total[kN];
  const bool has_sink = call.sinks.data != nullptr;
  const T sink = has_sink ? widen_one<T>(call.sinks, h) : -Limits<T>::kInfinity;
  for (int v = 0; v < kN; ++v) {
    highest.score[v] = high[v] = all(sink);
    highest.seen[v] = Mask<T>{};
    total[v] = all(has_sink ? T(1) : T(0));
  }
  const Dropout dropout = dropout_of(call, n, h);
  zero(space.sums, sizes.value_dim * kRows<T>);
  const int64_t kv_head = h / (sizes.heads / sizes.kv_heads), next = tile.row + tile.rows;
  fetch_ahead(call.query, call.type, n, h, sizes.head_dim, next, kRows<T>, sizes.query_length);
  fetch_ahead(call.output, call.type, n, h, sizes.value_dim, tile.row, tile.rows, sizes.query_length);
  const int64_t parts = parts_of(tile);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = part_begin(tile, part, parts), last = part_begin(tile, part + 1, parts);
    make_scores<T, kN>(scoring, tile, places, lanes, keys, space.queries, sizes.head_dim, first, last, space.scores,
                       nullptr, highest);
    if (part == 0) fetch_ahead(call.key, call.type, n, kv_head, sizes.head_dim, tile.last, kRows<T>, sizes.key_length);
    Vector<T> shift[kN], decay[kN];
    bool decays = false;
    for (int v = 0; v < kN; ++v) {
      shift[v] = highest.score[v] == -Limits<T>::kInfinity ? Vector<T>{} : highest.score[v];
      decay[v] = exponential<T>(high[v] - shift[v]);
      high[v] = highest.score[v];
      total[v] *= decay[v];
      decays |= any(decay[v] != T(1));
    }
    if (part > 0 && decays) {
      for (int64_t c = 0; c < sizes.value_dim; ++c) {
        for (int v = 0; v < kN; ++v) {
          T* const sum = space.sums + c * kRows<T> + v * kLanes<T>;
          store(sum, load(sum) * decay[v]);
        }
      }
    }
    exponentials<T, kN>(tile, first, last, space.scores, shift, total);
    if (part == 0) fetch_ahead(call.value, call.type, n, kv_head, sizes.value_dim, tile.last, kRows<T>, sizes.key_length);
    if (dropout.threshold > 0) {
      dropout.each<T>(tile.row, kN * kLanes<T>, first, last, [&](int64_t k, int lane, Mask<T> dropped) {
        T* const weight = space.scores + k * kRows<T> + lane;
        store(weight, dropped ? Vector<T>{} : load(weight));
      });
    }
    add_weighted<T, kN>(scoring, tile, values, sizes.value_dim, first, last, space.scores, space.pairs, space.sums);
  }
  alignas(64) T factor[kRows<T>] = {}, totals[kRows<T>] = {}, highs[kRows<T>] = {};
  alignas(64) Integer<T> seen[kRows<T>] = {};
  const T kept = static_cast<T>(1.0 / (1.0 - call.dropout_p));
  for (int v = 0; v < kN; ++v) {
    store(totals + v * kLanes<T>, total[v]);
    store(highs + v * kLanes<T>, high[v]);
    store(seen + v * kLanes<T>, highest.seen[v]);
    store(factor + v * kLanes<T>, highest.seen[v] ? kept / total[v] : Vector<T>{});
  }
  unpack<T>(space.sums, factor, space.spare, call.output, call.type, n, h, tile, sizes.value_dim);
  T* const log_sum_exp =
      static_cast<T*>(call.log_sum_exp) + (n * sizes.heads + h) * sizes.query_length + tile.row;
  for (int i = 0; i < tile.rows; ++i) {
    log_sum_exp[i] = seen[i] ? highs[i] + static_cast<T>(__builtin_log(static_cast<double>(totals[i])))
                             : -Limits<T>::kInfinity;
  }
}

template <class T>
void attend(const Attention& call, int64_t begin, int64_t end) {
  const Sizes& sizes = call.sizes;
  const int64_t unit_rows = rows_of_unit(sizes), chunks = chunks_of(sizes, unit_rows);
  const int64_t group = sizes.heads / sizes.kv_heads, rows_at_most = least(unit_rows, sizes.query_length);
  const Sums sums = slots_of(sizes, call.rows) < kManyKeys ? Sums::kFew : Sums::kMany;
  [[maybe_unused]] const PairRegisters registers;
  for (int64_t unit = begin; unit < end; ++unit) {
    Scratch& scratch = Scratch::begin();
    const int64_t n = unit / chunks / sizes.kv_heads, kv_head = unit / chunks % sizes.kv_heads;
    const int64_t row = unit % chunks * unit_rows, count = least(unit_rows, sizes.query_length - row);
    Place* const places = scratch.take<Place>(rows_at_most);
    Tile* const tiles = scratch.take<Tile>(rows_at_most);
    place_rows(sizes, call.rows, n, row, count, places);
    const int64_t made = make_tiles<T>(places, row, count, tiles);
    Scoring<T> scoring(call, scratch);
    const AttentionSpace<T> space(sizes, scratch);
    const bool converts = call.type != kTypeOf<T>;
    T* key_space = nullptr;
    T* value_space = nullptr;
    int64_t room = 0;
    for (Run run = run_of(tiles, 0, made); run.begin < made; run = run_of(tiles, run.end, made)) {
      if (converts && run.last - run.first > room) {
        room = most(run.last - run.first, least(rows_at_most + slots_of(sizes, call.rows), sizes.key_length));
        key_space = scratch.take<T>(room_of_keys(room, sizes.head_dim));
        value_space = scratch.take<T>(room_of_keys(room, sizes.value_dim));
      }
      const auto keys =
          keys_of<T>(call.key, call.type, n, kv_head, sizes.head_dim, run.first, run.last, Sums::kNone, key_space);
      const auto values =
          keys_of<T>(call.value, call.type, n, kv_head, sizes.value_dim, run.first, run.last, sums, value_space);
      for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
        scoring.begin_head(n, h);
        for (int64_t i = run.begin; i < run.end; ++i) {
          const Tile& tile = tiles[i];
          if (tile.vectors == 1) {
            attend_tile<T, 1>(call, scoring, space, keys, values, n, h, tile, places + (tile.row - row));
          } else {
            attend_tile<T, 2>(call, scoring, space, keys, values, n, h, tile, places + (tile.row - row));
          }
        }
      }
    }
  }
}

inline Work plan_attention(const Attention& call) {
  const Sizes& sizes = call.sizes;
  Work work;
  work.units = sizes.batch * sizes.kv_heads * chunks_of(sizes, rows_of_unit(sizes));
  work.operations = static_cast<double>(sizes.batch * sizes.heads) * static_cast<double>(sizes.query_length) *
                    static_cast<double>(slots_of(sizes, call.rows) + kSlotsOfARow) *
                    static_cast<double>(sizes.head_dim + sizes.value_dim);
  return work;
}

inline void run_attention(const Attention& call, int64_t begin, int64_t end) {
  if (call.type == Type::kDouble) {
    attend<double>(call, begin, end);
  } else {
    attend<float>(call, begin, end);
  }
}

}  // namespace
}  // namespace attnreg::cpu
