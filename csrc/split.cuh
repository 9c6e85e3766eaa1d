// split: fp32 rows (N, H, L, E) -> three fp16 factors a row on the line, and a power of two for each row.
//
// x = (hi + lo) * scale to 22 bits, with the largest element of a row brought to [2^14, 2^15). The query's row is
// [hi hi lo] and the key's [hi lo hi], so that one product over 3 E terms is hi.hi + hi.lo + lo.hi: what is left out,
// lo.lo, lies below the last bit of fp32. A row that is not finite becomes zeros with the scale NaN, so that it reaches
// those only who see it.
#pragma once

#include "band.cuh"

namespace attnreg {

struct Split {
  Rows<const float> source;
  __half* factors;  // (positions, G, 3 * E padded), from position `first` on
  float* scales;    // (positions of the line, G)
  int64_t batch, kv_heads, group, pitch, first, lead, padded;
  bool of_keys;

  __host__ __device__ void operator()(int64_t row, int lane, int lanes) const {
    __half* to = factors + row * 3 * padded;
    const int64_t g = pop(row, group);
    const int64_t x = first + row;
    int64_t n = x;
    const int64_t l = pop(n, pitch) - lead;
    const int64_t kv_head = pop(n, kv_heads);
    const bool on_line = x >= 0 && n < batch;
    const bool inside = on_line && l >= 0 && l < source.length;
    const float* from = inside ? source.row(n, kv_head * group + g, l) : nullptr;
    const int64_t width = inside ? source.width : 0;
    float largest = 0;
    bool finite = true;
    for (int64_t e = lane; e < width; e += lanes) {
      finite = finite && isfinite(from[e]);
      largest = fmaxf(largest, fabsf(from[e]));
    }
#ifdef __CUDA_ARCH__
    // The lanes of one row only: those of the warp's other rows may be through.
    const unsigned first_lane = threadIdx.y * lanes % kWarp;
    const unsigned row_lanes = (lanes == kWarp ? 0xffffffffu : (1u << lanes) - 1u) << first_lane;
    for (int other = lanes / 2; other > 0; other /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(row_lanes, largest, other));
      finite = __shfl_xor_sync(row_lanes, finite, other) && finite;
    }
#endif
    int exponent = 0;
    frexpf(largest, &exponent);  // largest = fraction * 2^exponent, with the fraction in [1/2, 1)
    exponent = largest == 0 || !finite ? 0 : exponent < -100 ? -100 : exponent;
    const float up = ldexpf(1.0f, 15 - exponent);
    if (on_line && lane == 0) scales[x * group + g] = finite ? ldexpf(1.0f, exponent - 15) : NAN;
    for (int64_t e = lane; e < padded; e += lanes) {
      const float x = finite && e < width ? from[e] * up : 0.0f;
      const __half hi = __float2half_rn(x);
      const __half lo = __float2half_rn(x - __half2float(hi));
      to[e] = hi;
      to[padded + e] = of_keys ? lo : hi;
      to[2 * padded + e] = of_keys ? hi : lo;
    }
  }
};

inline void split(Tensor source, Tensor factors, Tensor scales, int64_t pitch, int64_t first, int64_t lead,
                  bool of_keys) {
  STD_TORCH_CHECK(factors.is_contiguous() && factors.dim() == 3 && scales.is_contiguous() &&
                      factors.scalar_type() == ScalarType::Half && source.scalar_type() == ScalarType::Float,
                  "attnreg cublas_block: split got tensors that do not fit");
  const int64_t group = factors.size(1);
  const Split kernel{read_rows<float>(source), static_cast<__half*>(factors.mutable_data_ptr()),
                     static_cast<float*>(scales.mutable_data_ptr()), source.size(0), source.size(1) / group, group,
                     pitch, first, lead, factors.size(2) / 3, of_keys};
  for_each_row(kernel, factors.size(0) * group, kernel.padded, factors);
}

}  // namespace attnreg
