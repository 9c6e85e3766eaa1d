// The inverse of gather_band, once for each side that can own the blocks; zero off the band and at invisible slots.
//
// scatter_band:        band -> (blocks, B, G, S), rows are queries:  row r, column s is slot s - r - diagonal.
// scatter_band_by_key: band -> (blocks, S, G, B), the window mirrored: B keys a block, S queries that see them, and the
//                      slot counted from the other end: slot W - 1 - (s - r - diagonal).
// Both run along keys, so that reads and writes are coalesced.
#pragma once

#include "band.cuh"

namespace attnreg {

template <class T, class Visibility>
struct ScatterBand {
  Geometry geometry;
  Rows<const T> band;
  T* dense;
  Divisor block_columns;
  int32_t first_line, first_block, diagonal;
  Visibility visibility;

  __host__ __device__ void operator()(int32_t row, int lane, int lanes) const {
    const int columns = static_cast<int>(geometry.columns);
    T* __restrict__ to = dense + int64_t{row} * columns;
    const int32_t g = geometry.group.pop(row);
    const int32_t x = geometry.position(first_line, first_block * geometry.rows.size() + row);
    const auto place = geometry.place(x);
    const int32_t i = place.at - geometry.query_lead;
    const int32_t h = place.kv_head * geometry.group.size() + g;
    const bool inside = i >= 0 && i < band.length && place.n < visibility.batch;
    const auto seen = inside ? visibility.row(place.n, h, i) : visibility.nothing();
    const int slot_of_column_0 = -geometry.rows.remainder(row) - diagonal;
    const T* __restrict__ from = band.row(place.n, h, i) + slot_of_column_0;
    const auto load = [&](int s) {
      float bias;
      return visibility.sees(seen, slot_of_column_0 + s, bias) ? from[s] : T(0.0f);
    };
    copy_columns(lane, lanes, columns, load, [&](int s, T weight) { to[s] = weight; });
  }
};

template <class T, class Visibility>
struct ScatterBandByKey {
  Geometry geometry;
  Rows<const T> band;
  T* dense;
  Divisor block_columns;
  int32_t first_line, first_block, diagonal;
  Visibility visibility;

  __host__ __device__ void operator()(int32_t row, int lane, int lanes) const {
    const int keys = geometry.rows.size();
    T* __restrict__ to = dense + int64_t{row} * keys;
    const int32_t g = geometry.group.pop(row);
    const int32_t s = block_columns.pop(row);
    const int32_t x = geometry.position(first_line, (first_block + row) * keys) - geometry.before + s;
    const auto place = geometry.place(x < 0 ? 0 : x);
    const int32_t i = place.at - geometry.query_lead;
    const int32_t h = place.kv_head * geometry.group.size() + g;
    const bool inside = x >= 0 && i >= 0 && i < band.length && place.n < visibility.batch;
    const auto seen = inside ? visibility.row(place.n, h, i) : visibility.nothing();
    const int slot_of_key_0 = static_cast<int>(band.width) - 1 - s + diagonal;
    const T* __restrict__ from = band.row(place.n, h, i) + slot_of_key_0;
    const auto load = [&](int r) {
      float bias;
      return visibility.sees(seen, slot_of_key_0 + r, bias) ? from[r] : T(0.0f);
    };
    copy_columns(lane, lanes, keys, load, [&](int r, T weight) { to[r] = weight; });
  }
};

template <template <class, class> class Kernel>
void run_scatter(const Tensor& band, const Tensor& dense, const std::optional<Tensor>& bias,
                 const Given& given, const std::vector<int64_t>& numbers, int64_t first_line,
                 int64_t first_block, int64_t diagonal, int64_t keys, int64_t left) {
  const Geometry geometry(numbers);
  STD_TORCH_CHECK(dense.is_contiguous() && dense.dim() == 4 && dense.scalar_type() == band.scalar_type(),
                  "attnreg cublas_block: a scatter got tensors that do not fit");
  dispatch_dtype(band.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto visibility) {
      const Kernel<T, decltype(visibility)> kernel{
          geometry, read_rows<T>(band), static_cast<T*>(dense.mutable_data_ptr()), Divisor(geometry.columns),
          static_cast<int32_t>(first_line), static_cast<int32_t>(first_block), static_cast<int32_t>(diagonal),
          visibility};
      for_each_row(kernel, dense.size(0) * dense.size(1) * dense.size(2), lanes_of(dense.size(3)), dense);
    };
    dispatch_visibility(band, keys, geometry.shift(left), bias, given, run);
  });
}

inline void scatter_band(Tensor band, Tensor dense, std::optional<Tensor> bias, Given given,
                         std::vector<int64_t> numbers, int64_t first_line, int64_t first_block, int64_t keys,
                         int64_t left) {
  run_scatter<ScatterBand>(band, dense, bias, given, numbers, first_line, first_block, Geometry(numbers).before - left,
                           keys, left);
}

inline void scatter_band_by_key(Tensor band, Tensor dense, std::optional<Tensor> bias, Given given,
                                std::vector<int64_t> numbers, int64_t first_line, int64_t first_block, int64_t keys,
                                int64_t left) {
  const int64_t right = band.size(3) - 1 - left;
  run_scatter<ScatterBandByKey>(band, dense, bias, given, numbers, first_line, first_block,
                                Geometry(numbers).before - right, keys, left);
}

}  // namespace attnreg
