// Products of bfloat16 numbers by the processor's matrix unit (AMX), which sums them in float: for files that ask for it.
//
// Numbers go in pairs, that lie side by side in 32 bits. A sum's bits do not depend on the block that it falls into.
#pragma once

#include "convert.h"
#include "kernels.h"
#include "matrix_unit.h"
#include "vector.h"

namespace attnreg::cpu {
namespace {

#if defined(ATTNREG_PAIRS)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// Rows of a block, and terms that are added in one instruction.
constexpr int64_t kRowsOfPairs = 16, kTermsOfPairs = 32;

// Whether rows of this type and size are multiplied in pairs.
template <class T>
inline bool goes_in_pairs(Type type, int64_t size) {
  return kHasPairs && sizeof(T) == sizeof(float) && type == Type::kBFloat16 && size % kTermsOfPairs == 0 && size > 0;
}

#if defined(ATTNREG_PAIRS)
// C [16 * kM][16 * kN] = A [16 * kM][terms] * B, of which B holds [terms / 2][b_row] pairs; strides in elements.
template <int kM, int kN>
ATTNREG_INLINE void multiply_pairs_block(int64_t terms, const BFloat16* a, int64_t a_row, const float* b, int64_t b_row, float* c,
                                         int64_t c_row) {
  ATTNREG_PAIRS_ZERO(0);
  if constexpr (kN == 2) ATTNREG_PAIRS_ZERO(1);
  if constexpr (kM == 2) ATTNREG_PAIRS_ZERO(2);
  if constexpr (kM == 2 && kN == 2) ATTNREG_PAIRS_ZERO(3);
  for (int64_t k = 0; k < terms; k += kTermsOfPairs) {
    ATTNREG_PAIRS_LOAD(6, b + k / 2 * b_row, b_row * 4);
    if constexpr (kN == 2) ATTNREG_PAIRS_LOAD(7, b + k / 2 * b_row + kLanes<float>, b_row * 4);
    ATTNREG_PAIRS_LOAD(4, a + k, a_row * 2);
    ATTNREG_PAIRS_ADD(0, 4, 6);
    if constexpr (kN == 2) ATTNREG_PAIRS_ADD(1, 4, 7);
    if constexpr (kM == 2) {
      ATTNREG_PAIRS_LOAD(5, a + kRowsOfPairs * a_row + k, a_row * 2);
      ATTNREG_PAIRS_ADD(2, 5, 6);
      if constexpr (kN == 2) ATTNREG_PAIRS_ADD(3, 5, 7);
    }
  }
  ATTNREG_PAIRS_STORE(0, c, c_row * 4);
  if constexpr (kN == 2) ATTNREG_PAIRS_STORE(1, c + kLanes<float>, c_row * 4);
  if constexpr (kM == 2) ATTNREG_PAIRS_STORE(2, c + kRowsOfPairs * c_row, c_row * 4);
  if constexpr (kM == 2 && kN == 2) ATTNREG_PAIRS_STORE(3, c + kRowsOfPairs * c_row + kLanes<float>, c_row * 4);
}

// The same of any number of rows.
template <int kN>
__attribute__((noinline)) void multiply_pairs(int64_t rows, int64_t terms, const BFloat16* a, int64_t a_row, const float* b,
                                              int64_t b_row, float* c, int64_t c_row) {
  int64_t m = 0;
  for (; m + 2 * kRowsOfPairs <= rows; m += 2 * kRowsOfPairs) {
    multiply_pairs_block<2, kN>(terms, a + m * a_row, a_row, b, b_row, c + m * c_row, c_row);
  }
  if (m + kRowsOfPairs <= rows) {
    multiply_pairs_block<1, kN>(terms, a + m * a_row, a_row, b, b_row, c + m * c_row, c_row);
    m += kRowsOfPairs;
  }
  if (m == rows) return;
  if (rows >= kRowsOfPairs) {  // some once more
    m = rows - kRowsOfPairs;
    return multiply_pairs_block<1, kN>(terms, a + m * a_row, a_row, b, b_row, c + m * c_row, c_row);
  }
  // What lies behind the last row is not to be read, nor written into.
  alignas(64) BFloat16 few[kRowsOfPairs * kTermsOfPairs] = {};
  alignas(64) float sums[kRowsOfPairs * kN * kLanes<float>];
  ATTNREG_PAIRS_ZERO(0);
  if constexpr (kN == 2) ATTNREG_PAIRS_ZERO(1);
  for (int64_t k = 0; k < terms; k += kTermsOfPairs) {
    for (int64_t i = 0; i < rows; ++i) memcpy(few + i * kTermsOfPairs, a + i * a_row + k, kTermsOfPairs * sizeof(BFloat16));
    ATTNREG_PAIRS_LOAD(4, few, 64);
    ATTNREG_PAIRS_LOAD(6, b + k / 2 * b_row, b_row * 4);
    ATTNREG_PAIRS_ADD(0, 4, 6);
    if constexpr (kN == 2) {
      ATTNREG_PAIRS_LOAD(7, b + k / 2 * b_row + kLanes<float>, b_row * 4);
      ATTNREG_PAIRS_ADD(1, 4, 7);
    }
  }
  ATTNREG_PAIRS_STORE(0, sums, kN * 64);
  if constexpr (kN == 2) ATTNREG_PAIRS_STORE(1, sums + kLanes<float>, kN * 64);
  for (int64_t i = 0; i < rows; ++i) {
    memcpy(c + i * c_row, sums + i * kN * kLanes<float>, kN * kLanes<float> * sizeof(float));
  }
}

// Keys as columns, for sums over keys: blocks of kTermsOfPairs keys, [size][kTermsOfPairs] each, zeros behind the last key. Returns
// whether all numbers are finite: only then a weight of 0 makes nothing of a key.
inline bool pack_columns_of_pairs(const BFloat16* keys, int64_t row, int64_t count, int64_t size, BFloat16* to) {
  typedef Vector<uint32_t> Bits;
  constexpr int lanes = kLanes<float>;
  Bits largest = {};
  for (int64_t key = 0; key < count; key += kTermsOfPairs) {
    for (int64_t c = 0; c < size; c += lanes) {
      alignas(64) float pairs[lanes * lanes];
      for (int64_t i = 0; i < lanes; ++i) {
        const auto at_or_zero = [&](int64_t k) {
          if (k >= count) return Bits{};
          return words_of(*reinterpret_cast<const LooseShorts*>(keys + k * row + c));
        };
        const Bits first = at_or_zero(key + 2 * i), second = at_or_zero(key + 2 * i + 1);
        largest = larger(largest, first & 0x7fffu);
        largest = larger(largest, second & 0x7fffu);
        store<float>(pairs + i * lanes, reinterpret_cast<Vector<float>>(first | second << 16));
      }
      transpose_block<float>(pairs, lanes, reinterpret_cast<float*>(to + c * kTermsOfPairs), lanes);
    }
    to += size * kTermsOfPairs;
  }
  return !any(largest >= 0x7f80u);
}

// Weights of two rows as pairs: the bfloat16 next to each, and what that leaves, so that little is lost.
ATTNREG_INLINE void split_pair(Vector<float> a, Vector<float> b, float* upper, float* lower) {
  typedef Vector<uint32_t> Bits;
  const Bits high_a = (reinterpret_cast<Bits>(a) + 0x8000u) & 0xffff0000u;
  const Bits high_b = (reinterpret_cast<Bits>(b) + 0x8000u) & 0xffff0000u;
  const Bits low_a = reinterpret_cast<Bits>(a - reinterpret_cast<Vector<float>>(high_a));
  const Bits low_b = reinterpret_cast<Bits>(b - reinterpret_cast<Vector<float>>(high_b));
  store<float>(upper, reinterpret_cast<Vector<float>>(high_a >> 16 | high_b));
  store<float>(lower, reinterpret_cast<Vector<float>>(low_a >> 16 | (low_b & 0xffff0000u)));
}

// Weights [keys][b_row] of a vector's keys [begin, end), counted from the first key of a block, in pairs of keys
// [keys / 2][b_row]; 0 for other keys. `weights` is that of the key `first`.
inline void split_weights(const float* weights, int64_t first, int64_t begin, int64_t end, int64_t keys, int64_t b_row,
                          float* upper, float* lower) {
  const auto at_or_zero = [&](int64_t k) {
    return k >= begin && k < end ? load(weights + (k - first) * b_row) : Vector<float>{};
  };
  const int64_t inner = (begin + 1) / 2, inner_end = end / 2;
  for (int64_t pair = 0; pair < keys / 2; ++pair) {
    if (pair >= inner && pair < inner_end) {
      const float* const from = weights + (2 * pair - first) * b_row;
      split_pair(load(from), load(from + b_row), upper + pair * b_row, lower + pair * b_row);
    } else {
      split_pair(at_or_zero(2 * pair), at_or_zero(2 * pair + 1), upper + pair * b_row, lower + pair * b_row);
    }
  }
}

// sums [size][b_row] += columns * (upper + lower), of kN vectors and `blocks` blocks of keys.
template <int kN>
__attribute__((noinline)) void add_pairs(int64_t size, int64_t blocks, const BFloat16* columns, const float* upper,
                                         const float* lower, int64_t b_row, float* sums) {
  constexpr int64_t lanes = kLanes<float>;
  for (int64_t c = 0; c < size; c += 2 * kRowsOfPairs) {
    float* const to = sums + c * b_row;
    float* const below = to + kRowsOfPairs * b_row;
    ATTNREG_PAIRS_LOAD(0, to, b_row * 4);
    if constexpr (kN == 2) ATTNREG_PAIRS_LOAD(1, to + lanes, b_row * 4);
    ATTNREG_PAIRS_LOAD(2, below, b_row * 4);
    if constexpr (kN == 2) ATTNREG_PAIRS_LOAD(3, below + lanes, b_row * 4);
    for (int64_t block = 0; block < blocks; ++block) {
      const BFloat16* const a = columns + (block * size + c) * kTermsOfPairs;
      const int64_t b = block * kTermsOfPairs / 2 * b_row;
      ATTNREG_PAIRS_LOAD(4, a, 64);
      ATTNREG_PAIRS_LOAD(5, a + kRowsOfPairs * kTermsOfPairs, 64);
      ATTNREG_PAIRS_LOAD(6, upper + b, b_row * 4);
      ATTNREG_PAIRS_ADD(0, 4, 6);
      ATTNREG_PAIRS_ADD(2, 5, 6);
      if constexpr (kN == 2) {
        ATTNREG_PAIRS_LOAD(7, upper + b + lanes, b_row * 4);
        ATTNREG_PAIRS_ADD(1, 4, 7);
        ATTNREG_PAIRS_ADD(3, 5, 7);
      }
      ATTNREG_PAIRS_LOAD(6, lower + b, b_row * 4);
      ATTNREG_PAIRS_ADD(0, 4, 6);
      ATTNREG_PAIRS_ADD(2, 5, 6);
      if constexpr (kN == 2) {
        ATTNREG_PAIRS_LOAD(7, lower + b + lanes, b_row * 4);
        ATTNREG_PAIRS_ADD(1, 4, 7);
        ATTNREG_PAIRS_ADD(3, 5, 7);
      }
    }
    ATTNREG_PAIRS_STORE(0, to, b_row * 4);
    if constexpr (kN == 2) ATTNREG_PAIRS_STORE(1, to + lanes, b_row * 4);
    ATTNREG_PAIRS_STORE(2, below, b_row * 4);
    if constexpr (kN == 2) ATTNREG_PAIRS_STORE(3, below + lanes, b_row * 4);
  }
}

// Rows of two vectors of lanes as pairs [kLanes][size], of a lane of the first vector and of the same one of the second.
inline void pair_rows(const BFloat16* rows, int64_t row, int64_t size, float* to) {
  constexpr int64_t lanes = kLanes<float>;
  for (int64_t i = 0; i < lanes; ++i) {
    for (int64_t c = 0; c < size; c += lanes) {
      const BFloat16* const from = rows + i * row + c;
      const auto first = words_of(*reinterpret_cast<const LooseShorts*>(from));
      const auto second = words_of(*reinterpret_cast<const LooseShorts*>(from + lanes * row));
      store<float>(to + i * size + c, reinterpret_cast<Vector<float>>(first | second << 16));
    }
  }
}

// sums [keys][size] += (upper + lower) [keys][kLanes] * rows [kLanes][size], of pairs. Weights are of whole blocks of keys.
__attribute__((noinline)) inline void add_pairs_to_keys(int64_t keys, int64_t size, const float* upper, const float* lower,
                                                        const float* rows, float* sums) {
  constexpr int64_t lanes = kLanes<float>;
  for (int64_t c = 0; c < size; c += 2 * lanes) {
    ATTNREG_PAIRS_LOAD(6, rows + c, size * 4);
    ATTNREG_PAIRS_LOAD(7, rows + c + lanes, size * 4);
    const auto add = [&](int64_t k, float* to, int64_t row) {
      ATTNREG_PAIRS_LOAD(0, to, row * 4);
      ATTNREG_PAIRS_LOAD(1, to + lanes, row * 4);
      ATTNREG_PAIRS_LOAD(4, upper + k * lanes, 64);
      ATTNREG_PAIRS_LOAD(5, lower + k * lanes, 64);
      ATTNREG_PAIRS_ADD(0, 4, 6);
      ATTNREG_PAIRS_ADD(1, 4, 7);
      ATTNREG_PAIRS_ADD(0, 5, 6);
      ATTNREG_PAIRS_ADD(1, 5, 7);
      ATTNREG_PAIRS_STORE(0, to, row * 4);
      ATTNREG_PAIRS_STORE(1, to + lanes, row * 4);
    };
    int64_t k = 0;
    for (; k + kRowsOfPairs <= keys; k += kRowsOfPairs) add(k, sums + k * size + c, size);
    if (k == keys) continue;
    // The keys behind the last one are no part of this, and a weight of 0 makes a NaN of a row's that is not finite.
    alignas(64) float few[kRowsOfPairs * 2 * lanes];
    memset(few, 0, sizeof(few));
    for (int64_t i = 0; i < keys - k; ++i) memcpy(few + i * 2 * lanes, sums + (k + i) * size + c, 2 * lanes * sizeof(float));
    add(k, few, 2 * lanes);
    for (int64_t i = 0; i < keys - k; ++i) memcpy(sums + (k + i) * size + c, few + i * 2 * lanes, 2 * lanes * sizeof(float));
  }
}
#endif

}  // namespace
}  // namespace attnreg::cpu
