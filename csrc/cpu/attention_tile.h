// What attention's forward and backward share: tiles of rows, their scores, and which weights are dropped.
//
// A tile's rows lie in the lanes of vectors: everything about a key is a row of one or two vectors, so that masks, maxima and sums
// are made lane by lane. Scores of a tile are made for some keys at a time, [keys][kRows].
#pragma once

#include "convert.h"
#include "functions.h"
#include "kernels.h"
#include "pairs.h"
#include "rows.h"
#include "scratch.h"
#include "tile.h"
#include "vector.h"

namespace attnreg::cpu {
namespace {

// Rows of a tile at the most.
template <class T>
constexpr int kRows = 2 * kLanes<T>;

// Keys whose scores are made at a time: they stay in the first cache, beside what they are multiplied with.
constexpr int64_t kKeys = 192;

// Terms of q . k that are added one after the other. A softmax takes the error of a score, not its relative error.
constexpr int64_t kTerms = 32;

// Consecutive rows, and the keys [first, last) that they see together. Every one of these is seen by some row, but for a bias.
struct Tile {
  int64_t row;
  int rows, vectors;
  int64_t first, last;
  // The keys that every lane sees.
  int64_t inner_first, inner_last;
  // Of two vectors, no row in the second sees keys before `both_first`, and none in the first sees keys from `both_last` on.
  int64_t both_first, both_last;

  bool empty() const { return first == last; }
};

// So few keys are not worth a product of their own.
constexpr int64_t kFewKeys = 8;

// The tile of the rows from `places` on, of which there are `count`. Rows that see nothing may be anywhere in it.
template <class T>
inline Tile tile_of(const Place* places, int64_t row, int64_t count) {
  Tile tile = {row, 0, 1, 0, 0, 0, 0, 0, 0};
  bool second_sees = false;
  bool all_see = true;
  for (; tile.rows < kRows<T> && tile.rows < count; ++tile.rows) {
    const Place& place = places[tile.rows];
    if (place.first == place.last) {
      all_see = false;
    } else if (tile.empty()) {
      tile.first = tile.inner_first = place.first;
      tile.last = tile.inner_last = place.last;
    } else {
      // Rows that share no key are better off apart, but for those of few keys that lie side by side, as where W is 1.
      const bool apart = place.first > tile.last || place.last < tile.first;
      const bool shares = place.first < tile.last && place.last > tile.first;
      if (apart || (!shares && tile.last - tile.first > tile.rows)) break;
      tile.first = least(tile.first, place.first);
      tile.last = most(tile.last, place.last);
      tile.inner_first = most(tile.inner_first, place.first);
      tile.inner_last = least(tile.inner_last, place.last);
    }
    if (place.first == place.last) continue;
    if (tile.rows < kLanes<T>) {
      tile.both_last = tile.last;
    } else if (!second_sees) {
      tile.both_first = place.first;
      second_sees = true;
    }
  }
  tile.vectors = tile.rows <= kLanes<T> ? 1 : 2;
  if (!all_see || tile.rows < tile.vectors * kLanes<T> || tile.inner_last <= tile.inner_first) {
    tile.inner_first = tile.inner_last = tile.last;
  }
  if (!second_sees) tile.both_first = tile.last;
  if (tile.both_first - tile.first < kFewKeys) tile.both_first = tile.first;
  if (tile.last - tile.both_last < kFewKeys) tile.both_last = tile.last;
  return tile;
}

// Calls act(count, vector, begin, end) for the parts of keys [first, last) that the same vectors of a tile see: `count` of them,
// a constant, from `vector` on.
template <int kN>
struct Count {
  static constexpr int kValue = kN;
};
template <int kN, class Act>
ATTNREG_INLINE void each_section(const Tile& tile, int64_t first, int64_t last, const Act& act) {
  if constexpr (kN == 1) {
    act(Count<1>(), 0, first, last);
  } else {
    const int64_t begin = clamp(tile.both_first, first, last), end = clamp(tile.both_last, begin, last);
    if (first < begin) act(Count<1>(), 0, first, begin);
    if (begin < end) act(Count<2>(), 0, begin, end);
    if (end < last) act(Count<1>(), 1, end, last);
  }
}

// All tiles of `count` rows; returns how many.
template <class T>
inline int64_t make_tiles(const Place* places, int64_t row, int64_t count, Tile* tiles) {
  int64_t made = 0;
  for (int64_t done = 0; done < count; done += tiles[made++].rows) {
    tiles[made] = tile_of<T>(places + done, row + done, count - done);
  }
  return made;
}

// Tiles one after the other whose keys lie side by side, and those keys.
struct Run {
  int64_t begin, end;
  int64_t first, last;
};

inline Run run_of(const Tile* tiles, int64_t begin, int64_t count) {
  Run run = {begin, begin, 0, 0};
  for (; run.end < count; ++run.end) {
    const Tile& tile = tiles[run.end];
    if (tile.empty()) continue;
    if (run.first == run.last) {
      run.first = tile.first;
      run.last = tile.last;
    } else {
      if (tile.first > run.last || tile.last < run.first) break;
      run.first = least(run.first, tile.first);
      run.last = most(run.last, tile.last);
    }
  }
  return run;
}

// Keys or values of one head in the type of computation; and as they lie, where rows are multiplied with them in pairs.
template <class T>
struct Keys {
  const T* data;
  int64_t stride;
  int64_t first;
  const BFloat16* pairs;
  int64_t pairs_stride;
  // As columns of pairs; null where there are none.
  const BFloat16* columns;

  const T* at(int64_t key) const { return data + (key - first) * stride; }
  const BFloat16* pairs_at(int64_t key) const { return pairs + (key - first) * pairs_stride; }
};

// What keys are for beside products with rows: sums over few or many of them.
enum class Sums { kNone, kFew, kMany };

// So many keys of a row are worth columns.
constexpr int64_t kManyKeys = 24;

// Keys [first, last) of a head: where they lie, or in `space`, which has room for them, where they are of another type.
template <class T>
inline Keys<T> keys_of(const View& view, Type type, int64_t n, int64_t h, int64_t size, int64_t first, int64_t last,
                       [[maybe_unused]] Sums sums, T* space) {
  const void* const from = at(view.data, type, n * view.n + h * view.h + first * view.l);
  if (type == kTypeOf<T>) return {static_cast<const T*>(from), view.l, first, nullptr, 0, nullptr};
  Keys<T> keys = {space, size, first, nullptr, view.l, nullptr};
#if defined(ATTNREG_PAIRS)
  if (goes_in_pairs<T>(type, size)) {
    keys.pairs = static_cast<const BFloat16*>(from);
    if (sums == Sums::kNone) return keys;
    BFloat16* const columns = reinterpret_cast<BFloat16*>(space);
    if (sums == Sums::kMany && pack_columns_of_pairs(keys.pairs, view.l, last - first, size, columns)) {
      keys.columns = columns;
      return keys;
    }
  }
#endif
  widen_rows(from, type, view.l, last - first, size, space, size);
  return keys;
}

// Numbers that keys_of() needs for so many keys.
inline int64_t room_of_keys(int64_t keys, int64_t size) { return (kHasPairs ? rounded_up(keys, kTermsOfPairs) : keys) * size; }

// Space for the weights of some keys in pairs.
template <class T>
struct PairSpace {
  T* upper = nullptr;
  T* lower = nullptr;

  explicit PairSpace(Scratch& scratch) {
    if (!kHasPairs) return;
    upper = scratch.take<T>((kKeys + 2 * kTermsOfPairs) / 2 * kRows<T>);
    lower = scratch.take<T>((kKeys + 2 * kTermsOfPairs) / 2 * kRows<T>);
  }
};

template <class T>
inline int64_t padded(int64_t size) {
  return rounded_up(size, kLanes<T>);
}

// Which lanes of a tile hold a row that sees a key, and which keys it sees.
template <class T>
struct Lanes {
  int64_t first[kRows<T>], last[kRows<T>];
  bool sees[kRows<T>];

  Lanes(const Tile& tile, const Place* places) {
    for (int i = 0; i < kRows<T>; ++i) {
      sees[i] = i < tile.rows && places[i].first < places[i].last;
      first[i] = sees[i] ? places[i].first : 0;
      last[i] = sees[i] ? places[i].last : 0;
    }
  }
};

// Which of the keys [begin, end), of which there are few, the rows in `count` lanes from `lane` on see, counted from `begin`: in
// integers as wide as a number, which cannot count all keys that there may be.
template <class T>
struct Seen {
  alignas(64) Integer<T> first[kRows<T>], last[kRows<T>];

  Seen(const Lanes<T>& lanes, int lane, int count, int64_t begin, int64_t end) {
    for (int i = 0; i < count; ++i) {
      first[i] = static_cast<Integer<T>>(clamp(lanes.first[lane + i], begin, end) - begin);
      last[i] = static_cast<Integer<T>>(clamp(lanes.last[lane + i], begin, end) - begin);
    }
  }
};

// Rows of a tensor (N, H, Lq, X) as a tile has them: `by_row` [kRows][padded size] where it is not null, and `by_lane`
// [size][kRows]; in pairs, [kLanes][size] of two rows each and [size / 2][kRows]. Lanes that are not `used` are 0, and not read.
template <class T>
inline void pack(const View& view, Type type, int64_t n, int64_t h, const Tile& tile, const bool* used, int64_t size,
                 T* by_row, T* spare, T* by_lane) {
  const int lanes = tile.vectors * kLanes<T>;
  const int64_t width = padded<T>(size);
  const void* const from = at(view.data, type, n * view.n + h * view.h + tile.row * view.l);
  bool all_used = true;
  for (int i = 0; i < lanes; ++i) all_used &= used[i];
  if (all_used && by_row == nullptr && type == kTypeOf<T> && width == size) {
    transpose<T>(lanes, size, static_cast<const T*>(from), view.l, by_lane, kRows<T>);
    return;
  }
#if defined(ATTNREG_PAIRS)
  if constexpr (sizeof(T) == sizeof(float)) {
    if (goes_in_pairs<T>(type, size)) {
      const size_t bytes = static_cast<size_t>(size) * sizeof(BFloat16);
      for (int i = 0; i < kRows<T>; ++i) {
        T* const row = spare + i * (size / 2);
        if (i < lanes && used[i]) {
          memcpy(row, at(from, type, i * view.l), bytes);
        } else {
          memset(row, 0, bytes);
        }
      }
      transpose<T>(lanes, size / 2, spare, size / 2, by_lane, kRows<T>);
      if (by_row != nullptr) pair_rows(reinterpret_cast<const BFloat16*>(spare), size, size, by_row);
      return;
    }
  }
#endif
  T* const rows = by_row == nullptr ? spare : by_row;
  if (all_used && width == size) {
    widen_rows(from, type, view.l, lanes, size, rows, width);
    transpose<T>(lanes, width, rows, width, by_lane, kRows<T>);
    return;
  }
  for (int i = 0; i < lanes; ++i) {
    T* const row = rows + i * width;
    if (!used[i]) {
      for (int64_t c = 0; c < width; ++c) row[c] = 0;
      continue;
    }
    widen(at(from, type, i * view.l), type, 1, size, row);
    for (int64_t c = size; c < width; ++c) row[c] = 0;
  }
  transpose<T>(lanes, width, rows, width, by_lane, kRows<T>);
}

// The other way: [size][kRows], each lane times its `factor`, into the tile's rows of a tensor.
template <class T>
inline void unpack(T* by_lane, const T* factor, T* spare, const View& view, Type type, int64_t n, int64_t h,
                   const Tile& tile, int64_t size) {
  const int lanes = tile.vectors * kLanes<T>;
  const int64_t width = padded<T>(size);
  for (int v = 0; v < tile.vectors; ++v) {
    // A row that sees nothing has the factor 0: what was summed for it may be NaN, of keys that its tile sees.
    const Vector<T> factors = load(factor + v * kLanes<T>);
    T* const column = by_lane + v * kLanes<T>;
    for (int64_t c = 0; c < size; ++c) {
      const Vector<T> sum = load(column + c * kRows<T>);
      store(column + c * kRows<T>, factors == T(0) ? Vector<T>{} : sum * factors);
    }
  }
  void* const to = at(view.data, type, n * view.n + h * view.h + tile.row * view.l);
  if (type == kTypeOf<T> && width == size && tile.rows == lanes) {
    transpose<T>(size, lanes, by_lane, kRows<T>, static_cast<T*>(to), view.l);
    return;
  }
  transpose<T>(width, lanes, by_lane, kRows<T>, spare, width);
  for (int i = 0; i < tile.rows; ++i) narrow_to(spare + i * width, T(1), size, at(to, type, i * view.l), type);
}

// What is done to the products q . k of a head to make its scores, and the space that this takes.
template <class T>
struct Scoring {
  T scale, cap;  // a cap of 0: none
  bool has_bias;
  Bias bias;
  const void* bias_rows = nullptr;  // of the sequence and head
  T* by_row = nullptr;              // [kRows][padded keys]
  T* by_lane = nullptr;             // [padded keys][kRows]
  bool* key_is_seen = nullptr;      // [keys]

  static constexpr int64_t kWidth = (kKeys + kLanes<T> - 1) / kLanes<T> * kLanes<T>;

  Scoring(const Attention& call, Scratch& scratch) : bias(call.bias) {
    scale = static_cast<T>(call.scale);
    cap = static_cast<T>(call.softcap);
    // A cap that the type cannot hold caps nothing, or all.
    if (call.softcap > 0) {
      cap = cap > Limits<T>::kLargest ? Limits<T>::kLargest : cap < Limits<T>::kSmallest ? Limits<T>::kSmallest : cap;
    }
    has_bias = bias.data != nullptr;
    if (has_bias) {
      by_row = scratch.take<T>(kRows<T> * kWidth);
      by_lane = scratch.take<T>(kWidth * kRows<T>);
      key_is_seen = scratch.take<bool>(kKeys);
    }
  }

  void begin_head(int64_t n, int64_t h) {
    if (has_bias) bias_rows = at(bias.data, bias.type, n * bias.n + h * bias.h);
  }

  // Puts the bias of keys [first, last) into `by_lane`, -inf where a row does not see the key.
  void fetch_bias(const Tile& tile, const Place* places, int64_t first, int64_t last) {
    const int lanes = tile.vectors * kLanes<T>;
    const int64_t width = padded<T>(last - first);
    for (int i = 0; i < lanes; ++i) {
      T* const row = by_row + i * kWidth;
      const int64_t begin = i < tile.rows ? most(first, places[i].first) : last;
      const int64_t end = i < tile.rows ? most(least(last, places[i].last), begin) : last;
      for (int64_t k = first; k < least(begin, last); ++k) row[k - first] = -Limits<T>::kInfinity;
      if (begin < end) {
        const int64_t index = (tile.row + i) * bias.l + (begin - places[i].origin) * bias.w;
        fetch_finite(at(bias_rows, bias.type, index), end - begin, row + (begin - first));
      }
      for (int64_t k = end; k < first + width; ++k) row[k - first] = -Limits<T>::kInfinity;
    }
    transpose<T>(lanes, width, by_row, kWidth, by_lane, kRows<T>);
  }

 private:
  // Only what is -inf hides: a number beyond T's range is the last one within.
  void fetch_finite(const void* from, int64_t count, T* to) const {
    if (sizeof(T) < 8 && bias.type == Type::kDouble) {
      const double* const numbers = static_cast<const double*>(from);
      for (int64_t k = 0; k < count; ++k) {
        const double number = numbers[k * bias.w];
        const bool is_below = number < -Limits<T>::kLargest && number != -Limits<double>::kInfinity;
        to[k] = is_below ? -Limits<T>::kLargest : number > Limits<T>::kLargest ? Limits<T>::kLargest : static_cast<T>(number);
      }
      return;
    }
    widen(from, bias.type, bias.w, count, to);
    for (int64_t k = 0; k < count; ++k) to[k] = to[k] > Limits<T>::kLargest ? Limits<T>::kLargest : to[k];
  }
};

// The highest score of each lane, and which lanes saw a key at all.
template <class T, int kN>
struct Highest {
  Vector<T> score[kN];
  Mask<T> seen[kN];
};

// The scores of `count` keys out of scale * q . k; `visible` says who sees them, null where all do. All pointers are to the first
// of kN vectors.
template <class T, int kN, bool kMasked>
ATTNREG_INLINE void finish_scores(T scale, const Seen<T>* visible, int64_t count, T* scores, Vector<T>* highest,
                                  Mask<T>* seen) {
  Vector<T> high[kN];
  Mask<T> sees[kN];
  for (int v = 0; v < kN; ++v) {
    high[v] = highest[v];
    sees[v] = kMasked ? seen[v] : ~Mask<T>{};
  }
  for (int64_t k = 0; k < count; ++k) {
#pragma GCC unroll 2
    for (int v = 0; v < kN; ++v) {
      T* const to = scores + k * kRows<T> + v * kLanes<T>;
      Vector<T> score = load(to) * scale;
      // What is below the range is its lowest number: -inf says that a key is hidden.
      score = score < -Limits<T>::kLargest ? all(-Limits<T>::kLargest) : score;
      if constexpr (kMasked) {
        const Mask<T> key = all(static_cast<Integer<T>>(k));
        const int lane = v * kLanes<T>;
        const Mask<T> is_seen = (key >= load(visible->first + lane)) & (key < load(visible->last + lane));
        score = is_seen ? score : all(-Limits<T>::kInfinity);
        sees[v] |= is_seen;
      }
      high[v] = larger(score, high[v]);
      store(to, score);
    }
  }
  for (int v = 0; v < kN; ++v) {
    highest[v] = high[v];
    seen[v] = sees[v];
  }
}

// products [keys][kRows] of keys [first, last) with the tile's rows.
template <class T, int kN>
inline void multiply_keys(const Tile& tile, const Keys<T>& keys, const T* rows, int64_t size, int64_t first, int64_t last,
                          T* products) {
  each_section<kN>(tile, first, last, [&](auto count, int vector, int64_t begin, int64_t end) {
    const int lane = vector * kLanes<T>;
#if defined(ATTNREG_PAIRS)
    if constexpr (sizeof(T) == sizeof(float)) {
      if (keys.pairs != nullptr) {
        return multiply_pairs<count.kValue>(end - begin, size, keys.pairs_at(begin), keys.pairs_stride, rows + lane, kRows<T>,
                                            products + (begin - first) * kRows<T> + lane, kRows<T>);
      }
    }
#endif
    multiply<T, count.kValue, Lies::kRows>(end - begin, size, keys.at(begin), keys.stride, rows + lane, kRows<T>,
                                           products + (begin - first) * kRows<T> + lane, kRows<T>, false, kTerms);
  });
}

// The scores of keys [first, last), -inf where hidden and nowhere else; `slope` is how they change with q . k * scale, of calls
// with a cap, where it is not null.
template <class T, int kN>
inline void make_scores(Scoring<T>& scoring, const Tile& tile, const Place* places, const Lanes<T>& lanes,
                        const Keys<T>& keys, const T* queries, int64_t size, int64_t first, int64_t last, T* scores,
                        T* slope, Highest<T, kN>& highest) {
  multiply_keys<T, kN>(tile, keys, queries, size, first, last, scores);
  T scale = scoring.scale;
  if (scoring.cap > 0) {
    each_section<kN>(tile, first, last, [&](auto count, int vector, int64_t begin, int64_t end) {
      for (int64_t k = begin - first; k < end - first; ++k) {
        for (int v = vector; v < vector + count.kValue; ++v) {
          const int64_t index = k * kRows<T> + v * kLanes<T>;
          const Vector<T> share = hyperbolic_tangent<T>(load(scores + index) * scale / scoring.cap);
          if (slope != nullptr) store(slope + index, (T(1) - share) * (T(1) + share));
          store(scores + index, share * scoring.cap);
        }
      }
    });
    scale = 1;
  }
  if (scoring.has_bias) {
    scoring.fetch_bias(tile, places, first, last);
    for (int64_t k = 0; k < last - first; ++k) scoring.key_is_seen[k] = false;
    each_section<kN>(tile, first, last, [&](auto count, int vector, int64_t begin, int64_t end) {
      for (int64_t k = begin - first; k < end - first; ++k) {
        Mask<T> seen = {};
#pragma GCC unroll 2
        for (int v = vector; v < vector + count.kValue; ++v) {
          T* const to = scores + k * kRows<T> + v * kLanes<T>;
          const Vector<T> bias = load(scoring.by_lane + k * kRows<T> + v * kLanes<T>);
          const Mask<T> visible = bias != -Limits<T>::kInfinity;
          Vector<T> score = load(to) * scale + bias;
          score = score < -Limits<T>::kLargest ? all(-Limits<T>::kLargest) : score;
          score = visible ? score : all(-Limits<T>::kInfinity);
          highest.score[v] = larger(score, highest.score[v]);
          highest.seen[v] |= visible;
          seen |= visible;
          store(to, score);
        }
        scoring.key_is_seen[k] = any(seen);
      }
    });
    return;
  }
  each_section<kN>(tile, first, last, [&](auto count, int vector, int64_t begin, int64_t end) {
    const int lane = vector * kLanes<T>;
    const int64_t inner_first = clamp(tile.inner_first, begin, end), inner_last = clamp(tile.inner_last, inner_first, end);
    const auto finish = [&](auto masked, int64_t from, int64_t to, const Seen<T>* visible) {
      finish_scores<T, count.kValue, masked.kValue != 0>(scale, visible, to - from, scores + (from - first) * kRows<T> + lane,
                                                         highest.score + vector, highest.seen + vector);
    };
    const auto finish_masked = [&](int64_t from, int64_t to) {
      if (from == to) return;
      const Seen<T> visible(lanes, lane, count.kValue * kLanes<T>, from, to);
      finish(Count<1>(), from, to, &visible);
    };
    finish_masked(begin, inner_first);
    if (inner_first < inner_last) finish(Count<0>(), inner_first, inner_last, nullptr);
    finish_masked(inner_last, end);
  });
}

// sums [size][kRows] += over keys [first, last) of weight * value, `weights` [keys][kRows]. What no row of the tile sees is not
// looked at: it may be NaN, and its weight of 0 would not help.
template <class T, int kN>
inline void add_weighted(const Scoring<T>& scoring, const Tile& tile, const Keys<T>& values, int64_t size, int64_t first,
                         int64_t last, const T* weights, [[maybe_unused]] const PairSpace<T>& pairs, T* sums) {
#if defined(ATTNREG_PAIRS)
  if constexpr (sizeof(T) == sizeof(float)) {
    if (values.columns != nullptr) {
      const int64_t block = (first - values.first) / kTermsOfPairs, origin = values.first + block * kTermsOfPairs;
      const int64_t keys = rounded_up(last - origin, kTermsOfPairs);
      const int64_t begin = clamp(tile.both_first, first, last), end = clamp(tile.both_last, begin, last);
      for (int v = 0; v < kN; ++v) {
        const int64_t from = v == 0 ? first : begin, to = kN == 2 && v == 0 ? end : last;
        split_weights(weights + v * kLanes<T>, first - origin, from - origin, to - origin, keys, kRows<T>,
                      pairs.upper + v * kLanes<T>, pairs.lower + v * kLanes<T>);
      }
      add_pairs<kN>(size, keys / kTermsOfPairs, values.columns + block * kTermsOfPairs * size, pairs.upper, pairs.lower,
                    kRows<T>, sums);
      return;
    }
  }
#endif
  each_section<kN>(tile, first, last, [&](auto count, int vector, int64_t section, int64_t section_end) {
    const int lane = vector * kLanes<T>;
    for (int64_t begin = section; begin < section_end;) {
      int64_t end = section_end;
      if (scoring.has_bias) {
        while (begin < end && !scoring.key_is_seen[begin - first]) ++begin;
        end = begin;
        while (end < section_end && scoring.key_is_seen[end - first]) ++end;
        if (begin == end) break;
      }
      multiply<T, count.kValue, Lies::kColumns>(size, end - begin, values.at(begin), values.stride,
                                                weights + (begin - first) * kRows<T> + lane, kRows<T>, sums + lane,
                                                kRows<T>, true);
      begin = end;
    }
  });
}

template <class T>
inline void zero(T* to, int64_t count) {
  memset(static_cast<void*>(to), 0, static_cast<size_t>(count) * sizeof(T));
}

// The rows of a tensor that the next tile will need are fetched into the cache meanwhile. (A call of it, as it has no effect,
// would be left out.)
ATTNREG_INLINE void fetch_ahead(const View& view, Type type, int64_t n, int64_t h, int64_t size, int64_t begin, int64_t count,
                                int64_t length) {
  const int64_t bytes = size * bytes_of(type), stride = view.l * bytes_of(type);
  const char* row = static_cast<const char*>(at(view.data, type, n * view.n + h * view.h + begin * view.l));
  for (int64_t i = 0; i < least(count, length - begin); ++i, row += stride) {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
}

// Into how many parts the keys of a tile are cut, and where a part begins.
inline int64_t parts_of(const Tile& tile) { return (tile.last - tile.first + kKeys - 1) / kKeys; }
inline int64_t part_begin(const Tile& tile, int64_t part, int64_t parts) {
  const int64_t size = (tile.last - tile.first + parts - 1) / (parts > 0 ? parts : 1);
  return least(tile.first + part * size, tile.last);
}

inline int64_t chunks_of(const Sizes& sizes, int64_t rows) { return (sizes.query_length + rows - 1) / rows; }

// A window's slots, as far as there are keys for them.
inline int64_t slots_of(const Sizes& sizes, const Rows& rows) {
  return least(least(rows.left, sizes.key_length) + least(rows.right, sizes.key_length) + 1, sizes.key_length);
}

}  // namespace
}  // namespace attnreg::cpu
