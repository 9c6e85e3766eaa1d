// gather_band: dense blocks -> band (N, H, Lq, W), for the positions of one chunk of blocks.
//
// The query at row r of its block has slot c in column r + c + diagonal: the band is the dense result read with a row
// pitch of S + 1. Bias is added here; invisible slots get `hidden`. Where the products were of factors, their scales
// are multiplied in.
#pragma once

#include "band.cuh"

namespace attnreg {

template <class T, bool kBias>
struct GatherBand {
  Geometry geometry;
  const T* dense;  // of the blocks from `first_block` on: (blocks, rows, G, columns)
  int32_t first_block, left, diagonal;
  const float *query_scales, *key_scales;  // by position and head, and by position; null where there are none
  Rows<T> band;
  Visibility<kBias> visibility;
  float scale, hidden;

  __host__ __device__ void operator()(int32_t row, int lane, int lanes) const {
    const T* from = dense + int64_t{row} * geometry.columns;
    const int32_t g = geometry.group.pop(row);
    const int32_t x = first_block * geometry.rows.size() + row;
    const auto place = geometry.place(x);
    const int32_t i = place.at - geometry.query_lead;
    if (i < 0 || i >= band.length || place.n >= visibility.batch) return;
    const int32_t h = place.kv_head * geometry.group.size() + g;
    T* __restrict__ to = band.row(place.n, h, i);
    const auto seen = visibility.row(place.n, h, i);
    const int width = static_cast<int>(band.width);
    const T* __restrict__ slots = from + geometry.rows.remainder(x) + diagonal;
    const auto store = [&](int c, T value) { to[c] = value; };
    if (query_scales == nullptr) {
      const auto load = [&](int c) {
        float bias;
        return visibility.sees(seen, c, bias) ? T(static_cast<float>(slots[c]) + bias) : T(hidden);
      };
      return copy_columns(lane, lanes, width, load, store);
    }
    const float row_scale = scale * query_scales[int64_t{x} * geometry.group.size() + g];
    const float* __restrict__ scales = key_scales + (x - left);
    const auto load = [&](int c) {
      float bias;
      if (!visibility.sees(seen, c, bias)) return T(hidden);
      return T(static_cast<float>(slots[c]) * row_scale * scales[c] + bias);
    };
    copy_columns(lane, lanes, width, load, store);
  }
};

inline void gather_band(Tensor dense, std::optional<Tensor> query_scales, std::optional<Tensor> key_scales, Tensor band,
                        std::optional<Tensor> bias, std::optional<Tensor> key_lengths, std::vector<int64_t> numbers,
                        int64_t first_block, int64_t keys, int64_t left, double scale, double hidden) {
  const Geometry geometry(numbers);
  STD_TORCH_CHECK(dense.is_contiguous() && dense.dim() == 3 && dense.scalar_type() == band.scalar_type(),
                  "attnreg cublas_block: gather_band got tensors that do not fit");
  dispatch_dtype(band.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto visibility) {
      const GatherBand<T, visibility.kHasBias> kernel{
          geometry, static_cast<const T*>(dense.const_data_ptr()), static_cast<int32_t>(first_block),
          static_cast<int32_t>(left), static_cast<int32_t>(geometry.before - left), read<float>(query_scales),
          read<float>(key_scales), write_rows<T>(band), visibility, static_cast<float>(scale),
          static_cast<float>(hidden)};
      for_each_row(kernel, dense.size(0) * dense.size(1), band.size(3), band);
    };
    dispatch_visibility(band, keys, left, bias, key_lengths, run);
  });
}

}  // namespace attnreg
