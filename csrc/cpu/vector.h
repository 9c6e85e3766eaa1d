// Vectors of the instruction set that a file is compiled for, in the compiler's own vector types.
//
// A vector holds kLanes<T> numbers. A comparison gives integers of all bits where it holds, and `mask ? a : b` chooses by them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace attnreg::cpu {
namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
constexpr int kVectorBytes = 64;
// Rows of a block of sums that stay in registers, each of two vectors.
constexpr int kBlock = 12;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kVectorBytes = 32;
constexpr int kBlock = 6;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kBlock = 12;
#else
constexpr int kVectorBytes = 16;
constexpr int kBlock = 6;
#endif

template <class T>
struct VectorOf {
  typedef T Type __attribute__((vector_size(kVectorBytes)));
  typedef T Loose __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::Type;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// The integers as wide as a number.
template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using Type = int32_t;
};
template <>
struct IntegerOf<double> {
  using Type = int64_t;
};
template <class T>
using Integer = typename IntegerOf<T>::Type;
template <class T>
using Mask = Vector<Integer<T>>;

#define ATTNREG_INLINE inline __attribute__((always_inline))

// From memory that need not be aligned.
template <class T>
ATTNREG_INLINE Vector<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::Loose*>(from);
}

template <class T>
ATTNREG_INLINE void store(T* to, Vector<T> vector) {
  *reinterpret_cast<typename VectorOf<T>::Loose*>(to) = vector;
}

template <class T>
ATTNREG_INLINE Vector<T> all(T value) {
  return value - Vector<T>{};
}

// a * b + c, rounded once where the processor can.
template <class V>
ATTNREG_INLINE V multiply_add(V a, V b, V c) {
  return a * b + c;
}
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
template <>
ATTNREG_INLINE Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
  return _mm512_fmadd_ps(a, b, c);
}
template <>
ATTNREG_INLINE Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
  return _mm512_fmadd_pd(a, b, c);
}
#elif defined(__AVX2__) && defined(__FMA__)
template <>
ATTNREG_INLINE Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
  return _mm256_fmadd_ps(a, b, c);
}
template <>
ATTNREG_INLINE Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
  return _mm256_fmadd_pd(a, b, c);
}
#elif defined(__aarch64__)
template <>
ATTNREG_INLINE Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
template <>
ATTNREG_INLINE Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
  return (Vector<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#endif

// Whether a mask holds anywhere.
template <class M>
ATTNREG_INLINE bool any(M mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8(reinterpret_cast<__m256i>(mask)) != 0;
#else
  typedef long long Words __attribute__((vector_size(kVectorBytes)));
  const Words words = reinterpret_cast<Words>(mask);
  long long found = 0;
#pragma GCC unroll 8
  for (int i = 0; i < kVectorBytes / 8; ++i) found |= words[i];
  return found != 0;
#endif
}

template <class V>
ATTNREG_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

// The limits of a type, without the templates of the standard library.
template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float kLargest = __FLT_MAX__, kSmallest = __FLT_MIN__, kInfinity = __builtin_huge_valf();
};
template <>
struct Limits<double> {
  static constexpr double kLargest = __DBL_MAX__, kSmallest = __DBL_MIN__, kInfinity = __builtin_huge_val();
};

// Vectors a and b, whose lanes in steps of kStep are exchanged: of b's even steps and a's odd ones.
template <class T, int kStep>
ATTNREG_INLINE void exchange(Vector<T>& a, Vector<T>& b) {
  constexpr int lanes = kLanes<T>;
  Mask<T> first, second;
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    first[i] = i & kStep ? lanes + (i ^ kStep) : i;
    second[i] = i & kStep ? lanes + i : i ^ kStep;
  }
#ifdef __clang__
  Vector<T> c, d;
#pragma clang loop unroll(full)
  for (int i = 0; i < lanes; ++i) {
    c[i] = i & kStep ? b[i ^ kStep] : a[i];
    d[i] = i & kStep ? b[i] : a[i ^ kStep];
  }
#else
  const Vector<T> c = __builtin_shuffle(a, b, first), d = __builtin_shuffle(a, b, second);
#endif
  a = c;
  b = d;
}

template <class T, int kStep>
ATTNREG_INLINE void exchange_all(Vector<T>* rows) {
  constexpr int lanes = kLanes<T>;
  if constexpr (kStep < lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (!(i & kStep)) exchange<T, kStep>(rows[i], rows[i + kStep]);
    }
    exchange_all<T, 2 * kStep>(rows);
  }
}

// to[j][i] = from[i][j], as many numbers each way as a vector has.
template <class T>
__attribute__((noinline)) void transpose_block(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  constexpr int lanes = kLanes<T>;
  Vector<T> rows[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) rows[i] = load(from + i * from_stride);
  exchange_all<T, 1>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) store(to + i * to_stride, rows[i]);
}

// The same of any multiples of that.
template <class T>
inline void transpose(int64_t rows, int64_t columns, const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  constexpr int lanes = kLanes<T>;
  for (int64_t j = 0; j < columns; j += lanes) {
    for (int64_t i = 0; i < rows; i += lanes) {
      transpose_block<T>(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    }
  }
}

inline int64_t rounded_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

}  // namespace
}  // namespace attnreg::cpu
