// mend_rows and mend_rows_by_key: rows that no block gives, or that another sequence may have spoilt, computed as they
// are defined, in fp32.
//
// mend_rows:        out[i] = scale * sum over visible slots c of band[i, c] * source[key of c].
// mend_rows_by_key: out[j] = scale * sum over the heads of the group and the queries i that see key j of
//                   band[i, slot of j] * source[i].
// No block gives the edge rows of the line. Near the ends of a sequence a block may have columns of another one, with
// weight zero: an infinity or NaN there times that zero is NaN, so that what is not finite is computed anew. Everything
// else is left as it is.
#pragma once

#include "band.cuh"

namespace attnreg {

// x . y of the pairs that load(c, x, y) gives for c in [begin, end), in eight sums. All eight loads are under way together:
// nothing branches on what is in range or visible, what is not counts as zero.
template <class T, class Load>
__host__ __device__ inline float sum_products(int begin, int end, const Load& load) {
  float sums[kAtOnce] = {};
  for (int first = begin; first < end; first += kAtOnce) {
    T x[kAtOnce], y[kAtOnce];
    bool counts[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int c = first + k < end ? first + k : end - 1;
      counts[k] = load(c, x[k], y[k]) && c == first + k;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const float product = static_cast<float>(x[k]) * static_cast<float>(y[k]);
      sums[k] += counts[k] ? product : 0.0f;
    }
  }
#pragma unroll
  for (int half = kAtOnce / 2; half > 0; half /= 2) {
#pragma unroll
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  return sums[0];
}

template <class T, bool kBias, bool kByKey>
struct Mend {
  Geometry geometry;
  Rows<const T> band, source;
  Rows<T> output;
  Visibility<kBias> visibility;
  EdgePieces edges;
  Divisor heads;  // of a position: one by key, those of the group by query
  Divisor ends;
  float scale;

  __host__ __device__ void operator()(int32_t row, int lane, int lanes) const {
    const bool edge = row < edges.count;
    int begin = 0, end = static_cast<int>(output.width);
    if (edge) {
      begin = edges.pop(row);
      end = begin + edges.columns < end ? begin + edges.columns : end;
    } else {
      row -= edges.count;
    }
    const int32_t g = heads.pop(row);
    const int32_t at = edge ? 0 : geometry.end_place(ends.pop(row));
    const int32_t x = edge ? geometry.edge_place(row) : row * geometry.pitch.size() + at;
    if (!edge && !geometry.owned(x)) return;
    const auto place = geometry.place(x);
    const int32_t l = place.at - (kByKey ? geometry.key_lead : geometry.query_lead);
    if (l < 0 || l >= output.length) return;
    T* to = output.row(place.n, place.kv_head * heads.size() + g, l);
    for (int first = begin + lane; first < end; first += kAtOnce * lanes) {
      T given[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) given[k] = first + k * lanes < end && !edge ? to[first + k * lanes] : T(0.0f);
      unsigned wanted = 0;
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const bool wrong = edge || !isfinite(static_cast<float>(given[k]));
        wanted |= static_cast<unsigned>(first + k * lanes < end && wrong) << k;
      }
      for (int e = first; wanted != 0; e += lanes, wanted >>= 1) {
        if (wanted & 1) to[e] = T(scale * (kByKey ? of_key(place, l, e) : of_query(place, g, l, e)));
      }
    }
  }

 private:
  // Element e of query i.
  __host__ __device__ float of_query(const Geometry::Place& place, int32_t g, int32_t i, int e) const {
    const int32_t h = place.kv_head * geometry.group.size() + g;
    const T* weights = band.row(place.n, h, i);
    const auto seen = visibility.row(place.n, h, i);
    const T* elements = source.row(place.n, place.kv_head, seen.first_key) + e;
    return sum_products<T>(seen.begin, seen.end, [&](int c, T& weight, T& element) {
      weight = weights[c];
      element = elements[c * source.stride_i];
      return !visibility.hides(place.n, h, i, c);
    });
  }

  // Element e of key j. Query i sees it in slot j - shift - i.
  __host__ __device__ float of_key(const Geometry::Place& place, int32_t j, int e) const {
    if (j >= visibility.lengths[place.n]) return 0;
    const int64_t last = j - visibility.shift;
    const int64_t begin = last - band.width + 1 > 0 ? last - band.width + 1 : 0;
    const int64_t end = last + 1 < band.length ? last + 1 : band.length;
    float sum = 0;
    for (int g = 0; g < geometry.group.size(); ++g) {
      const int32_t h = place.kv_head * geometry.group.size() + g;
      sum += sum_products<T>(static_cast<int>(begin), static_cast<int>(end), [&](int i, T& weight, T& element) {
        const int c = static_cast<int>(last - i);
        weight = band.row(place.n, h, i)[c];
        element = source.row(place.n, h, i)[e];
        return !visibility.hides(place.n, h, i, c);
      });
    }
    return sum;
  }
};

template <bool kByKey>
void run_mend(const Tensor& band, const Tensor& source, const Tensor& output, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& key_lengths, const std::vector<int64_t>& numbers, int64_t keys, int64_t left,
              double scale) {
  const Geometry geometry(numbers);
  const int64_t sequences = output.size(0) * geometry.kv_heads.size();
  const int64_t heads = output.size(1) / geometry.kv_heads.size();
  const int lanes = lanes_of(output.size(3));
  const EdgePieces edges(geometry.edge_rows(sequences) * heads, output.size(3), lanes);
  dispatch_dtype(band.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto visibility) {
      const Mend<T, visibility.kHasBias, kByKey> kernel{
          geometry,   read_rows<T>(band), read_rows<T>(source), write_rows<T>(output),
          visibility, edges,              Divisor(heads),       Divisor(geometry.ends()),
          static_cast<float>(scale)};
      for_each_row(kernel, edges.count + sequences * geometry.ends() * heads, lanes, output);
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
