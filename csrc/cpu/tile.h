// Products of small matrices: what everything here is made of.
//
//   C[m][lanes] (+)= sum over k of A(m, k) * B[k][lanes]
//
// A's elements are broadcast from where they lie, B's and C's rows are vectors. The sum of one element is always made in the
// order of k, whatever block it falls into: two products of the same numbers are the same bits.
#pragma once

#include "vector.h"

namespace attnreg::cpu {
namespace {

// How A lies: element (m, k) at m * stride + k, at m + k * stride, or at m * kStep + k.
enum class Lies { kRows, kColumns, kStepped };

// kM rows of C, kN vectors each.
template <class T, int kM, int kN, Lies kLies, int kStep>
ATTNREG_INLINE void multiply_block(int64_t terms, const T* a, int64_t stride, const T* b, int64_t b_stride, T* c,
                                   int64_t c_stride, bool add) {
  constexpr int lanes = kLanes<T>;
  Vector<T> sums[kM][kN];
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) sums[m][n] = Vector<T>{};
  // Three rows off each pointer: more of them do not fit into the registers.
  const T* rows[(kM + 2) / 3];
#pragma GCC unroll 16
  for (int m = 0; m < (kM + 2) / 3; ++m) rows[m] = a + 3 * m * stride;
  for (int64_t k = 0; k < terms; ++k) {
    Vector<T> right[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) right[n] = load(b + n * lanes);
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
      T left;
      if constexpr (kLies == Lies::kRows) {
        left = rows[m / 3][(m % 3) * stride + k];
      } else if constexpr (kLies == Lies::kColumns) {
        left = a[m];
      } else {
        left = a[m * kStep];
      }
      const Vector<T> everywhere = all(left);
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) sums[m][n] = multiply_add(everywhere, right[n], sums[m][n]);
    }
    b += b_stride;
    if constexpr (kLies == Lies::kColumns) a += stride;
    if constexpr (kLies == Lies::kStepped) ++a;
  }
  // Added here, not first: the error of a sum grows with the terms that are added one after the other.
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      T* const to = c + m * c_stride + n * lanes;
      store(to, add ? load(to) + sums[m][n] : sums[m][n]);
    }
}

template <class T, int kN, Lies kLies, int kStep, int kM = kBlock>
__attribute__((noinline)) void multiply_rows(int rows, int64_t terms, const T* a, int64_t stride, const T* b,
                                             int64_t b_stride, T* c, int64_t c_stride, bool add) {
  if (rows == kM) {
    multiply_block<T, kM, kN, kLies, kStep>(terms, a, stride, b, b_stride, c, c_stride, add);
    return;
  }
  if constexpr (kM > 1) {
    multiply_rows<T, kN, kLies, kStep, kM - 1>(rows, terms, a, stride, b, b_stride, c, c_stride, add);
  }
}

// `rows` rows of C of `kN` vectors each, as even blocks as can be; at most `at_once` terms are added one after the other.
template <class T, int kN, Lies kLies, int kStep = 1>
inline void multiply(int64_t rows, int64_t terms, const T* a, int64_t stride, const T* b, int64_t b_stride, T* c,
                     int64_t c_stride, bool add, int64_t at_once = INT64_MAX) {
  int64_t blocks = (rows + kBlock - 1) / kBlock;
  while (rows > 0) {
    const int block = static_cast<int>((rows + blocks - 1) / blocks);
    for (int64_t k = 0; k < terms; k += at_once) {
      const int64_t some = terms - k < at_once ? terms - k : at_once;
      const T* const from = a + (kLies == Lies::kColumns ? k * stride : k);
      multiply_rows<T, kN, kLies, kStep>(block, some, from, stride, b + k * b_stride, b_stride, c, c_stride, add || k > 0);
      if (some == terms) break;
    }
    const int64_t row = kLies == Lies::kRows ? stride : kLies == Lies::kColumns ? 1 : kStep;
    a += block * row;
    c += block * c_stride;
    rows -= block;
    --blocks;
  }
}

}  // namespace
}  // namespace attnreg::cpu
