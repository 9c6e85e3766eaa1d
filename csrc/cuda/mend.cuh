// mend_rows and mend_rows_by_key: rows that no block gives, or that another sequence may have spoilt, computed as they
// are defined, in fp32.
//
// mend_rows:        out[i] = scale * sum over visible slots c of band[i, c] * source[key of c].
// mend_rows_by_key: out[j] = scale * sum over the heads of the group and the queries i that see key j of
//                   band[i, slot of j] * source[i].
// No block gives the edge rows of the line. Near the ends of a sequence a block may have columns of another one, and anywhere
// such that a bias hides, with weight zero: an infinity or NaN there times that zero is NaN. So what is not finite is computed
// anew from what is visible: near the ends, and in every row where there is a bias. Everything else is left as it is.
#pragma once

#include <algorithm>

#include "access.cuh"
#include "band.cuh"

namespace attnreg {

template <class T, bool kBias, bool kByKey>
struct Mend {
  static constexpr int kVector = kAccessBytes / sizeof(T);

  Geometry geometry;
  Rows<const T> band, source;
  Rows<T> output;
  Visibility<kBias> visibility;
  Divisor heads;  // of a position: one by key, those of the group by query
  Divisor ends;      // rows of a sequence that are looked at
  EdgePieces edges;  // of kVector columns
  bool aligned;      // whether every row of the source begins where an access may
  float scale;

  __host__ __device__ void operator()(int32_t row, int lane, int lanes) const {
    if (row < edges.count) {
      const int32_t e = edges.pop(row);
      const int32_t g = heads.pop(row);
      return mend(geometry.edge_place(row), g, e, e + kVector, /*all=*/true, lane, lanes);
    }
    row -= edges.count;
    const int32_t g = heads.pop(row);
    const int32_t index = ends.pop(row);
    const int32_t at = kBias ? index : geometry.end_place(index);
    const int32_t x = row * geometry.pitch.size() + at;
    if (geometry.owned(x)) mend(x, g, 0, static_cast<int32_t>(output.width), /*all=*/false, lane, lanes);
  }

 private:
  // Computes columns [begin, end) of an output row: all, or those that are not finite. The lanes share the sums.
  __host__ __device__ void mend(int32_t x, int32_t g, int32_t begin, int32_t end, bool all, int lane, int lanes) const {
    const auto place = geometry.place(x);
    const int32_t l = place.at - (kByKey ? geometry.key_lead : geometry.query_lead);
    if (l < 0 || l >= output.length) return;
    T* to = output.row(place.n, place.kv_head * heads.size() + g, l);
    if (end > output.width) end = static_cast<int32_t>(output.width);
    if (!all) {
      bool wrong = false;
      for (int32_t e = begin + lane; e < end; e += lanes) wrong |= !isfinite(static_cast<float>(to[e]));
      if (!across_lanes(static_cast<int>(wrong), lanes, [](int a, int b) { return a | b; })) return;
    }
    for (int32_t e = begin; e < end; e += kVector) {
      float sums[kVector] = {};
      const int count = end - e < kVector ? end - e : kVector;
      if constexpr (kByKey) {
        add_queries(place, l, e, count, sums, lane, lanes);
      } else {
        add_keys(place, g, l, e, count, sums, lane, lanes);
      }
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        sums[k] = across_lanes(sums[k], lanes, [](float a, float b) { return a + b; });
      }
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        const bool mine = lane == 0 && k < count;
        if (mine && (all || !isfinite(static_cast<float>(to[e + k])))) to[e + k] = T(scale * sums[k]);
      }
    }
  }

  // sums += band[i, c] * source[key of c] for a lane's visible slots c.
  __host__ __device__ void add_keys(const Geometry::Place& place, int32_t g, int32_t i, int32_t e, int count,
                                    float* sums, int lane, int lanes) const {
    const int32_t h = place.kv_head * geometry.group.size() + g;
    const T* weights = band.row(place.n, h, i);
    const auto seen = visibility.row(place.n, h, i);
    for (int c = seen.begin + lane; c < seen.end; c += lanes) {
      float bias;
      if (!visibility.sees(seen, c, bias)) continue;
      add(static_cast<float>(weights[c]), source.row(place.n, place.kv_head, seen.first_key + c) + e, count, sums);
    }
  }

  // sums += band[i, slot of j] * source[i] for a lane's queries i, of all heads, that see key j, in slot j - shift - i.
  __host__ __device__ void add_queries(const Geometry::Place& place, int32_t j, int32_t e, int count, float* sums,
                                       int lane, int lanes) const {
    const int64_t last = j - visibility.shift;
    const int64_t begin = last - band.width + 1 > 0 ? last - band.width + 1 : 0;
    const int64_t end = last + 1 < band.length ? last + 1 : band.length;
    for (int g = 0; g < geometry.group.size(); ++g) {
      const int32_t h = place.kv_head * geometry.group.size() + g;
      for (int64_t i = begin + lane; i < end; i += lanes) {
        float bias;
        const int c = static_cast<int>(last - i);
        if (!visibility.sees(visibility.row(place.n, h, i), c, bias)) continue;
        add(static_cast<float>(band.row(place.n, h, i)[c]), source.row(place.n, h, i) + e, count, sums);
      }
    }
  }

  __host__ __device__ void add(float weight, const T* elements, int count, float* sums) const {
    if (aligned && count == kVector) {
      const auto vector = load_vector<kVector>(elements);
#pragma unroll
      for (int k = 0; k < kVector; ++k) sums[k] += weight * static_cast<float>(vector.at[k]);
      return;
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      if (k < count) sums[k] += weight * static_cast<float>(elements[k]);
    }
  }
};

template <bool kByKey>
void run_mend(const Tensor& band, const Tensor& source, const Tensor& output, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& key_lengths, const std::vector<int64_t>& numbers, int64_t keys, int64_t left,
              double scale) {
  const Geometry geometry(numbers);
  const int64_t sequences = output.size(0) * geometry.kv_heads.size();
  const int64_t heads = output.size(1) / geometry.kv_heads.size();
  const bool aligned = access_bytes(source) == kAccessBytes;
  dispatch_dtype(band.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto visibility) {
      using Kernel = Mend<T, visibility.kHasBias, kByKey>;
      const EdgePieces edges(geometry.all_edge_rows() * heads, output.size(3), Kernel::kVector);
      const int64_t ends = visibility.kHasBias ? geometry.pitch.size() : geometry.ends();
      const Kernel kernel{geometry,   read_rows<T>(band), read_rows<T>(source), write_rows<T>(output),
                          visibility, Divisor(heads),     Divisor(ends),        edges,
                          aligned,    static_cast<float>(scale)};
      const int lanes = lanes_of(std::max(band.size(3), output.size(3)));
      for_each_row(kernel, edges.count + sequences * ends * heads, lanes, output);
    };
    dispatch_visibility(band, keys, left, bias, key_lengths, run);
  });
}

inline void mend_rows(Tensor band, Tensor source, Tensor output, std::optional<Tensor> bias,
                      std::optional<Tensor> key_lengths, std::vector<int64_t> numbers, int64_t keys, int64_t left,
                      double scale) {
  run_mend<false>(band, source, output, bias, key_lengths, numbers, keys, left, scale);
}

inline void mend_rows_by_key(Tensor band, Tensor source, Tensor output, std::optional<Tensor> bias,
                             std::optional<Tensor> key_lengths, std::vector<int64_t> numbers, int64_t keys,
                             int64_t left, double scale) {
  run_mend<true>(band, source, output, bias, key_lengths, numbers, keys, left, scale);
}

}  // namespace attnreg
