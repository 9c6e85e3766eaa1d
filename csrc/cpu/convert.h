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

template <class T>
inline void widen_halves(const Half* from, int64_t count, T* to) {
  int64_t i = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__)
  if constexpr (sizeof(T) == 4) {
    for (; i + 16 <= count; i += 16) {
      store<T>(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
    }
  }
#elif defined(__F16C__) && defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    for (; i + 8 <= count; i += 8) {
      store<T>(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
  }
#endif
  for (; i < count; ++i) to[i] = static_cast<T>(wide(from[i]));
}

// `count` numbers of a type, `stride` apart.
template <class T>
inline void widen(const void* from, Type type, int64_t stride, int64_t count, T* to) {
  switch (type) {
    case Type::kFloat:
      return widen_span(static_cast<const float*>(from), stride, count, to);
    case Type::kDouble:
      return widen_span(static_cast<const double*>(from), stride, count, to);
    case Type::kBFloat16:
      return widen_span(static_cast<const BFloat16*>(from), stride, count, to);
    case Type::kHalf:
      if (stride == 1) return widen_halves(static_cast<const Half*>(from), count, to);
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
    for (int64_t i = 0; i < count; ++i) narrow(from[i] * scale, to + i);
  } else {
    for (int64_t i = 0; i < count; ++i) narrow(from[i] * scale, to + i * stride);
  }
}

template <class T>
inline void narrow_halves(const T* from, T scale, int64_t count, Half* to) {
  int64_t i = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__)
  if constexpr (sizeof(T) == 4) {
    for (; i + 16 <= count; i += 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtps_ph(load(from + i) * scale, 0));
    }
  }
#elif defined(__F16C__) && defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    for (; i + 8 <= count; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(load(from + i) * scale, 0));
    }
  }
#endif
  for (; i < count; ++i) narrow(from[i] * scale, to + i);
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
      if (stride == 1) return narrow_halves(from, scale, count, static_cast<Half*>(to));
      return narrow_span(from, scale, count, static_cast<Half*>(to), stride);
  }
}

}  // namespace
}  // namespace attnreg::cpu
