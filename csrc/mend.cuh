// mend_rows and mend_rows_by_key: what another sequence may have spoilt, computed as it is defined.
//
// mend_rows:        out[i] = scale * sum over visible slots c of band[i, c] * source[key of c].
// mend_rows_by_key: out[j] = scale * sum over the heads of the group and the queries i that see key j of
//                   band[i, slot of j] * source[i].
// Near the ends of a sequence a block may have columns of another one, with weight zero. An infinity or NaN there times
// that zero is NaN, so that what is not finite is computed anew. Everything else is left as it is.
#pragma once

#include "band.cuh"

namespace attnreg {

template <class T, bool kBias>
struct MendRows {
  Geometry geometry;
  Rows<const T> band, source;
  Rows<T> output;
  Visibility<kBias> visibility;
  Divisor ends;
  float scale;

  __host__ __device__ void operator()(int32_t row, int lane, int lanes) const {
    const int32_t g = geometry.group.pop(row);
    const int32_t at = geometry.end_place(ends.pop(row)), i = at - geometry.query_lead;
    const int32_t kv_head = geometry.kv_heads.pop(row), n = row;
    if (i < 0 || i >= output.length) return;
    const int32_t h = kv_head * geometry.group.size() + g;
    T* to = output.row(n, h, i);
    for (int64_t e = lane; e < output.width; e += lanes) {
      if (isfinite(static_cast<float>(to[e]))) continue;
      const T* weights = band.row(n, h, i);
      const auto seen = visibility.row(n, h, i);
      float sum = 0, bias;
      for (int c = seen.begin; c < seen.end; ++c) {
        if (!visibility.sees(seen, c, bias)) continue;
        sum += static_cast<float>(weights[c]) * static_cast<float>(source.row(n, kv_head, seen.first_key + c)[e]);
      }
      to[e] = T(scale * sum);
    }
  }
};

template <class T, bool kBias>
struct MendRowsByKey {
  Geometry geometry;
  Rows<const T> band, source;
  Rows<T> output;
  Visibility<kBias> visibility;
  Divisor ends;
  float scale;

  __host__ __device__ void operator()(int32_t row, int lane, int lanes) const {
    const int32_t j = geometry.end_place(ends.pop(row)) - geometry.key_lead;
    const int32_t kv_head = geometry.kv_heads.pop(row), n = row;
    if (j < 0 || j >= output.length) return;
    T* to = output.row(n, kv_head, j);
    // Query i sees the key in slot j - shift - i.
    const int64_t last = j - visibility.shift;
    const int64_t begin = last - band.width + 1 > 0 ? last - band.width + 1 : 0;
    const int64_t end = last + 1 < band.length ? last + 1 : band.length;
    for (int64_t e = lane; e < output.width; e += lanes) {
      if (isfinite(static_cast<float>(to[e]))) continue;
      float sum = 0, bias;
      for (int g = 0; g < geometry.group.size(); ++g) {
        const int32_t h = kv_head * geometry.group.size() + g;
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

template <template <class, bool> class Kernel>
void run_mend(const Tensor& band, const Tensor& source, const Tensor& output, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& key_lengths, const std::vector<int64_t>& numbers, int64_t keys,
                      int64_t left, double scale) {
  const Geometry geometry(numbers);
  const int64_t sequences = output.size(0) * geometry.kv_heads.size();
  const int64_t heads = output.size(1) / geometry.kv_heads.size();  // 1 by key, those of the group by query
  dispatch_dtype(band.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto visibility) {
      const Kernel<T, visibility.kHasBias> kernel{geometry, read_rows<T>(band), read_rows<T>(source),
                                                  write_rows<T>(output), visibility, Divisor(geometry.ends()),
                                                  static_cast<float>(scale)};
      for_each_row(kernel, sequences * geometry.ends() * heads, output.size(3), output);
    };
    dispatch_visibility(band, keys, left, bias, key_lengths, run);
  });
}

inline void mend_rows(Tensor band, Tensor source, Tensor output, std::optional<Tensor> bias,
                         std::optional<Tensor> key_lengths, std::vector<int64_t> numbers, int64_t keys, int64_t left,
                         double scale) {
  run_mend<MendRows>(band, source, output, bias, key_lengths, numbers, keys, left, scale);
}

inline void mend_rows_by_key(Tensor band, Tensor source, Tensor output, std::optional<Tensor> bias,
                                std::optional<Tensor> key_lengths, std::vector<int64_t> numbers, int64_t keys,
                                int64_t left, double scale) {
  run_mend<MendRowsByKey>(band, source, output, bias, key_lengths, numbers, keys, left, scale);
}

}  // namespace attnreg
