// gather_band: dense blocks -> band (N, H, Lq, W), for the positions of one chunk of blocks.
//
// The query at row r of its block has slot c in column r + c + diagonal: the band is the dense result read with a row
// pitch of S + 1. Bias is added here; invisible slots get `hidden`. Where the products were of factors, their scales
// are multiplied in. The launch for the first chunk also computes the edge rows, as they are defined, in fp32:
// band[i, c] = scale * query[i] . key[of slot c] + bias.
#pragma once

#include "access.cuh"
#include "band.cuh"

namespace attnreg {

template <class T, class Visibility>
struct GatherBand {
  Geometry geometry;
  const T* dense;  // of the blocks from `first_block` of `first_line` on: (blocks, rows, G, columns)
  int32_t first_line, first_block, left, diagonal;
  const float *query_scales, *key_scales;  // by position and head, and by position; null where there are none
  Rows<T> band;
  Visibility visibility;
  float scale, hidden;
  Rows<const T> query, key;
  bool aligned;  // whether every row of them begins where an access may
  EdgePieces edges;

  __host__ __device__ void operator()(int32_t row, int lane, int lanes) const {
    if (row < edges.count) return compute(row, lane, lanes);
    row -= edges.count;
    const T* from = dense + int64_t{row} * geometry.columns;
    const int32_t g = geometry.group.pop(row);
    const int32_t x = geometry.position(first_line, first_block * geometry.rows.size() + row);
    const auto place = geometry.place(x);
    const int32_t i = place.at - geometry.query_lead;
    if (i < 0 || i >= band.length || place.n >= visibility.batch) return;
    const int32_t h = place.kv_head * geometry.group.size() + g;
    T* __restrict__ to = band.row(place.n, h, i);
    const auto seen = visibility.row(place.n, h, i);
    const int width = static_cast<int>(band.width);
    const T* __restrict__ slots = from + geometry.rows.remainder(row) + diagonal;
    const auto store = [&](int c, T value) { to[c] = value; };
    if (query_scales == nullptr) {
      const auto load = [&](int c) {
        float bias;
        return visibility.sees(seen, c, bias) ? visible(static_cast<float>(slots[c]) + bias) : T(hidden);
      };
      return copy_columns(lane, lanes, width, load, store);
    }
    const float row_scale = scale * query_scales[int64_t{x} * geometry.group.size() + g];
    const float* __restrict__ scales = key_scales + (x - left);
    const auto load = [&](int c) {
      float bias;
      if (!visibility.sees(seen, c, bias)) return T(hidden);
      return visible(static_cast<float>(slots[c]) * row_scale * scales[c] + bias);
    };
    copy_columns(lane, lanes, width, load, store);
  }

 private:
  // One piece of an edge row. Its loops are not unrolled: that would take registers from all other rows.
  __host__ __device__ void compute(int32_t index, int lane, int lanes) const {
    const int32_t begin = edges.pop(index);
    const int32_t g = geometry.group.pop(index);
    const auto place = geometry.place(geometry.edge_place(index));
    const int32_t i = place.at - geometry.query_lead;
    if (i < 0 || i >= band.length) return;
    const int32_t h = place.kv_head * geometry.group.size() + g;
    const auto seen = visibility.row(place.n, h, i);
    const int width = static_cast<int>(band.width);
    const int end = begin + edges.columns < width ? begin + edges.columns : width;
#pragma unroll 1
    for (int c = begin + lane; c < end; c += lanes) {
      T value = T(hidden);
      float bias;
      if (visibility.sees(seen, c, bias)) {
        const T* key_row = key.row(place.n, place.kv_head, seen.first_key + c);
        value = visible(scale * product(query.row(place.n, h, i), key_row) + bias);
      }
      band.row(place.n, h, i)[c] = value;
    }
  }

  // A visible score is never -inf, which would hide it.
  __host__ __device__ T visible(float score) const {
    const bool below = hidden == -INFINITY && score < lowest_number<T>();
    return T(below ? lowest_number<T>() : score);
  }

  // x . y, in two sums.
  __host__ __device__ float product(const T* x, const T* y) const {
    constexpr int kVector = kAccessBytes / sizeof(T);
    const int width = static_cast<int>(query.width);
    float sums[2] = {};
    int e = 0;
    if (aligned) {
#pragma unroll 1
      for (; e + kVector <= width; e += kVector, x += kVector, y += kVector) {
        const auto left = load_vector<kVector>(x), right = load_vector<kVector>(y);
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          sums[k % 2] += static_cast<float>(left.at[k]) * static_cast<float>(right.at[k]);
        }
      }
    }
#pragma unroll 1
    for (; e < width; ++e, ++x, ++y) sums[0] += static_cast<float>(*x) * static_cast<float>(*y);
    return sums[0] + sums[1];
  }
};

inline void gather_band(Tensor query, Tensor key, Tensor dense, std::optional<Tensor> query_scales,
                        std::optional<Tensor> key_scales, Tensor band, std::optional<Tensor> bias,
                        Given given, std::vector<int64_t> numbers, int64_t first_line, int64_t first_block,
                        int64_t left, double scale, double hidden) {
  const Geometry geometry(numbers);
  STD_TORCH_CHECK(dense.is_contiguous() && dense.dim() == 3 && dense.scalar_type() == band.scalar_type() &&
                      query.scalar_type() == band.scalar_type() && key.scalar_type() == band.scalar_type(),
                  "attnreg cublas_block: gather_band got tensors that do not fit");
  const int lanes = lanes_of(band.size(3));
  const int64_t edge_rows = first_line == 0 && first_block == 0 ? geometry.all_edge_rows() : 0;
  const EdgePieces edges(edge_rows * geometry.group.size(), band.size(3), lanes);
  const bool aligned = access_bytes(query) == kAccessBytes && access_bytes(key) == kAccessBytes;
  dispatch_dtype(band.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto visibility) {
      const GatherBand<T, decltype(visibility)> kernel{
          geometry,
          static_cast<const T*>(dense.const_data_ptr()),
          static_cast<int32_t>(first_line),
          static_cast<int32_t>(first_block),
          static_cast<int32_t>(left),
          static_cast<int32_t>(geometry.before - left),
          read<float>(query_scales),
          read<float>(key_scales),
          write_rows<T>(band),
          visibility,
          static_cast<float>(scale),
          static_cast<float>(hidden),
          read_rows<T>(query),
          read_rows<T>(key),
          aligned,
          edges};
      for_each_row(kernel, edges.count + dense.size(0) * dense.size(1), lanes, band);
    };
    dispatch_visibility(band, key.size(2), geometry.shift(left), bias, given, run);
  });
}

}  // namespace attnreg
