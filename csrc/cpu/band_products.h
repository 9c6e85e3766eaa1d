// Products of bands: what the two products and their gradients are made of.
//
//   multiply_to_band     band[i][c] = scale * row i . key of slot c (+ bias)
//   average_to_rows      row i = scale * sum over c of band[i][c] * key of slot c
//   average_to_keys      key j = scale * sum over the rows i that see j of band[i][slot of j] * row i
//
// Rows, or keys, are taken kRowsOfTile at a time with what they see, or are seen by, kept short enough for the caches: a piece of
// a dense product, of which the band is stored, or which is made of the band with zeros beside it.
#pragma once

#include "band.h"
#include "small_windows.h"

namespace attnreg::cpu {
namespace {

// Keys as columns, to[e][j] = key j [e], and zeros behind the last one; `few` has room for some keys.
template <class T>
inline void pack_columns(const View& view, Type type, int64_t n, int64_t h, int64_t first, int64_t count, int64_t width, T* to,
                         int64_t to_row, T* few) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t padded = whole_vectors<T>(width);
  int64_t j = 0;
  for (; j + lanes <= count; j += lanes) {
    const Operand<T> keys = operand<T>(view, type, n, h, first + j, lanes, width, few);
    transpose<T>(lanes, padded, keys.data, keys.row, to + j, to_row);
  }
  memset(few, 0, lanes * padded * sizeof(T));
  for (int64_t l = j; l < count; ++l) {
    widen(at(view.data, type, place_of(view, n, h, first + l)), type, 1, width, few + (l - j) * padded);
  }
  transpose<T>(lanes, padded, few, padded, to + j, to_row);
  // What a vector reaches beyond them is used for nothing, but a number that is not normal takes a hundred times as long.
  for (int64_t e = 0; e < width; ++e) store(to + e * to_row + j + lanes, Vector<T>{});
}

// How many of `count` rows from `row` on go into a tile: none is as far from the others as to make keys between them that no
// row sees worth another tile.
inline int64_t rows_together(const Place* places, int64_t row, int64_t count) {
  int64_t together = 1;
  while (together < kRowsOfTile && row + together < count &&
         places[row + together].first <= places[row + together - 1].last + 16) {
    ++together;
  }
  return together;
}

// One unit of units_of_rows().
template <class T>
inline void multiply_to_band(const Band& call, int64_t unit) {
  const Sizes& sizes = call.sizes;
  const int64_t units = ceil_div(sizes.query_length, kRowsOfUnit), width = sizes.head_dim, slots = call.slots();
  const int64_t n = unit / units / sizes.kv_heads, kv_head = unit / units % sizes.kv_heads;
  const int64_t begin = unit % units * kRowsOfUnit, count = least(kRowsOfUnit, sizes.query_length - begin);
  Place places[kRowsOfUnit];
  place_rows(sizes, *call.window, n, begin, count, places);
  for (int64_t g = 0; g < call.group(); ++g) {
    const int64_t h = kv_head * call.group() + g;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = place_of(call.band, n, h, begin + r);
      const int64_t first = places[r].first - places[r].origin, last = places[r].last - places[r].origin;
      const bool none = places[r].first == places[r].last;
      fill_slots(call, row, none ? slots : first);
      if (!none) fill_slots(call, row + last, slots - last);
    }
  }
  if (slots <= kSmallWindow) return multiply_to_small_band<T>(call, n, kv_head, begin, count, places);

  const int64_t pitch = kKeysAtOnce + kVectorsOfTile * kLanes<T>, padded = whole_vectors<T>(width);
  const bool has_bias = call.bias.data != nullptr;
  Scratch& scratch = Scratch::begin();
  T* const columns = scratch.take<T>(padded * pitch);
  T* const few = scratch.take<T>(kLanes<T> * padded);
  T* const tile = scratch.take<T>(kRowsOfTile * pitch);
  T* const copy = scratch.take<T>(lies_ready<T>(call.type, width) ? 0 : kRowsOfTile * padded);
  T* const bias = scratch.take<T>(has_bias ? kKeysAtOnce + kLanes<T> : 0);
  const T lowest = lowest_score<T>(call);
  int64_t first_row = 0;
  for (int64_t key = 0;; key += kKeysAtOnce) {
    while (first_row < count && (places[first_row].last <= key || places[first_row].first == places[first_row].last)) ++first_row;
    if (first_row == count) break;
    key = most(key, places[first_row].first);
    const int64_t end = least(key + kKeysAtOnce, places[count - 1].last);
    pack_columns<T>(call.keys, call.type, n, kv_head, key, end - key, width, columns, pitch, few);
    for (int64_t g = 0; g < call.group(); ++g) {
      const int64_t h = kv_head * call.group() + g;
      for (int64_t r = first_row, together; r < count && places[r].first < end; r += together) {
        together = rows_together(places, r, count);
        const int64_t from = most(places[r].first, key), to = least(places[r + together - 1].last, end);
        if (from >= to) continue;
        const int64_t vectors = ceil_div(to - from, kLanes<T>);
        const Operand<T> rows = operand<T>(call.rows, call.type, n, h, begin + r, together, width, copy);
        add_product<T>(together, vectors, width, rows.data, rows.row, 1, columns + (from - key), pitch, tile, pitch, false);
        for (int64_t m = 0; m < together; ++m) {
          const Place& place = places[r + m];
          const int64_t low = most(place.first, from), high = least(place.last, to);
          finish_row<T>(call, n, h, begin + r + m, place, low, high, tile + m * pitch + (low - from), bias, lowest);
        }
      }
    }
  }
}

// One unit of units_of_rows(): `call.rows` is written.
template <class T>
inline void average_to_rows(const Band& call, int64_t unit) {
  const Sizes& sizes = call.sizes;
  const int64_t units = ceil_div(sizes.query_length, kRowsOfUnit), width = sizes.head_dim;
  const int64_t n = unit / units / sizes.kv_heads, kv_head = unit / units % sizes.kv_heads;
  const int64_t begin = unit % units * kRowsOfUnit, count = least(kRowsOfUnit, sizes.query_length - begin);
  Place places[kRowsOfUnit];
  place_rows(sizes, *call.window, n, begin, count, places);
  if (call.slots() <= kSmallWindow) return average_to_small_rows<T>(call, n, kv_head, begin, count, places);

  const int64_t padded = whole_vectors<T>(width), of_head = count * padded;
  const bool has_bias = call.bias.data != nullptr;
  Scratch& scratch = Scratch::begin();
  T* const sums = scratch.take<T>(call.group() * of_head);
  T* const weights = scratch.take<T>(kRowsOfTile * kKeysAtOnce);
  T* const copy = scratch.take<T>(lies_ready<T>(call.type, width) ? 0 : kKeysAtOnce * padded);
  T* const bias = scratch.take<T>(has_bias ? kKeysAtOnce : 0);
  uint8_t seen[kKeysAtOnce];
  memset(sums, 0, call.group() * of_head * sizeof(T));
  int64_t first_row = 0;
  for (int64_t key = 0;; key += kKeysAtOnce) {
    while (first_row < count && (places[first_row].last <= key || places[first_row].first == places[first_row].last)) ++first_row;
    if (first_row == count) break;
    key = most(key, places[first_row].first);
    const int64_t end = least(key + kKeysAtOnce, places[count - 1].last);
    const Operand<T> keys = operand<T>(call.keys, call.type, n, kv_head, key, end - key, width, copy);
    for (int64_t g = 0; g < call.group(); ++g) {
      const int64_t h = kv_head * call.group() + g;
      for (int64_t r = first_row, together; r < count && places[r].first < end; r += together) {
        together = rows_together(places, r, count);
        const int64_t from = most(places[r].first, key), to = least(places[r + together - 1].last, end);
        if (from >= to) continue;
        memset(seen, 0, to - from);
        for (int64_t m = 0; m < together; ++m) {
          const Place& place = places[r + m];
          T* row = weights + m * kKeysAtOnce;
          const int64_t low = most(place.first, from), high = least(place.last, to);
          if (low >= high) {
            memset(row, 0, (to - from) * sizeof(T));
            continue;
          }
          memset(row, 0, (low - from) * sizeof(T));
          memset(row + (high - from), 0, (to - high) * sizeof(T));
          if (!has_bias) memset(seen + (low - from), 1, high - low);
          read_weights<T>(call, n, h, begin + r + m, place, low, high - low, bias, row + (low - from), seen + (low - from));
        }
        for (int64_t first = 0, last; first < to - from; first = last) {
          const bool use = seen[first];
          for (last = first + 1; last < to - from && seen[last] == use; ++last) continue;
          if (!use) continue;
          add_product<T>(together, padded / kLanes<T>, last - first, weights + first, kKeysAtOnce, 1,
                         keys.data + (from + first - key) * keys.row, keys.row, sums + g * of_head + r * padded, padded, true);
        }
      }
    }
  }
  for (int64_t g = 0; g < call.group(); ++g) {
    write_sums<T>(call, call.rows, n, kv_head * call.group() + g, begin, count, sums + g * of_head, padded);
  }
}

// The tiles of a group, a bit for each.
constexpr uint8_t kAllTiles = (1 << kKeysOfGroup / kRowsOfTile) - 1;

// The first row of sequence n that sees a key from `key` on, or that only rows from there on do.
inline int64_t first_row_seeing(const Band& call, int64_t n, int64_t key) {
  int64_t low = 0, high = call.sizes.query_length;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    Place place;
    place_rows(call.sizes, *call.window, n, middle, 1, &place);
    if (place.last <= key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// One unit of units_of_keys(): `call.keys` is written.
template <class T>
inline void average_to_keys(const Band& call, int64_t unit) {
  const Sizes& sizes = call.sizes;
  const int64_t units = ceil_div(sizes.key_length, kKeysOfUnit), width = sizes.head_dim;
  const int64_t n = unit / units / sizes.kv_heads, kv_head = unit / units % sizes.kv_heads;
  const int64_t begin = unit % units * kKeysOfUnit, count = least(kKeysOfUnit, sizes.key_length - begin);

  const int64_t padded = whole_vectors<T>(width), group = call.group();
  Place places[kRowsOfUnit];
  const bool has_bias = call.bias.data != nullptr;
  Scratch& scratch = Scratch::begin();
  T* const sums = scratch.take<T>(count * padded);
  T* const of_head = scratch.take<T>(group > 1 ? count * padded : 0);
  T* const weights = scratch.take<T>(kRowsOfUnit * kKeysOfGroup);
  const bool small = call.slots() <= kSmallWindowOfKeys && !has_bias;
  T* const copy_of_band = scratch.take<T>(small && call.type != kTypeOf<T> ? kRowsOfUnit * call.slots() : 0);
  T* const copy = scratch.take<T>(lies_ready<T>(call.type, width) ? 0 : kRowsOfUnit * padded);
  T* const bias = scratch.take<T>(kKeysOfGroup);
  uint8_t* const of_keys = scratch.take<uint8_t>(kKeysOfGroup);
  uint8_t seen[kRowsOfUnit];
  memset(sums, 0, count * padded * sizeof(T));
  const int64_t first_row = first_row_seeing(call, n, begin);
  for (int64_t g = 0; g < group; ++g) {
    const int64_t h = kv_head * group + g;
    T* into = sums;
    if (g > 0) {
      into = of_head;
      memset(into, 0, count * padded * sizeof(T));
    }
    for (int64_t row = first_row; row < sizes.query_length; row += kRowsOfUnit) {
      int64_t rows = least(kRowsOfUnit, sizes.query_length - row);
      place_rows(sizes, *call.window, n, row, rows, places);
      while (rows > 0 && places[rows - 1].first >= begin + count) --rows;
      if (rows == 0) break;
      const Operand<T> right = operand<T>(call.rows, call.type, n, h, row, rows, width, copy);
      int64_t low_row = 0, high_row = 0;
      if (small) {
        const int64_t start = place_of(call.band, n, h, row), slots = call.slots();
        Operand<T> band = {static_cast<const T*>(call.band.data) + start, call.band.l};
        if (call.type != kTypeOf<T>) {
          widen_rows(at(call.band.data, call.type, start), call.type, call.band.l, rows, slots, copy_of_band, slots);
          band = {copy_of_band, slots};
        }
        for (int64_t j = 0; j < count; ++j) {
          const int64_t key = begin + j;
          while (low_row < rows && places[low_row].last <= key) ++low_row;
          while (high_row < rows && places[high_row].first <= key) ++high_row;
          if (low_row >= high_row) continue;
          const auto weight = [&](int64_t r, T& number) {
            const Place& place = places[low_row + r];
            if (key < place.first || key >= place.last) return false;
            number = band.data[(low_row + r) * band.row + (key - place.origin)];
            return true;
          };
          add_weighted<T, true>(padded / kLanes<T>, high_row - low_row, weight, right.data + low_row * right.row, right.row,
                                T{1}, into + j * padded);
        }
        continue;
      }
      for (int64_t j = 0; j < count; j += kKeysOfGroup) {
        const int64_t key = begin + j, together = least(kKeysOfGroup, count - j);
        while (low_row < rows && places[low_row].last <= key) ++low_row;
        while (high_row < rows && places[high_row].first < key + together) ++high_row;
        if (low_row >= high_row) continue;
        for (int64_t r = low_row; r < high_row; ++r) {
          const Place& place = places[r];
          T* const to = weights + r * kKeysOfGroup;
          if (place.first <= key && place.last >= key + kKeysOfGroup && !has_bias && call.type == kTypeOf<T>) {
            const int64_t first = place_of(call.band, n, h, row + r) + key - place.origin;
            memcpy(to, static_cast<const T*>(call.band.data) + first, kKeysOfGroup * sizeof(T));
            seen[r] = kAllTiles;
            continue;
          }
          const int64_t low = most(place.first, key), high = least(place.last, key + together);
          memset(to, 0, kKeysOfGroup * sizeof(T));
          seen[r] = 0;
          if (low >= high) continue;
          seen[r] = kAllTiles;
          memset(of_keys, 0, kKeysOfGroup);
          read_weights<T>(call, n, h, row + r, place, low, high - low, bias, to + (low - key), of_keys + (low - key));
          if (!has_bias) continue;
          seen[r] = 0;
          for (int64_t m = 0; m < kKeysOfGroup; ++m) seen[r] |= of_keys[m] << (m / kRowsOfTile);
        }
        int64_t low_of_tile = low_row;
        for (int64_t m = 0; m < together; m += kRowsOfTile) {
          while (low_of_tile < high_row && places[low_of_tile].last <= key + m) ++low_of_tile;
          const int64_t keys = least(kRowsOfTile, together - m);
          const uint8_t tile = 1 << (m / kRowsOfTile);
          for (int64_t first = low_of_tile, last; first < high_row && places[first].first < key + m + keys; first = last) {
            const bool use = seen[first] & tile;
            last = first + 1;
            while (last < high_row && places[last].first < key + m + keys && bool(seen[last] & tile) == use) ++last;
            if (!use) continue;
            add_product<T>(keys, padded / kLanes<T>, last - first, weights + first * kKeysOfGroup + m, 1, kKeysOfGroup,
                           right.data + first * right.row, right.row, into + (j + m) * padded, padded, true);
          }
        }
      }
    }
    if (g > 0) {
      for (int64_t e = 0; e < count * padded; e += kLanes<T>) store(sums + e, load(sums + e) + load(into + e));
    }
  }
  write_sums<T>(call, call.keys, n, kv_head, begin, count, sums, padded);
}

}  // namespace
}  // namespace attnreg::cpu
