// mask_band: a copy of a band with zero at invisible slots, whatever they held.
#pragma once

#include "band.cuh"

namespace attnreg {

template <class T, class Visibility>
struct MaskBand {
  Rows<const T> band;
  Rows<T> masked;
  Divisor length, heads;
  Visibility visibility;

  __host__ __device__ void operator()(int32_t row, int lane, int lanes) const {
    const int32_t i = length.pop(row), h = heads.pop(row), n = row;
    const T* from = band.row(n, h, i);
    T* to = masked.row(n, h, i);
    const auto seen = visibility.row(n, h, i);
    for (int c = lane; c < band.width; c += lanes) {
      float bias;
      to[c] = visibility.sees(seen, c, bias) ? from[c] : T(0.0f);
    }
  }
};

inline void mask_band(Tensor band, Tensor masked, std::optional<Tensor> bias, Given given, int64_t keys,
                      int64_t shift) {
  dispatch_dtype(band.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto visibility) {
      const MaskBand<T, decltype(visibility)> kernel{read_rows<T>(band), write_rows<T>(masked), Divisor(band.size(2)),
                                                    Divisor(band.size(1)), visibility};
      for_each_row(kernel, band.size(0) * band.size(1) * band.size(2), lanes_of(band.size(3)), masked);
    };
    dispatch_visibility(band, keys, shift, bias, given, run);
  });
}

}  // namespace attnreg
