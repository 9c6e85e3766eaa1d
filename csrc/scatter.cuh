// The inverse of gather_band, once for each side that can own the blocks; zero off the band and at invisible slots.
//
// scatter_band:        band -> (N, Hkv, P, G, S), rows are queries:  row r, column s is slot s - r - diagonal.
// scatter_band_by_key: band -> (N, Hkv, blocks, S, G, B), the window mirrored: B keys a block, S queries that see them,
//                      and the slot counted from the other end: slot W - 1 - (s - r - diagonal).
// Both run along keys, so that reads and writes are coalesced.
#pragma once

#include "band.cuh"

namespace attnreg {

template <class T>
struct ScatterBand {
  BandTensor<const T> band;
  T* dense;
  int64_t kv_heads, pitch, group, columns;
  int64_t block_rows, diagonal;
  Visibility visibility;

  __host__ __device__ void operator()(int64_t row, int lane, int lanes) const {
    T* to = dense + row * columns;
    const int64_t g = pop(row, group);
    const int64_t i = pop(row, pitch);
    const int64_t h = pop(row, kv_heads) * group + g;
    const int64_t n = row;
    const bool inside = i < band.queries;
    const T* from = band.row(n, h, inside ? i : 0);
    const auto seen = visibility.row(n, h, inside ? i : 0);
    const int64_t slot_of_column_0 = -(i % block_rows) - diagonal;
    for (int64_t s = lane; s < columns; s += lanes) {
      const int64_t c = slot_of_column_0 + s;
      float bias;
      const bool visible = inside && c >= 0 && c < band.width && visibility.sees(seen, c, bias);
      to[s] = visible ? from[c] : T(0.0f);
    }
  }
};

template <class T>
struct ScatterBandByKey {
  BandTensor<const T> band;
  T* dense;
  int64_t kv_heads, blocks, columns, group, block_rows;
  int64_t first, diagonal;
  Visibility visibility;

  __host__ __device__ void operator()(int64_t row, int lane, int lanes) const {
    T* to = dense + row * block_rows;
    const int64_t g = pop(row, group);
    const int64_t s = pop(row, columns);
    const int64_t i = pop(row, blocks) * block_rows + first + s;
    const int64_t h = pop(row, kv_heads) * group + g;
    const int64_t n = row;
    const bool inside = i >= 0 && i < band.queries;
    const T* from = band.row(n, h, inside ? i : 0);
    const auto seen = visibility.row(n, h, inside ? i : 0);
    const int64_t slot_of_key_0 = band.width - 1 - s + diagonal;
    for (int64_t r = lane; r < block_rows; r += lanes) {
      const int64_t c = slot_of_key_0 + r;
      float bias;
      const bool visible = inside && c >= 0 && c < band.width && visibility.sees(seen, c, bias);
      to[r] = visible ? from[c] : T(0.0f);
    }
  }
};

inline void scatter_band(Tensor band, Tensor dense, std::optional<Tensor> bias, std::optional<Tensor> key_lengths,
                         int64_t keys, int64_t shift, int64_t block_rows, int64_t diagonal) {
  STD_TORCH_CHECK(dense.is_contiguous() && dense.size(1) * dense.size(3) == band.size(1) &&
                      dense.scalar_type() == band.scalar_type(),
                  "attnreg cublas_block: scatter_band got tensors that do not fit");
  dispatch_dtype(band.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const ScatterBand<T> kernel{BandTensor<const T>(band, static_cast<const T*>(band.const_data_ptr())),
                                static_cast<T*>(dense.mutable_data_ptr()),
                                dense.size(1), dense.size(2), dense.size(3), dense.size(4),
                                block_rows, diagonal,
                                Visibility{shift, Lengths(key_lengths, keys), Bias(bias)}};
    for_each_row(kernel, dense.size(0) * dense.size(1) * dense.size(2) * dense.size(3), dense.size(4), dense);
  });
}

inline void scatter_band_by_key(Tensor band, Tensor dense, std::optional<Tensor> bias,
                                std::optional<Tensor> key_lengths, int64_t keys, int64_t shift, int64_t first,
                                int64_t diagonal) {
  STD_TORCH_CHECK(dense.is_contiguous() && dense.size(1) * dense.size(4) == band.size(1) &&
                      dense.scalar_type() == band.scalar_type(),
                  "attnreg cublas_block: scatter_band_by_key got tensors that do not fit");
  dispatch_dtype(band.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const ScatterBandByKey<T> kernel{BandTensor<const T>(band, static_cast<const T*>(band.const_data_ptr())),
                                     static_cast<T*>(dense.mutable_data_ptr()),
                                     dense.size(1), dense.size(2), dense.size(3), dense.size(4), dense.size(5),
                                     first, diagonal,
                                     Visibility{shift, Lengths(key_lengths, keys), Bias(bias)}};
    const int64_t rows = dense.size(0) * dense.size(1) * dense.size(2) * dense.size(3) * dense.size(4);
    for_each_row(kernel, rows, dense.size(5), dense);
  });
}

}  // namespace attnreg
