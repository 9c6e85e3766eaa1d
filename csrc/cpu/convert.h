// Numbers of every type, to and from the type in which the kernels compute.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace attnreg::cpu {
namespace {

inline int64_t bytes_of(Type type) { return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2; }

// The type in which kernels compute.
template <class T>
constexpr Type kTypeOf = sizeof(T) == 8 ? Type::kDouble : Type::kFloat;

// A number of a type, by its index.
inline void* at(void* data, Type type, int64_t index) { return static_cast<char*>(data) + index * bytes_of(type); }
inline const void* at(const void* data, Type type, int64_t index) {
  return static_cast<const char*>(data) + index * bytes_of(type);
}

inline float float_of_bits(uint32_t bits) {
  float number;
  memcpy(&number, &bits, 4);
  return number;
}
inline uint32_t bits_of_float(float number) {
  uint32_t bits;
  memcpy(&bits, &number, 4);
  return bits;
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

ATTNREG_INLINE double wide(double number) { return number; }
ATTNREG_INLINE float wide(float number) { return number; }
ATTNREG_INLINE float wide(BFloat16 number) { return float_of_bits(static_cast<uint32_t>(number.bits) << 16); }
ATTNREG_INLINE float wide(Half number) {
  const uint32_t sign = static_cast<uint32_t>(number.bits & 0x8000u) << 16, rest = number.bits & 0x7fffu;
  // The exponent of what is left counts from 15, not from 127; a subnormal number is made normal by the product.
  const float size = float_of_bits(rest << 13) * 0x1p112f;
  const uint32_t bits = rest >= 0x7c00u ? 0x7f800000u | (rest & 0x3ffu) << 13 : bits_of_float(size);
  return float_of_bits(bits | sign);
}

ATTNREG_INLINE void narrow(double number, double* to) { *to = number; }
ATTNREG_INLINE void narrow(float number, double* to) { *to = number; }
ATTNREG_INLINE void narrow(double number, float* to) { *to = static_cast<float>(number); }
ATTNREG_INLINE void narrow(float number, float* to) { *to = number; }
ATTNREG_INLINE void narrow(float number, BFloat16* to) {
  const uint32_t bits = bits_of_float(number);
  // To the nearest, of two to the even one.
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
}
ATTNREG_INLINE void narrow(float number, Half* to) {
  const uint32_t bits = bits_of_float(number), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  uint32_t half;
  if (size >= 0x7f800000u) {
    half = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (size >= 0x477ff000u) {  // halfway past the largest
    half = 0x7c00u;
  } else if (size < 0x38800000u) {  // no normal number: the sum has a step of 2^-24
    half = bits_of_float(float_of_bits(size) + 0.5f) - 0x3f000000u;
  } else {
    half = (size + 0xfffu + (size >> 13 & 1u) - 0x38000000u) >> 13;
  }
  to->bits = static_cast<uint16_t>(half | sign);
}
template <class S>
ATTNREG_INLINE void narrow(double number, S* to) {
  narrow(static_cast<float>(number), to);
}

template <class S, class T>
ATTNREG_INLINE void widen_span(const S* from, int64_t stride, int64_t count, T* to) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(wide(from[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(wide(from[i * stride]));
  }
}

// A vector of numbers of 16 bits.
typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t LooseShorts __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

// Whole numbers, in as few instructions as there are.
ATTNREG_INLINE Vector<uint32_t> words_of(Shorts numbers) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<uint32_t>>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(numbers)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector<uint32_t>>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(numbers)));
#else
  return __builtin_convertvector(numbers, Vector<uint32_t>);
#endif
}

ATTNREG_INLINE Shorts shorts_of(Vector<uint32_t> words) {
#if defined(__AVX512F__)
  return reinterpret_cast<Shorts>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(words)));
#elif defined(__AVX2__)
  const __m256i all = reinterpret_cast<__m256i>(words);
  return reinterpret_cast<Shorts>(_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
  return __builtin_convertvector(words, Shorts);
#endif
}

ATTNREG_INLINE Vector<float> widened(Shorts numbers, BFloat16) {
  return reinterpret_cast<Vector<float>>(words_of(numbers) << 16);
}

// The upper halves, rounded to the nearest, of two to the even one; of a NaN anything.
ATTNREG_INLINE Vector<uint32_t> rounded_halves(Vector<float> numbers) {
  const Vector<uint32_t> bits = reinterpret_cast<Vector<uint32_t>>(numbers);
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

ATTNREG_INLINE Shorts narrowed(Vector<float> numbers, BFloat16) {
  const Vector<uint32_t> bits = reinterpret_cast<Vector<uint32_t>>(numbers);
  return shorts_of(numbers == numbers ? rounded_halves(numbers) : bits >> 16 | 0x40u);
}

// Whether numbers of a type are converted a vector at a time.
template <class S>
constexpr bool kHasVectors = false;
template <>
constexpr bool kHasVectors<BFloat16> = true;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define ATTNREG_VECTORS_OF_HALF
ATTNREG_INLINE Vector<float> widened(Shorts numbers, Half) { return _mm512_cvtph_ps(reinterpret_cast<__m256i>(numbers)); }
ATTNREG_INLINE Shorts narrowed(Vector<float> numbers, Half) { return reinterpret_cast<Shorts>(_mm512_cvtps_ph(numbers, 0)); }
#elif defined(__F16C__) && defined(__AVX2__)
#define ATTNREG_VECTORS_OF_HALF
ATTNREG_INLINE Vector<float> widened(Shorts numbers, Half) { return _mm256_cvtph_ps(reinterpret_cast<__m128i>(numbers)); }
ATTNREG_INLINE Shorts narrowed(Vector<float> numbers, Half) { return reinterpret_cast<Shorts>(_mm256_cvtps_ph(numbers, 0)); }
#endif
#if defined(ATTNREG_VECTORS_OF_HALF)
template <>
constexpr bool kHasVectors<Half> = true;
#endif

// A vector of numbers of any type that has vectors.
template <class T, class S>
ATTNREG_INLINE Vector<T> load_as(const S* from) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return load(from);
  } else {
    return widened(*reinterpret_cast<const LooseShorts*>(from), S());
  }
}

template <class S>
ATTNREG_INLINE void store_shorts(S* to, Shorts numbers) {
  *reinterpret_cast<LooseShorts*>(to) = numbers;
}

// Two vectors side by side. As a rule neither holds a NaN.
ATTNREG_INLINE void store_two(BFloat16* to, Vector<float> a, Vector<float> b) {
  constexpr int lanes = kLanes<float>;
  if (any((a != a) | (b != b))) {
    store_shorts(to, narrowed(a, BFloat16()));
    store_shorts(to + lanes, narrowed(b, BFloat16()));
    return;
  }
  const Vector<uint32_t> first = rounded_halves(a), second = rounded_halves(b);
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(first), reinterpret_cast<__m256i>(second));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
#else
  store_shorts(to, shorts_of(first));
  store_shorts(to + lanes, shorts_of(second));
#endif
}
#if defined(ATTNREG_VECTORS_OF_HALF)
ATTNREG_INLINE void store_two(Half* to, Vector<float> a, Vector<float> b) {
  store_shorts(to, narrowed(a, Half()));
  store_shorts(to + kLanes<float>, narrowed(b, Half()));
}
#endif

// The first `count` of them; fewer than a vector has.
template <class S>
ATTNREG_INLINE void store_some_shorts(S* to, Shorts numbers, int count) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1u), reinterpret_cast<__m256i>(numbers));
#else
  for (int i = 0; i < count; ++i) to[i].bits = numbers[i];
#endif
}

// Numbers of 16 bits that lie side by side.
template <class S>
ATTNREG_INLINE void widen_shorts(const S* from, int64_t count, float* to) {
  constexpr int64_t lanes = kLanes<float>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load_as<float>(from + i));
  if (i == count) return;
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  const __mmask16 rest = static_cast<__mmask16>((1u << (count - i)) - 1u);
  const Shorts numbers = reinterpret_cast<Shorts>(_mm256_maskz_loadu_epi16(rest, from + i));
  _mm512_mask_storeu_ps(to + i, rest, widened(numbers, S()));
#else
  // The last vector may take some a second time.
  if (count >= lanes) return store(to + count - lanes, load_as<float>(from + count - lanes));
  widen_span(from + i, 1, count - i, to + i);
#endif
}

template <class S>
ATTNREG_INLINE void narrow_shorts(const float* from, float scale, int64_t count, S* to) {
  constexpr int64_t lanes = kLanes<float>;
  int64_t i = 0;
  const auto vector = [&](int64_t place) { return load(from + place) * scale; };
  for (; i + 2 * lanes <= count; i += 2 * lanes) store_two(to + i, vector(i), vector(i + lanes));
  for (; i + lanes <= count; i += lanes) store_shorts(to + i, narrowed(vector(i), S()));
  if (i == count) return;
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  const __mmask16 rest = static_cast<__mmask16>((1u << (count - i)) - 1u);
  const Vector<float> numbers = _mm512_maskz_loadu_ps(rest, from + i);
  store_some_shorts(to + i, narrowed(numbers * scale, S()), static_cast<int>(count - i));
#else
  if (count >= lanes) return store_shorts(to + count - lanes, narrowed(vector(count - lanes), S()));
  for (; i < count; ++i) narrow(from[i] * scale, to + i);
#endif
}

// Rows of numbers that lie side by side, `row` and `to_row` from one to the next.
template <class S, class T>
inline void widen_rows(const S* from, int64_t row, int64_t rows, int64_t count, T* to, int64_t to_row) {
  if (row == count && to_row == count) {
    row = to_row = count *= rows;
    rows = count > 0;
  }
  for (int64_t i = 0; i < rows; ++i, from += row, to += to_row) {
    if constexpr (kHasVectors<S> && sizeof(T) == sizeof(float)) {
      widen_shorts(from, count, to);
    } else {
      widen_span(from, 1, count, to);
    }
  }
}

template <class T>
inline void widen_rows(const void* from, Type type, int64_t row, int64_t rows, int64_t count, T* to, int64_t to_row) {
  switch (type) {
    case Type::kFloat:
      return widen_rows(static_cast<const float*>(from), row, rows, count, to, to_row);
    case Type::kDouble:
      return widen_rows(static_cast<const double*>(from), row, rows, count, to, to_row);
    case Type::kBFloat16:
      return widen_rows(static_cast<const BFloat16*>(from), row, rows, count, to, to_row);
    case Type::kHalf:
      return widen_rows(static_cast<const Half*>(from), row, rows, count, to, to_row);
  }
}

// `count` numbers of a type, `stride` apart.
template <class T>
inline void widen(const void* from, Type type, int64_t stride, int64_t count, T* to) {
  if (stride == 1) return widen_rows(from, type, count, 1, count, to, count);
  switch (type) {
    case Type::kFloat:
      return widen_span(static_cast<const float*>(from), stride, count, to);
    case Type::kDouble:
      return widen_span(static_cast<const double*>(from), stride, count, to);
    case Type::kBFloat16:
      return widen_span(static_cast<const BFloat16*>(from), stride, count, to);
    case Type::kHalf:
      return widen_span(static_cast<const Half*>(from), stride, count, to);
  }
}

template <class T>
inline T widen_one(const Numbers& numbers, int64_t index) {
  T number = 0;
  widen(at(numbers.data, numbers.type, index * numbers.stride), numbers.type, 1, 1, &number);
  return number;
}

template <class S, class T>
ATTNREG_INLINE void narrow_span(const T* from, T scale, int64_t count, S* to, int64_t stride) {
  if (stride == 1) {
    if constexpr (kHasVectors<S> && sizeof(T) == sizeof(float)) {
      narrow_shorts(from, scale, count, to);
    } else {
      for (int64_t i = 0; i < count; ++i) narrow(from[i] * scale, to + i);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) narrow(from[i] * scale, to + i * stride);
  }
}

// The same back, times `scale`.
template <class T>
inline void narrow_to(const T* from, T scale, int64_t count, void* to, Type type, int64_t stride = 1) {
  switch (type) {
    case Type::kFloat:
      return narrow_span(from, scale, count, static_cast<float*>(to), stride);
    case Type::kDouble:
      return narrow_span(from, scale, count, static_cast<double*>(to), stride);
    case Type::kBFloat16:
      return narrow_span(from, scale, count, static_cast<BFloat16*>(to), stride);
    case Type::kHalf:
      return narrow_span(from, scale, count, static_cast<Half*>(to), stride);
  }
}

template <class T>
inline void narrow_rows(const T* from, int64_t from_row, T scale, int64_t rows, int64_t count, void* to, Type type, int64_t row) {
  if (row == count && from_row == count) return narrow_to(from, scale, rows * count, to, type);
  for (int64_t i = 0; i < rows; ++i) narrow_to(from + i * from_row, scale, count, at(to, type, i * row), type);
}

}  // namespace
}  // namespace attnreg::cpu
