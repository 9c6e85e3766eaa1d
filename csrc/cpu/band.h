// Bands: a number for each row and each slot of its window, read and written as tensors hold them.
//
// What lies in a hidden slot, or in a key or a row that is not seen at all, is never used.
#pragma once

#include "band_tile.h"
#include "convert.h"
#include "kernels.h"
#include "rows.h"
#include "scratch.h"
#include "vector.h"

namespace attnreg::cpu {
namespace {

// Rows of a unit, keys that are read together, keys whose weights are, and keys of a unit of average_to_keys.
constexpr int64_t kRowsOfUnit = 256;
constexpr int64_t kKeysAtOnce = 256;
constexpr int64_t kKeysOfGroup = 4 * kRowsOfTile;
constexpr int64_t kKeysOfUnit = 10 * kKeysOfGroup;

// One product of a band, rows and keys, of which one is made of the two others.
struct Band {
  Sizes sizes;  // head_dim is that of rows and keys
  Type type;
  const Rows* window;
  double scale = 1.0;
  View band, rows, keys;
  Bias bias;
  double hidden = 0.0;  // what multiply_to_band writes into hidden slots

  int64_t group() const { return sizes.heads / sizes.kv_heads; }
  int64_t slots() const { return window->left + window->right + 1; }
};

// Calls `run` with a zero of the type that numbers of this one are computed in.
template <class Run>
inline void in_accumulator(Type type, const Run& run) {
  if (type == Type::kDouble) {
    run(0.0);
  } else {
    run(0.0f);
  }
}

// About how many multiplications a product makes, a row's own cost among them.
inline double operations_of(const Sizes& sizes, const Rows& window) {
  const int64_t slots = least(window.left, sizes.key_length) + least(window.right, sizes.key_length) + 1;
  const double rows = static_cast<double>(sizes.batch) * sizes.heads * sizes.query_length;
  return rows * (least(slots, sizes.key_length) + kSlotsOfARow) * sizes.head_dim;
}

inline int64_t units_of_rows(const Sizes& sizes) {
  return sizes.batch * sizes.kv_heads * ceil_div(sizes.query_length, kRowsOfUnit);
}

inline int64_t units_of_keys(const Sizes& sizes) {
  return sizes.batch * sizes.kv_heads * ceil_div(sizes.key_length, kKeysOfUnit);
}

inline int64_t place_of(const View& view, int64_t n, int64_t h, int64_t l) { return n * view.n + h * view.h + l * view.l; }

template <class T>
inline int64_t whole_vectors(int64_t width) {
  return rounded_up(width, kLanes<T>);
}

// Rows of a tensor as vectors of T can read them: where they lie, or a copy whose rows are padded with zeros.
template <class T>
struct Operand {
  const T* data;
  int64_t row;
};

// Whether rows of this width can be read where they lie.
template <class T>
inline bool lies_ready(Type type, int64_t width) {
  return type == kTypeOf<T> && width % kLanes<T> == 0;
}

// Whether rows of this width are whole vectors, to be read and written one at a time as the tensor has them.
template <class T>
inline bool has_whole_vectors(Type type, int64_t width) {
  const bool converts = sizeof(T) == sizeof(float) && (type == Type::kBFloat16 || (type == Type::kHalf && kHasVectors<Half>));
  return width % kLanes<T> == 0 && (type == kTypeOf<T> || converts);
}

// Calls `run` with a pointer to what such rows hold.
template <class T, class Run>
ATTNREG_INLINE void with_numbers(void* data, Type type, const Run& run) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (type == Type::kBFloat16) return run(static_cast<BFloat16*>(data));
    if constexpr (kHasVectors<Half>) {
      if (type == Type::kHalf) return run(static_cast<Half*>(data));
    }
  }
  run(static_cast<T*>(data));
}

template <class T>
inline Operand<T> operand(const View& view, Type type, int64_t n, int64_t h, int64_t first, int64_t count, int64_t width,
                          T* copy) {
  const int64_t start = place_of(view, n, h, first);
  if (lies_ready<T>(type, width)) return {static_cast<const T*>(view.data) + start, view.l};
  const int64_t padded = whole_vectors<T>(width);
  widen_rows(at(view.data, type, start), type, view.l, count, width, copy, padded);
  for (int64_t l = 0; l < count && width < padded; ++l) {
    for (int64_t e = width; e < padded; ++e) copy[l * padded + e] = 0;
  }
  return {copy, padded};
}

// `count` numbers of the bias of row i, from a slot on. None but -inf becomes -inf, which hides.
template <class T>
inline void read_bias(const Bias& bias, int64_t n, int64_t h, int64_t i, int64_t slot, int64_t count, T* to) {
  const void* const from = at(bias.data, bias.type, n * bias.n + h * bias.h + i * bias.l + slot * bias.w);
  widen(from, bias.type, bias.w, count, to);
  if (sizeof(T) == sizeof(double) || bias.type != Type::kDouble) return;
  const double* const wider = static_cast<const double*>(from);
  for (int64_t c = 0; c < count; ++c) {
    if (to[c] == -Limits<T>::kInfinity && wider[c * bias.w] != -Limits<double>::kInfinity) to[c] = -Limits<T>::kLargest;
  }
}

// `count` weights of row i from the key `low` on, 0 where the bias hides; `seen` is set where it does not.
template <class T>
inline void read_weights(const Band& call, int64_t n, int64_t h, int64_t i, const Place& place, int64_t low, int64_t count,
                         T* bias, T* to, uint8_t* seen) {
  const int64_t slot = low - place.origin;
  widen(at(call.band.data, call.type, place_of(call.band, n, h, i) + slot), call.type, 1, count, to);
  if (call.bias.data == nullptr) return;
  read_bias<T>(call.bias, n, h, i, slot, count, bias);
  for (int64_t c = 0; c < count; ++c) {
    const bool hidden = bias[c] == -Limits<T>::kInfinity;
    if (hidden) to[c] = 0;
    seen[c] |= !hidden;
  }
}

// Rows of sums, scaled, as the tensor has them.
template <class T>
inline void write_sums(const Band& call, const View& view, int64_t n, int64_t h, int64_t first, int64_t count, T* sums,
                       int64_t padded) {
  const int64_t width = call.sizes.head_dim;
  const T scale = static_cast<T>(call.scale);
  narrow_rows(sums, padded, scale, count, width, at(view.data, call.type, place_of(view, n, h, first)), call.type, view.l);
}

// Writing a band

inline double lowest_of(Type type) {
  switch (type) {
    case Type::kDouble:
      return -Limits<double>::kLargest;
    case Type::kBFloat16:
      return wide(BFloat16{0xff7f});
    case Type::kHalf:
      return -65504.0;
    default:
      return -Limits<float>::kLargest;
  }
}

// What a visible score is at least, so that it is not taken for a hidden one.
template <class T>
inline T lowest_score(const Band& call) {
  return call.hidden == 0.0 ? -Limits<T>::kInfinity : static_cast<T>(lowest_of(call.type));
}

// `count` times what a hidden slot holds.
template <class S>
inline void fill_span(S* to, int64_t count, double hidden) {
  S value;
  narrow(hidden, &value);
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

inline void fill_slots(const Band& call, int64_t first, int64_t count) {
  if (count <= 0) return;
  void* const to = at(call.band.data, call.type, first);
  switch (call.type) {
    case Type::kFloat:
      return fill_span(static_cast<float*>(to), count, call.hidden);
    case Type::kDouble:
      return fill_span(static_cast<double*>(to), count, call.hidden);
    case Type::kBFloat16:
      return fill_span(static_cast<BFloat16*>(to), count, call.hidden);
    case Type::kHalf:
      return fill_span(static_cast<Half*>(to), count, call.hidden);
  }
}

// The first `count` numbers of a vector; fewer than it has.
template <class T>
ATTNREG_INLINE void store_some(T* to, Vector<T> vector, int count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1u), (__m512)vector);
  } else {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << count) - 1u), (__m512d)vector);
  }
#else
  for (int i = 0; i < count; ++i) to[i] = vector[i];
#endif
}

// As numbers of another type; `count` may be all of the vector's.
template <class T, class S>
ATTNREG_INLINE void store_as(S* to, Vector<T> vector, int count) {
  if constexpr (sizeof(S) == sizeof(T)) {
    if (count == kLanes<T>) {
      store(to, vector);
    } else {
      store_some(to, vector, count);
    }
  } else if constexpr (kHasVectors<S> && sizeof(T) == sizeof(float)) {
    const Shorts numbers = narrowed(vector, S());
    if (count == kLanes<T>) {
      store_shorts(to, numbers);
    } else {
      store_some_shorts(to, numbers, count);
    }
  } else {
    for (int i = 0; i < count; ++i) narrow(vector[i], to + i);
  }
}

// Scores of a tile's row, for the slots from `slot` on.
template <class T, class S>
inline void finish_scores(const Band& call, int64_t count, const T* from, const T* bias, T lowest, S* to) {
  const T scale = static_cast<T>(call.scale);
  const T hidden = static_cast<T>(call.hidden);
  int64_t c = 0;
  const Vector<T> below = all(lowest);
  for (; c < count; c += kLanes<T>) {
    Vector<T> score = load(from + c) * all(scale);
    if (bias != nullptr) {
      const Vector<T> added = load(bias + c);
      score += added;
      score = score < below ? below : score;
      score = added == all(-Limits<T>::kInfinity) ? all(hidden) : score;
    } else {
      score = score < below ? below : score;
    }
    store_as<T>(to + c, score, static_cast<int>(least(count - c, kLanes<T>)));
  }
}

template <class T>
inline void finish_scores(const Band& call, int64_t count, const T* from, const T* bias, T lowest, int64_t place) {
  void* const to = at(call.band.data, call.type, place);
  switch (call.type) {
    case Type::kFloat:
      return finish_scores(call, count, from, bias, lowest, static_cast<float*>(to));
    case Type::kDouble:
      return finish_scores(call, count, from, bias, lowest, static_cast<double*>(to));
    case Type::kBFloat16:
      return finish_scores(call, count, from, bias, lowest, static_cast<BFloat16*>(to));
    case Type::kHalf:
      return finish_scores(call, count, from, bias, lowest, static_cast<Half*>(to));
  }
}

// Scores of row i for the keys [low, high), to where they belong.
template <class T>
inline void finish_row(const Band& call, int64_t n, int64_t h, int64_t i, const Place& place, int64_t low, int64_t high,
                       const T* scores, T* bias, T lowest) {
  if (low >= high) return;
  const int64_t slot = low - place.origin;
  const T* added = nullptr;
  if (call.bias.data != nullptr) {
    read_bias<T>(call.bias, n, h, i, slot, high - low, bias);
    added = bias;
  }
  finish_scores<T>(call, high - low, scores, added, lowest, place_of(call.band, n, h, i) + slot);
}

}  // namespace
}  // namespace attnreg::cpu
