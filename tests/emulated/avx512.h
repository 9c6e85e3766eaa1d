// The intrinsics of AVX-512 that csrc/cpu uses, in those of AVX2 and in vectors of the compiler: included first by the files that
// are compiled for AVX-512, so that their code runs on processors without it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1

namespace emulated {
namespace {

template <class To, class From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class Element, int kCount>
struct Array {
  Element at[kCount];
};

// The halves of a vector.
template <class Half, class Whole>
struct Halves {
  Half low, high;
  explicit Halves(Whole whole) { memcpy(this, &whole, sizeof(*this)); }
};

inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const Halves<__m256, __m512> x(a), y(b), z(c);
  return as<__m512>(Array<__m256, 2>{_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)});
}

inline __m512d fmadd_pd(__m512d a, __m512d b, __m512d c) {
  const Halves<__m256d, __m512d> x(a), y(b), z(c);
  return as<__m512d>(Array<__m256d, 2>{_mm256_fmadd_pd(x.low, y.low, z.low), _mm256_fmadd_pd(x.high, y.high, z.high)});
}

inline __m512i mul_epu32(__m512i a, __m512i b) {
  const Halves<__m256i, __m512i> x(a), y(b);
  return as<__m512i>(Array<__m256i, 2>{_mm256_mul_epu32(x.low, y.low), _mm256_mul_epu32(x.high, y.high)});
}

inline __m512i set1_epi64(long long number) {
  return as<__m512i>(Array<__m256i, 2>{_mm256_set1_epi64x(number), _mm256_set1_epi64x(number)});
}

inline __m512i cvtepu16_epi32(__m256i numbers) {
  const Halves<__m128i, __m256i> halves(numbers);
  return as<__m512i>(Array<__m256i, 2>{_mm256_cvtepu16_epi32(halves.low), _mm256_cvtepu16_epi32(halves.high)});
}

inline __m256i cvtepi32_epi16(__m512i words) {
  const auto wide = as<Array<uint32_t, 16>>(words);
  Array<uint16_t, 16> narrow;
  for (int i = 0; i < 16; ++i) narrow.at[i] = static_cast<uint16_t>(wide.at[i]);
  return as<__m256i>(narrow);
}

inline __m512 cvtph_ps(__m256i numbers) {
  const Halves<__m128i, __m256i> halves(numbers);
  return as<__m512>(Array<__m256, 2>{_mm256_cvtph_ps(halves.low), _mm256_cvtph_ps(halves.high)});
}

inline __m256i cvtps_ph(__m512 numbers, int) {
  const Halves<__m256, __m512> halves(numbers);
  return as<__m256i>(Array<__m128i, 2>{_mm256_cvtps_ph(halves.low, 0), _mm256_cvtps_ph(halves.high, 0)});
}

inline __mmask16 test_epi32_mask(__m512i a, __m512i b) {
  const __m512i both = a & b;
  uint32_t words[16];
  memcpy(words, &both, sizeof(words));
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) {
    if (words[i] != 0) mask |= 1u << i;
  }
  return static_cast<__mmask16>(mask);
}

// Of the elements of the mask, as the processor does: the others are neither read nor written.
template <class Element, int kCount, class Vector>
inline Vector masked_load(unsigned mask, const void* from) {
  Array<Element, kCount> found = {};
  for (int i = 0; i < kCount; ++i) {
    if (mask >> i & 1u) memcpy(&found.at[i], static_cast<const char*>(from) + i * sizeof(Element), sizeof(Element));
  }
  return as<Vector>(found);
}

template <class Element, int kCount, class Vector>
inline void masked_store(void* to, unsigned mask, Vector vector) {
  const auto all = as<Array<Element, kCount>>(vector);
  for (int i = 0; i < kCount; ++i) {
    if (mask >> i & 1u) memcpy(static_cast<char*>(to) + i * sizeof(Element), &all.at[i], sizeof(Element));
  }
}

}  // namespace
}  // namespace emulated

#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_fmadd_pd emulated::fmadd_pd
#define _mm512_mul_epu32 emulated::mul_epu32
#define _mm512_set1_epi64 emulated::set1_epi64
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph emulated::cvtps_ph
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_test_epi32_mask emulated::test_epi32_mask
#define _mm512_maskz_loadu_ps(mask, from) emulated::masked_load<float, 16, __m512>(mask, from)
#define _mm256_maskz_loadu_epi16(mask, from) emulated::masked_load<uint16_t, 16, __m256i>(mask, from)
#define _mm512_mask_storeu_ps(to, mask, vector) emulated::masked_store<float, 16>(to, mask, vector)
#define _mm512_mask_storeu_pd(to, mask, vector) emulated::masked_store<double, 8>(to, mask, vector)
#define _mm256_mask_storeu_epi16(to, mask, vector) emulated::masked_store<uint16_t, 16>(to, mask, vector)
