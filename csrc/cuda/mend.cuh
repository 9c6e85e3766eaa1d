// mend_rows and mend_rows_by_key: rows that no block gives, or that another sequence may have spoilt, computed as they
// are defined, in fp32.
//
// mend_rows:        out[i] = scale * sum over visible slots c of band[i, c] * source[key of c].
// mend_rows_by_key: out[j] = scale * sum over the heads of the group and the queries i that see key j of
//                   band[i, slot of j] * source[i].
// No block gives the edge rows of the line. Near the ends of a sequence a block may have columns of another one, where lengths,
// starts or offsets say what rows see also such that no row sees, and anywhere such that a bias hides, with weight zero: an
// infinity or NaN there times that zero is NaN. So what is not finite is computed anew from what is visible: near the ends; where
// only a GPU can tell where these are, in every row whose block is not all clean; and in every row where there is a bias.
// Everything else is left as it is.
#pragma once

#include <algorithm>

#include "access.cuh"
#include "band.cuh"

namespace attnreg {

// Neighbours of which it is asked together whether their blocks are clean: most are.
constexpr int32_t kRun = 8;

template <class T, class Visibility, bool kByKey>
struct Mend {
  static constexpr bool kBias = Visibility::kHasBias, kGiven = Visibility::kHasGiven;
  static constexpr int kVector = kAccessBytes / sizeof(T);

  Geometry geometry;
  Rows<const T> band, source;
  Rows<T> output;
  Visibility visibility;
  Divisor heads;  // of a position: one by key, those of the group by query
  Divisor ends;      // of a sequence the runs of rows that are looked at
  int32_t run;       // the rows of one
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
    int32_t begin = kBias ? index : geometry.end_place(index), count = 1;
    if constexpr (!kBias && kGiven) {
      begin = index * run;
      count = geometry.pitch.size() - begin < run ? geometry.pitch.size() - begin : run;
      if (clean(row * geometry.pitch.size() + begin, count)) return;
    }
    int32_t x = row * geometry.pitch.size() + begin;
#pragma unroll 1
    for (; count > 0; ++x, --count) {
      if (geometry.owned(x)) mend(x, g, 0, static_cast<int32_t>(output.width), /*all=*/false, lane, lanes);
    }
  }

 private:
  // The source rows of use for output rows that see, or are seen, as row l does.
  __host__ __device__ Bounds sources(int64_t n, int64_t l) const {
    const Bounds seen = visibility.keys.bounds(n, l);
    if (!kByKey || visibility.keys.packed() || seen.empty()) return seen;
    const int64_t first_key = visibility.shift + visibility.keys.start(n);
    return {between(seen.low - first_key - visibility.width + 1, 0, band.length),
            between(seen.high - first_key, 0, band.length)};
  }

  // Whether the blocks of `count` rows of a sequence have columns for nothing but source rows that are of use for all of them.
  __host__ __device__ bool clean(int32_t x, int32_t count) const {
    if (!geometry.owned(x) || !geometry.owned(x + count - 1)) return false;
    const auto place = geometry.place(x);
    const int64_t start = visibility.keys.start(place.n);
    const int64_t as_query = place.at - geometry.query_lead, as_key = place.at - geometry.key_lead + start;
    const Bounds used = sources(place.n, kByKey ? as_key : as_query);
    const auto columns = geometry.columns_of(x, count);
    const int64_t source = kByKey ? as_query : as_key;
    return source + columns.begin >= used.low && source + columns.end <= used.high;
  }

  // Computes columns [begin, end) of an output row: all, or those that are not finite. The lanes share the sums.
  __host__ __device__ void mend(int32_t x, int32_t g, int32_t begin, int32_t end, bool all, int lane, int lanes) const {
    const auto place = geometry.place(x);
    const int64_t l = kByKey ? place.at - geometry.key_lead + visibility.keys.start(place.n)
                             : int64_t{place.at} - geometry.query_lead;
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
  __host__ __device__ void add_keys(const Geometry::Place& place, int32_t g, int64_t i, int32_t e, int count,
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

  // sums += band[i, slot of j] * source[i] for a lane's queries i, of all heads, that see key j, in slot j - shift - start - i.
  __host__ __device__ void add_queries(const Geometry::Place& place, int64_t j, int32_t e, int count, float* sums,
                                       int lane, int lanes) const {
    const int64_t last = j - visibility.shift - visibility.keys.start(place.n);
    const Bounds used = kGiven ? sources(place.n, j) : Bounds{0, band.length};
    const int64_t begin = last - band.width + 1 > used.low ? last - band.width + 1 : used.low;
    const int64_t end = last + 1 < used.high ? last + 1 : used.high;
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
              const Given& given, const std::vector<int64_t>& numbers, int64_t keys, int64_t left,
              double scale) {
  const Geometry geometry(numbers);
  const int64_t sequences = output.size(0) * geometry.kv_heads.size();
  const int64_t heads = output.size(1) / geometry.kv_heads.size();
  const bool aligned = access_bytes(source) == kAccessBytes;
  dispatch_dtype(band.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto visibility) {
      using Kernel = Mend<T, decltype(visibility), kByKey>;
      const EdgePieces edges(geometry.all_edge_rows() * heads, output.size(3), Kernel::kVector);
      const bool everywhere = visibility.kHasBias || visibility.kHasGiven;
      const int32_t run_of_rows = visibility.kHasBias || !everywhere ? 1 : kRun;
      const int64_t ends = everywhere ? (geometry.pitch.size() + run_of_rows - 1) / run_of_rows : geometry.ends();
      const Kernel kernel{geometry,   read_rows<T>(band), read_rows<T>(source), write_rows<T>(output),
                          visibility, Divisor(heads),     Divisor(ends),        run_of_rows,
                          edges,      aligned,            static_cast<float>(scale)};
      const int lanes = lanes_of(std::max(band.size(3), output.size(3)));
      for_each_row(kernel, edges.count + sequences * ends * heads, lanes, output);
    };
    dispatch_visibility(band, keys, geometry.shift(left), bias, given, run);
  });
}

inline void mend_rows(Tensor band, Tensor source, Tensor output, std::optional<Tensor> bias,
                      Given given, std::vector<int64_t> numbers, int64_t keys, int64_t left, double scale) {
  run_mend<false>(band, source, output, bias, given, numbers, keys, left, scale);
}

inline void mend_rows_by_key(Tensor band, Tensor source, Tensor output, std::optional<Tensor> bias,
                             Given given, std::vector<int64_t> numbers, int64_t keys, int64_t left,
                             double scale) {
  run_mend<true>(band, source, output, bias, given, numbers, keys, left, scale);
}

}  // namespace attnreg
