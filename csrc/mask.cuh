// mask_band: a copy of a band with zero at invisible slots, whatever they held.
#pragma once

#include "band.cuh"

namespace attnreg {

template <class T>
struct MaskBand {
  Rows<const T> band;
  Rows<T> masked;
  Visibility visibility;

  __host__ __device__ void operator()(int64_t row, int lane, int lanes) const {
    const int64_t i = pop(row, band.length);
    const int64_t h = pop(row, band.heads);
    const int64_t n = row;
    const T* from = band.row(n, h, i);
    T* to = masked.row(n, h, i);
    const auto seen = visibility.row(n, h, i);
    for (int c = lane; c < band.width; c += lanes) {
      float bias;
      to[c] = visibility.sees(seen, c, bias) ? from[c] : T(0.0f);
    }
  }
};

inline void mask_band(Tensor band, Tensor masked, std::optional<Tensor> bias, std::optional<Tensor> key_lengths,
                      int64_t keys, int64_t left) {
  dispatch_dtype(band.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const MaskBand<T> kernel{read_rows<T>(band), write_rows<T>(masked),
                             Visibility{band.size(0), band.size(3), keys - band.size(2) - left,
                                        Lengths(key_lengths, keys), Bias(bias)}};
    for_each_row(kernel, band.size(0) * band.size(1) * band.size(2), band.size(3), masked);
  });
}

}  // namespace attnreg
