// gather_band: dense blocks (N, Hkv, P, G, S) -> band (N, H, Lq, W).
//
// Query row i is row i mod B of its block; its slot c is column c + (i mod B) + diagonal there. In other words, the
// band is the dense result read with a row pitch of S + 1. Bias is added here; invisible slots get `hidden`.
#pragma once

#include "band.cuh"

namespace attnreg {

template <class T>
struct GatherBand {
  const T* dense;
  int64_t kv_heads, pitch, group, columns;
  int64_t block_rows, diagonal;
  BandTensor<T> band;
  Visibility visibility;
  float hidden;

  __host__ __device__ void operator()(int64_t row, int lane, int lanes) const {
    const int64_t i = pop(row, band.queries);
    const int64_t h = pop(row, band.heads);
    const int64_t n = row;
    const int64_t dense_row = ((n * kv_heads + h / group) * pitch + i) * group + h % group;
    const T* from = dense + dense_row * columns + i % block_rows + diagonal;
    T* to = band.row(n, h, i);
    const auto seen = visibility.row(n, h, i);
    for (int64_t c = lane; c < band.width; c += lanes) {
      float bias;
      to[c] = visibility.sees(seen, c, bias) ? T(static_cast<float>(from[c]) + bias) : T(hidden);
    }
  }
};

inline void gather_band(Tensor dense, Tensor band, std::optional<Tensor> bias, std::optional<Tensor> key_lengths,
                        int64_t keys, int64_t shift, int64_t block_rows, int64_t diagonal, double hidden) {
  STD_TORCH_CHECK(dense.is_contiguous() && dense.size(1) * dense.size(3) == band.size(1) &&
                      dense.size(2) >= band.size(2) && dense.scalar_type() == band.scalar_type(),
                  "attnreg cublas_block: gather_band got tensors that do not fit");
  dispatch_dtype(band.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const GatherBand<T> kernel{static_cast<const T*>(dense.const_data_ptr()),
                               dense.size(1), dense.size(2), dense.size(3), dense.size(4),
                               block_rows, diagonal,
                               BandTensor<T>(band, static_cast<T*>(band.mutable_data_ptr())),
                               Visibility{shift, Lengths(key_lengths, keys), Bias(bias)},
                               static_cast<float>(hidden)};
    for_each_row(kernel, band.size(0) * band.size(1) * band.size(2), band.size(3), band);
  });
}

}  // namespace attnreg
