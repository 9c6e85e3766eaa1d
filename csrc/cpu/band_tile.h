// The dense product that bands are cut from or made into: a few rows against vectors of columns, sums in registers.
#pragma once

#include "vector.h"

namespace attnreg::cpu {
namespace {

// Rows of a tile, and vectors: so many sums stay in registers.
constexpr int64_t kRowsOfTile = 6;
constexpr int64_t kVectorsOfTile = 4;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// c[m][vectors] (+)= sum over k of a(m, k) * b[k][vectors], M rows and N vectors of c.
template <class T, int M, int N>
__attribute__((noinline)) void add_tile(int64_t terms, const T* a, int64_t a_row, int64_t a_term, const T* b, int64_t b_row,
                                        T* c, int64_t c_row, bool add) {
  Vector<T> sums[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[m][n] = add ? load(c + m * c_row + n * kLanes<T>) : Vector<T>{};
  }
  for (int64_t k = 0; k < terms; ++k) {
    Vector<T> right[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) right[n] = load(b + n * kLanes<T>);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vector<T> left = all(a[m * a_row]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n] = multiply_add(left, right[n], sums[m][n]);
    }
    a += a_term;
    b += b_row;
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(c + m * c_row + n * kLanes<T>, sums[m][n]);
  }
}

template <class T, int M>
inline void add_rows(int64_t vectors, int64_t terms, const T* a, int64_t a_row, int64_t a_term, const T* b, int64_t b_row,
                     T* c, int64_t c_row, bool add) {
  // As even as can be: 5 vectors are 3 and 2.
  for (int64_t pieces = ceil_div(vectors, kVectorsOfTile); pieces > 0; --pieces) {
    const int64_t some = ceil_div(vectors, pieces);
    switch (some) {
      case 1:
        add_tile<T, M, 1>(terms, a, a_row, a_term, b, b_row, c, c_row, add);
        break;
      case 2:
        add_tile<T, M, 2>(terms, a, a_row, a_term, b, b_row, c, c_row, add);
        break;
      case 3:
        add_tile<T, M, 3>(terms, a, a_row, a_term, b, b_row, c, c_row, add);
        break;
      default:
        add_tile<T, M, 4>(terms, a, a_row, a_term, b, b_row, c, c_row, add);
    }
    vectors -= some;
    b += some * kLanes<T>;
    c += some * kLanes<T>;
  }
}

// The same for up to kRowsOfTile rows of any number of vectors.
template <class T>
inline void add_product(int64_t rows, int64_t vectors, int64_t terms, const T* a, int64_t a_row, int64_t a_term, const T* b,
                        int64_t b_row, T* c, int64_t c_row, bool add) {
  if (rows == kRowsOfTile) return add_rows<T, kRowsOfTile>(vectors, terms, a, a_row, a_term, b, b_row, c, c_row, add);
  if (rows >= 3) {
    add_rows<T, 3>(vectors, terms, a, a_row, a_term, b, b_row, c, c_row, add);
    a += 3 * a_row;
    c += 3 * c_row;
    rows -= 3;
  }
  for (; rows > 0; --rows) {
    add_rows<T, 1>(vectors, terms, a, a_row, a_term, b, b_row, c, c_row, add);
    a += a_row;
    c += c_row;
  }
}

}  // namespace
}  // namespace attnreg::cpu
