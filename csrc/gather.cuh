// gather_band: dense blocks -> band (N, H, Lq, W), for the positions of one chunk of blocks.
//
// The query at row r of its block has slot c in column r + c + diagonal: the band is the dense result read with a row
// pitch of S + 1. Bias is added here; invisible slots get `hidden`. Where the products were of factors, their scales
// are multiplied in. Rows without a dense result are computed as they are defined.
#pragma once

#include "band.cuh"

namespace attnreg {

template <class T>
struct GatherBand {
  Geometry geometry;
  const T* dense;  // of the blocks from `first_block` on: (blocks, rows, G, columns)
  int64_t first_block, first_position;
  int64_t left, diagonal;
  const float *query_scales, *key_scales;  // by position and head, and by position; null where there are none
  Rows<const T> query, key;
  Rows<T> band;
  Visibility visibility;
  float scale, hidden;

  __host__ __device__ void operator()(int64_t row, int lane, int lanes) const {
    const int64_t g = pop(row, geometry.group);
    const int64_t x = first_position + row;
    const auto place = geometry.place(x);
    const int64_t i = place.at - geometry.query_lead;
    if (i < 0 || i >= band.length) return;
    const int64_t h = place.kv_head * geometry.group + g;
    T* __restrict__ to = band.row(place.n, h, i);
    const auto seen = visibility.row(place.n, h, i);
    const int width = static_cast<int>(band.width);
    float bias;
    if (!geometry.has_dense(x)) {
      const T* from = query.row(place.n, h, i);
      for (int c = lane; c < width; c += lanes) {
        to[c] = visibility.sees(seen, c, bias) ? T(scale * dot(from, place, seen.first_key + c) + bias) : T(hidden);
      }
      return;
    }
    const int64_t dense_row = (x - first_block * geometry.rows) * geometry.group + g;
    const T* __restrict__ from = dense + dense_row * geometry.columns + x % geometry.rows + diagonal;
    if (query_scales == nullptr) {
#pragma unroll 4
      for (int c = lane; c < width; c += lanes) {
        to[c] = visibility.sees(seen, c, bias) ? T(static_cast<float>(from[c]) + bias) : T(hidden);
      }
      return;
    }
    const float row_scale = scale * query_scales[x * geometry.group + g];
    const float* __restrict__ scales = key_scales + (x - left);
#pragma unroll 4
    for (int c = lane; c < width; c += lanes) {
      to[c] = visibility.sees(seen, c, bias) ? T(static_cast<float>(from[c]) * row_scale * scales[c] + bias) : T(hidden);
    }
  }

  __host__ __device__ float dot(const T* from, const Geometry::Place& place, int64_t j) const {
    const T* other = key.row(place.n, place.kv_head, j);
    float sum = 0;
    for (int64_t e = 0; e < query.width; ++e) sum += static_cast<float>(from[e]) * static_cast<float>(other[e]);
    return sum;
  }
};

inline void gather_band(std::optional<Tensor> dense, Tensor query, Tensor key, std::optional<Tensor> query_scales,
                        std::optional<Tensor> key_scales, Tensor band, std::optional<Tensor> bias,
                        std::optional<Tensor> key_lengths, std::vector<int64_t> numbers, int64_t first_block,
                        int64_t first_position, int64_t positions, int64_t left, double scale, double hidden) {
  const Geometry geometry(numbers);
  dispatch_dtype(band.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const GatherBand<T> kernel{
        geometry, read<T>(dense), first_block, first_position, left, geometry.before - left, read<float>(query_scales),
        read<float>(key_scales), read_rows<T>(query), read_rows<T>(key), write_rows<T>(band),
        Visibility{band.size(0), band.size(3), key.size(2) - query.size(2) - left, Lengths(key_lengths, key.size(2)), Bias(bias)},
        static_cast<float>(scale), static_cast<float>(hidden)};
    for_each_row(kernel, positions * geometry.group, band.size(3), band);
  });
}

}  // namespace attnreg
