// Which weights are dropped: attnreg/dropout.py for the lanes of a tile. Philox-4x32-10 of Salmon et al., "Parallel random
// numbers: as easy as 1, 2, 3" (2011).
#pragma once

#include "vector.h"

namespace attnreg::cpu {
namespace {

using Words = Vector<uint32_t>;
constexpr int kWords = kLanes<uint32_t>;

// The high and the low words of products with one number.
ATTNREG_INLINE void multiply_words(Words words, uint32_t factor, Words& high, Words& low) {
  typedef Vector<uint64_t> Wide;
  const Wide odd = reinterpret_cast<Wide>(words) >> 32;
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
  const __m512i factors = _mm512_set1_epi64(factor);
  const Wide even_product = reinterpret_cast<Wide>(_mm512_mul_epu32(reinterpret_cast<__m512i>(words), factors));
  const Wide odd_product = reinterpret_cast<Wide>(_mm512_mul_epu32(reinterpret_cast<__m512i>(odd), factors));
#elif defined(__AVX2__) && defined(__FMA__)
  const __m256i factors = _mm256_set1_epi64x(factor);
  const Wide even_product = reinterpret_cast<Wide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(words), factors));
  const Wide odd_product = reinterpret_cast<Wide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(odd), factors));
#else
  const Wide even_product = (reinterpret_cast<Wide>(words) & 0xffffffffu) * static_cast<uint64_t>(factor);
  const Wide odd_product = odd * static_cast<uint64_t>(factor);
#endif
  const Wide above = ~Wide{} << 32;
  high = reinterpret_cast<Words>((odd_product & above) | (even_product >> 32));
  low = reinterpret_cast<Words>((odd_product << 32) | (even_product & ~above));
}

struct Dropout {
  uint32_t threshold = 0;
  uint64_t seed = 0;
  uint32_t n = 0, h = 0;

  // Words of keys 4 * group to 4 * group + 3, for the rows in the lanes.
  ATTNREG_INLINE void words(Words rows, uint32_t group, Words* found) const {
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    Words a = all(n), b = all(h), c = rows, d = all(group);
    for (int round = 0; round < 10; ++round) {
      Words high_a, low_a, high_c, low_c;
      multiply_words(a, 0xD2511F53u, high_a, low_a);
      multiply_words(c, 0xCD9E8D57u, high_c, low_c);
      a = high_c ^ b ^ key[0];
      c = high_a ^ d ^ key[1];
      b = low_c;
      d = low_a;
      key[0] += 0x9E3779B9u;
      key[1] += 0xBB67AE85u;
    }
    found[0] = a;
    found[1] = b;
    found[2] = c;
    found[3] = d;
  }

  // Calls drop(k, lane, dropped) for keys first + k < last and all `lanes` of a tile that begins with `row`: `dropped` holds,
  // for as many lanes from `lane` on as T's vectors have, which weights are to go.
  template <class T, class Drop>
  ATTNREG_INLINE void each(int64_t row, int lanes, int64_t first, int64_t last, const Drop& drop) const {
    Words counting;
    for (int i = 0; i < kWords; ++i) counting[i] = i;
    for (int lane = 0; lane < lanes; lane += kWords) {
      const Words rows = counting + static_cast<uint32_t>(row + lane);
      for (int64_t group = first >> 2; group << 2 < last; ++group) {
        Words found[4];
        words(rows, static_cast<uint32_t>(group), found);
        for (int word = 0; word < 4; ++word) {
          const int64_t key = (group << 2) + word;
          if (key < first || key >= last) continue;
          const Vector<int32_t> dropped = reinterpret_cast<Vector<int32_t>>(found[word] < threshold);
          if constexpr (sizeof(T) == 4) {
            drop(key - first, lane, dropped);
          } else {
            int64_t wide[kWords];
            for (int i = 0; i < kWords; ++i) wide[i] = dropped[i];
            drop(key - first, lane, load(wide));
            if (lane + kLanes<T> < lanes) drop(key - first, lane + kLanes<T>, load(wide + kLanes<T>));
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace attnreg::cpu
