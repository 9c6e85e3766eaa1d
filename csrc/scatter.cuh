// The inverse of gather_band, once for each side that can own the blocks; zero off the band and at invisible slots.
//
// scatter_band:        band -> (blocks, B, G, S), rows are queries:  row r, column s is slot s - r - diagonal.
// scatter_band_by_key: band -> (blocks, S, G, B), the window mirrored: B keys a block, S queries that see them, and the
//                      slot counted from the other end: slot W - 1 - (s - r - diagonal).
// Both run along keys, so that reads and writes are coalesced.
#pragma once

#include "band.cuh"

namespace attnreg {

template <class T>
struct ScatterBand {
  Geometry geometry;
  Rows<const T> band;
  T* dense;
  int64_t first_block, diagonal;
  Visibility visibility;

  __host__ __device__ void operator()(int64_t row, int lane, int lanes) const {
    const int columns = static_cast<int>(geometry.columns);
    T* __restrict__ to = dense + row * columns;
    const int64_t g = pop(row, geometry.group);
    const int64_t x = first_block * geometry.rows + row;
    const auto place = geometry.place(x);
    const int64_t i = place.at - geometry.query_lead;
    const int64_t h = place.kv_head * geometry.group + g;
    const bool inside = i >= 0 && i < band.length && place.n < visibility.batch;
    const T* __restrict__ from = band.row(inside ? place.n : 0, h, inside ? i : 0);
    const auto seen = visibility.row(inside ? place.n : 0, h, inside ? i : 0);
    const int slot_of_column_0 = static_cast<int>(-(x % geometry.rows) - diagonal);
#pragma unroll 4
    for (int s = lane; s < columns; s += lanes) {
      const int c = slot_of_column_0 + s;
      float bias;
      to[s] = inside && visibility.sees(seen, c, bias) ? from[c] : T(0.0f);
    }
  }
};

template <class T>
struct ScatterBandByKey {
  Geometry geometry;
  Rows<const T> band;
  T* dense;
  int64_t first_block, diagonal;
  Visibility visibility;

  __host__ __device__ void operator()(int64_t row, int lane, int lanes) const {
    const int keys = static_cast<int>(geometry.rows);
    T* __restrict__ to = dense + row * keys;
    const int64_t g = pop(row, geometry.group);
    const int64_t s = pop(row, geometry.columns);
    const int64_t first_key = (first_block + row) * geometry.rows;
    const int64_t x = first_key - geometry.before + s;
    const auto place = geometry.place(x < 0 ? 0 : x);
    const int64_t i = place.at - geometry.query_lead;
    const int64_t h = place.kv_head * geometry.group + g;
    const bool inside = x >= 0 && i >= 0 && i < band.length && place.n < visibility.batch;
    const T* __restrict__ from = band.row(inside ? place.n : 0, h, inside ? i : 0);
    const auto seen = visibility.row(inside ? place.n : 0, h, inside ? i : 0);
    const int slot_of_key_0 = static_cast<int>(band.width - 1 - s + diagonal);
#pragma unroll 4
    for (int r = lane; r < keys; r += lanes) {
      const int c = slot_of_key_0 + r;
      float bias;
      to[r] = inside && visibility.sees(seen, c, bias) ? from[c] : T(0.0f);
    }
  }
};

template <template <class> class Kernel>
void run_scatter(const Tensor& band, const Tensor& dense, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& key_lengths, const std::vector<int64_t>& numbers, int64_t first_block,
                 int64_t diagonal, int64_t keys, int64_t left) {
  const Geometry geometry(numbers);
  STD_TORCH_CHECK(dense.is_contiguous() && dense.dim() == 4 && dense.scalar_type() == band.scalar_type(),
                  "attnreg cublas_block: a scatter got tensors that do not fit");
  dispatch_dtype(band.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Kernel<T> kernel{geometry, read_rows<T>(band), static_cast<T*>(dense.mutable_data_ptr()), first_block, diagonal,
                           Visibility{band.size(0), band.size(3), keys - band.size(2) - left,
                                      Lengths(key_lengths, keys), Bias(bias)}};
    for_each_row(kernel, dense.size(0) * dense.size(1) * dense.size(2), dense.size(3), dense);
  });
}

inline void scatter_band(Tensor band, Tensor dense, std::optional<Tensor> bias, std::optional<Tensor> key_lengths,
                         std::vector<int64_t> numbers, int64_t first_block, int64_t keys, int64_t left) {
  run_scatter<ScatterBand>(band, dense, bias, key_lengths, numbers, first_block, Geometry(numbers).before - left, keys,
                           left);
}

inline void scatter_band_by_key(Tensor band, Tensor dense, std::optional<Tensor> bias,
                                std::optional<Tensor> key_lengths, std::vector<int64_t> numbers, int64_t first_block,
                                int64_t keys, int64_t left) {
  const int64_t right = band.size(3) - 1 - left;
  run_scatter<ScatterBandByKey>(band, dense, bias, key_lengths, numbers, first_block,
                                Geometry(numbers).before - right, keys, left);
}

}  // namespace attnreg
