// average_rows and average_rows_by_key: the rows of an average that no block product gives, as they are defined.
//
// average_rows:        out[i] = scale * sum over visible slots c of band[i, c] * source[key of c].
// average_rows_by_key: out[j] = scale * sum over the heads of the group and the queries i that see key j of
//                      band[i, slot of j] * source[i].
// Those are the rows of blocks without a dense result; and where a block has columns of another sequence, with weight
// zero, the rows that are not finite: an infinity times that zero may have come from there.
#pragma once

#include "band.cuh"

namespace attnreg {

template <class T>
struct AverageRows {
  Geometry geometry;
  Rows<const T> band, source;
  Rows<T> output;
  Visibility visibility;
  float scale;

  __host__ __device__ void operator()(int64_t row, int lane, int lanes) const {
    const int64_t i = pop(row, output.length);
    const int64_t h = pop(row, output.heads);
    const int64_t n = row;
    const int64_t start = geometry.start(n, h), x = start + geometry.query_lead + i;
    T* to = output.row(n, h, i);
    if (geometry.has_dense(x) && !geometry.meets_another(x, start)) return;
    const T* weights = band.row(n, h, i);
    const auto seen = visibility.row(n, h, i);
    for (int64_t e = lane; e < output.width; e += lanes) {
      if (geometry.has_dense(x) && isfinite(static_cast<float>(to[e]))) continue;
      float sum = 0, bias;
      for (int c = seen.begin; c < seen.end; ++c) {
        if (!visibility.sees(seen, c, bias)) continue;
        const T* from = source.row(n, h / geometry.group, seen.first_key + c);
        sum += static_cast<float>(weights[c]) * static_cast<float>(from[e]);
      }
      to[e] = T(scale * sum);
    }
  }
};

template <class T>
struct AverageRowsByKey {
  Geometry geometry;
  Rows<const T> band, source;
  Rows<T> output;
  Visibility visibility;
  float scale;

  __host__ __device__ void operator()(int64_t row, int lane, int lanes) const {
    const int64_t j = pop(row, output.length);
    const int64_t kv_head = pop(row, output.heads);
    const int64_t n = row;
    const int64_t start = geometry.start(n, kv_head * geometry.group), x = start + geometry.key_lead + j;
    if (x < start) return;  // no query sees it
    T* to = output.row(n, kv_head, j);
    if (geometry.has_dense(x) && !geometry.meets_another(x, start)) return;
    // Query i sees the key in slot j - shift - i.
    const int64_t last = j - visibility.shift;
    const int64_t begin = last - band.width + 1 > 0 ? last - band.width + 1 : 0;
    const int64_t end = last + 1 < band.length ? last + 1 : band.length;
    for (int64_t e = lane; e < output.width; e += lanes) {
      if (geometry.has_dense(x) && isfinite(static_cast<float>(to[e]))) continue;
      float sum = 0, bias;
      for (int64_t g = 0; g < geometry.group; ++g) {
        const int64_t h = kv_head * geometry.group + g;
        for (int64_t i = begin; i < end; ++i) {
          const int c = static_cast<int>(last - i);
          if (!visibility.sees(visibility.row(n, h, i), c, bias)) continue;
          sum += static_cast<float>(band.row(n, h, i)[c]) * static_cast<float>(source.row(n, h, i)[e]);
        }
      }
      to[e] = T(scale * sum);
    }
  }
};

template <template <class> class Kernel>
void run_average_rows(const Tensor& band, const Tensor& source, const Tensor& output, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& key_lengths, const std::vector<int64_t>& numbers, int64_t keys,
                      int64_t left, double scale) {
  dispatch_dtype(band.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Kernel<T> kernel{Geometry(numbers), read_rows<T>(band), read_rows<T>(source), write_rows<T>(output),
                           Visibility{band.size(0), band.size(3), keys - band.size(2) - left,
                                      Lengths(key_lengths, keys), Bias(bias)},
                           static_cast<float>(scale)};
    for_each_row(kernel, output.size(0) * output.size(1) * output.size(2), output.size(3), output);
  });
}

inline void average_rows(Tensor band, Tensor source, Tensor output, std::optional<Tensor> bias,
                         std::optional<Tensor> key_lengths, std::vector<int64_t> numbers, int64_t keys, int64_t left,
                         double scale) {
  run_average_rows<AverageRows>(band, source, output, bias, key_lengths, numbers, keys, left, scale);
}

inline void average_rows_by_key(Tensor band, Tensor source, Tensor output, std::optional<Tensor> bias,
                                std::optional<Tensor> key_lengths, std::vector<int64_t> numbers, int64_t keys,
                                int64_t left, double scale) {
  run_average_rows<AverageRowsByKey>(band, source, output, bias, key_lengths, numbers, keys, left, scale);
}

}  // namespace attnreg
