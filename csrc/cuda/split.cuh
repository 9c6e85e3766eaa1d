// split: fp32 rows (N, H, L, E) -> three fp16 factors a row on the line, and a power of two for each row.
//
// x = (hi + lo) * scale to 22 bits, with the largest element of a row brought to [2^14, 2^15). The query's row is
// [hi lo hi] and the key's [lo hi hi], so that one product over 3 E terms is hi.lo + lo.hi + hi.hi, the smallest first:
// what is left out, lo.lo, lies below the last bit of fp32. A row that is not finite becomes zeros with the scale NaN, so that it reaches
// those only who see it.
#pragma once

#include <cstring>

#include "access.cuh"
#include "band.cuh"

namespace attnreg {

struct Split {
  Rows<const float> source;
  __half* factors;  // (positions, G, 3 * E padded), from position `first` on
  float* scales;    // (positions of the line, G)
  int32_t batch;
  Divisor kv_heads, group, pitch;
  int32_t first, lead, padded;  // lead is where row 0 of a sequence lies in it, less its start if it is a key
  bool of_keys, aligned;        // whether every row of the source begins where an access may
  KeysOfRows<true> keys;

  __host__ __device__ void operator()(int32_t row, int lane, int lanes) const {
    __half* __restrict__ to = factors + int64_t{row} * 3 * padded;
    const int32_t g = group.pop(row);
    const int32_t x = first + row;
    int32_t n = x < 0 ? 0 : x;
    const int32_t at = pitch.pop(n);
    const int32_t kv_head = kv_heads.pop(n);
    const bool on_line = x >= 0 && n < batch;
    const int64_t l = at - lead + (of_keys && on_line ? keys.start(n) : 0);
    const bool inside = on_line && l >= 0 && l < source.length;
    const float* __restrict__ from = inside ? source.row(n, kv_head * group.size() + g, l) : nullptr;
    const int width = inside ? static_cast<int>(source.width) : 0;
    // The bits of a positive float order as it does, and those of an infinity and of NaN are the largest.
    int32_t largest = 0;
    for (int e = kVector * lane; e < width; e += kVector * lanes) {
      const auto values = load(from, e, width);
      for (int k = 0; k < kVector; ++k) {
        const int32_t magnitude = bits(values.at[k]) & INT32_MAX;
        largest = magnitude > largest ? magnitude : largest;
      }
    }
    largest = across_lanes(largest, lanes, [](int32_t x, int32_t y) { return x > y ? x : y; });
    const int32_t exponent = largest >> 23;
    const bool finite = exponent < 255;
    const int32_t power = !finite || exponent < 20 ? 20 : exponent;  // the powers of two below stay normal numbers
    const float up = power_of_two(268 - power);
    if (on_line && lane == 0) scales[int64_t{x} * group.size() + g] = finite ? power_of_two(power - 14) : NAN;
    for (int e = kVector * lane; e < padded; e += kVector * lanes) {
      const auto values = load(from, e, finite ? width : 0);
      Vector<__half, kVector> hi, lo;
      for (int k = 0; k < kVector; ++k) {
        const float value = values.at[k] * up;
        hi.at[k] = __float2half_rn(value);
        lo.at[k] = __float2half_rn(value - __half2float(hi.at[k]));
      }
      store(to + e, of_keys ? lo : hi);
      store(to + padded + e, of_keys ? hi : lo);
      store(to + 2 * padded + e, hi);
    }
  }

  static constexpr int kVector = 4;  // neighbours of a row in one access; a padded row holds a multiple of them

  // The elements from e on, 0 past `width`.
  __host__ __device__ Vector<float, kVector> load(const float* from, int e, int width) const {
    if (aligned && e + kVector <= width) return load_vector<kVector>(from + e);
    Vector<float, kVector> values;
    for (int k = 0; k < kVector; ++k) values.at[k] = e + k < width ? from[e + k] : 0.0f;
    return values;
  }

  __host__ __device__ static void store(__half* to, const Vector<__half, kVector>& values) {
    *reinterpret_cast<Vector<__half, kVector>*>(to) = values;
  }

  __host__ __device__ static int32_t bits(float value) {
    int32_t result;
    memcpy(&result, &value, sizeof result);
    return result;
  }

  // 2^(exponent - 127)
  __host__ __device__ static float power_of_two(int32_t exponent) {
    const int32_t encoded = exponent << 23;
    float result;
    memcpy(&result, &encoded, sizeof result);
    return result;
  }
};

inline void split(Tensor source, Tensor factors, Tensor scales, Given given, int64_t pitch, int64_t first,
                  int64_t lead, bool of_keys) {
  STD_TORCH_CHECK(factors.is_contiguous() && factors.dim() == 3 && scales.is_contiguous() &&
                      factors.scalar_type() == ScalarType::Half && source.scalar_type() == ScalarType::Float,
                  "attnreg cublas_block: split got tensors that do not fit");
  const int64_t group = factors.size(1);
  const Split kernel{read_rows<float>(source), static_cast<__half*>(factors.mutable_data_ptr()),
                     static_cast<float*>(scales.mutable_data_ptr()), static_cast<int32_t>(source.size(0)),
                     Divisor(source.size(1) / group), Divisor(group), Divisor(pitch), static_cast<int32_t>(first),
                     static_cast<int32_t>(lead), static_cast<int32_t>(factors.size(2) / 3), of_keys,
                     access_bytes(source) == kAccessBytes, KeysOfRows<true>(given, of_keys ? source.size(2) : 0)};
  for_each_row(kernel, factors.size(0) * group, lanes_of(kernel.padded / Split::kVector), factors);
}

}  // namespace attnreg
