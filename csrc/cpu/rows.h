// Where rows stand among the keys: attnreg/rows.py in C++.
#pragma once

#include "kernels.h"

namespace attnreg::cpu {
namespace {

inline int64_t at(const Integers& integers, int64_t index) {
  return integers.wide ? static_cast<const int64_t*>(integers.data)[index] : static_cast<const int32_t*>(integers.data)[index];
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t clamp(int64_t value, int64_t low, int64_t high) { return least(most(value, low), high); }

// Row at position `start + row`, with keys of [low, high) alone.
inline Place place_row(const Rows& rows, int64_t start, int64_t row, int64_t low, int64_t high) {
  const int64_t position = start + row;
  Place place;
  // Of a row far before the first key, which has no use for it, 64 bits might not hold it.
  place.origin = static_cast<int64_t>(static_cast<uint64_t>(position) - static_cast<uint64_t>(rows.left));
  // 64 bits might not hold the sums of a position far before the first key, or far past the last one, which sees as much.
  place.first = most(most(position, low) - rows.left, low);
  place.last = least(least(position, high) + rows.right + 1, high);
  if (place.first >= place.last) place.first = place.last = clamp(place.first, 0, most(high, 0));
  return place;
}

// The places of `count` rows of sequence n, from row `begin` on.
inline void place_rows(const Sizes& sizes, const Rows& rows, int64_t n, int64_t begin, int64_t count, Place* places) {
  const int64_t query_length = sizes.query_length, key_length = sizes.key_length;
  if (rows.cu_seqlens_q.data != nullptr) {
    const auto of_queries = [&](int64_t s) { return clamp(at(rows.cu_seqlens_q, s), 0, query_length); };
    const auto of_keys = [&](int64_t s) { return clamp(at(rows.cu_seqlens_k, s), 0, key_length); };
    // The first offset past the row ends its sequence.
    int64_t end = 0, beyond = rows.sequences + 1;
    while (end < beyond) {
      const int64_t middle = end + (beyond - end) / 2;
      if (of_queries(middle) <= begin) {
        end = middle + 1;
      } else {
        beyond = middle;
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = begin + i;
      while (end <= rows.sequences && of_queries(end) <= row) ++end;
      // A row before the first offset, or past the last, is of a sequence without keys.
      const int64_t last = least(end, rows.sequences), first = most(end - 1, 0);
      places[i] = place_row(rows, of_keys(last) - of_queries(last), row, of_keys(first), of_keys(last));
    }
    return;
  }
  // Further away no window, of less than 2^62 on each side, reaches a key; but with a row's number added it could leave 64 bits.
  constexpr int64_t kFarthest = (int64_t{1} << 62) + (int64_t{1} << 60);
  int64_t start = key_length - query_length, low = 0, high = key_length;
  if (rows.query_starts.data != nullptr) start = clamp(at(rows.query_starts, n), -kFarthest, kFarthest);
  if (rows.key_starts.data != nullptr) low = clamp(at(rows.key_starts, n), 0, key_length);
  if (rows.key_lengths.data != nullptr) high = clamp(at(rows.key_lengths, n), 0, key_length);
  for (int64_t i = 0; i < count; ++i) places[i] = place_row(rows, start, begin + i, low, high);
}

}  // namespace
}  // namespace attnreg::cpu
