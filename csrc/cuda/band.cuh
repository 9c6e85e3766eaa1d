// The band: slot c of query row i is key j = i + shift + start + c, visible iff the row may see it and its bias is not -inf.
#pragma once

#include <cfloat>
#include <cmath>
#include <optional>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "geometry.cuh"
#include "keys.cuh"

namespace attnreg {

// Calls run(T{}) with the C++ type of a dtype that scores and weights may have.
template <class Run>
void dispatch_dtype(ScalarType dtype, const Run& run) {
  switch (dtype) {
    case ScalarType::Float: return run(float{});
    case ScalarType::Half: return run(__half{});
    case ScalarType::BFloat16: return run(__nv_bfloat16{});
    default: STD_TORCH_CHECK(false, "attnreg cublas_block: dtype must be float32, float16 or bfloat16");
  }
}

// The least finite number of a dtype.
template <class T>
__host__ __device__ constexpr float lowest_number() {
  return std::is_same_v<T, __half> ? -65504.0f : std::is_same_v<T, __nv_bfloat16> ? -0x1.fep127f : -FLT_MAX;
}

// A dimension of size 1 broadcasts, whatever stride it carries.
inline int64_t broadcast_stride(const Tensor& tensor, int64_t dim) {
  return tensor.size(dim) == 1 ? 0 : tensor.stride(dim);
}

// Additive bias of any floating-point dtype, read through strides that are 0 where it broadcasts.
struct Bias {
  const void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t stride_n = 0, stride_h = 0, stride_i = 0, stride_c = 0;

  explicit Bias(const std::optional<Tensor>& bias) {
    if (!bias) return;
    data = bias->const_data_ptr();
    dtype = bias->scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
                        dtype == ScalarType::Double,
                    "attnreg cublas_block: bias must be a floating-point tensor");
    stride_n = broadcast_stride(*bias, 0);
    stride_h = broadcast_stride(*bias, 1);
    stride_i = broadcast_stride(*bias, 2);
    stride_c = broadcast_stride(*bias, 3);
  }

  // The value at an offset; `hidden` tells whether it is -inf. A finite float64 beyond float's range stays finite: it hides nothing.
  __host__ __device__ float read(int64_t offset, bool& hidden) const {
    float value = 0;
    if (dtype == ScalarType::Double) {
      const double wide = static_cast<const double*>(data)[offset];
      hidden = wide == -INFINITY;
      const float narrow = static_cast<float>(wide);
      return isinf(narrow) && !isinf(wide) ? copysignf(FLT_MAX, narrow) : narrow;
    }
    if (dtype == ScalarType::Float) value = static_cast<const float*>(data)[offset];
    if (dtype == ScalarType::Half) value = __half2float(static_cast<const __half*>(data)[offset]);
    if (dtype == ScalarType::BFloat16) value = __bfloat162float(static_cast<const __nv_bfloat16*>(data)[offset]);
    hidden = value == -INFINITY;
    return value;
  }
};

// What decides which slots of the band are visible. Most calls have no bias, and their kernels no code for it.
template <bool kBias, bool kGiven>
struct Visibility {
  static constexpr bool kHasBias = kBias, kHasGiven = kGiven;
  int32_t batch;
  int64_t width;  // of the band
  int64_t shift;  // the key of slot 0 in row 0, less the start of the sequence
  KeysOfRows<kGiven> keys;
  Bias bias;

  // One row of the band: slot 0 is key `first_key`, slots [begin, end) are keys that it may see, or there are none.
  struct Row {
    int64_t first_key;
    int begin, end;
    int64_t bias_offset;
  };

  __host__ __device__ Row row(int64_t n, int64_t h, int64_t i) const {
    const int64_t first_key = i + shift + keys.start(n);
    const Bounds seen = keys.bounds(n, i);
    const int64_t begin = seen.low - first_key > 0 ? seen.low - first_key : 0;
    const int64_t end = seen.high - first_key < width ? seen.high - first_key : width;
    if (begin >= end) return {first_key, 0, 0, 0};
    return {first_key, static_cast<int>(begin), static_cast<int>(end),
            n * bias.stride_n + h * bias.stride_h + i * bias.stride_i};
  }

  __host__ __device__ static Row nothing() { return {0, 0, 0, 0}; }

  // Whether slot c is visible, and its bias (0 where there is none).
  __host__ __device__ bool sees(const Row& row, int c, float& bias_value) const {
    bias_value = 0;
    if (static_cast<unsigned>(c - row.begin) >= static_cast<unsigned>(row.end - row.begin)) return false;
    bool hidden = false;
    if constexpr (kBias) bias_value = bias.read(row.bias_offset + c * bias.stride_c, hidden);
    return !hidden;
  }
};

// Calls run with what decides in a call, of the type that it needs.
template <class Run>
void dispatch_visibility(const Tensor& band, int64_t keys, int64_t shift, const std::optional<Tensor>& bias,
                         const Given& given, const Run& run) {
  const auto batch = static_cast<int32_t>(band.size(0));
  const auto with = [&](auto has_bias, auto has_given) {
    run(Visibility<has_bias(), has_given()>{batch, band.size(3), shift, KeysOfRows<has_given()>(given, keys), Bias(bias)});
  };
  if (bias && given.empty()) return with(std::true_type{}, std::false_type{});
  if (bias) return with(std::true_type{}, std::true_type{});
  if (given.empty()) return with(std::false_type{}, std::false_type{});
  with(std::false_type{}, std::true_type{});
}

// A tensor (N, H, L, W or E) with unit stride along its last dimension.
template <class T>
struct Rows {
  T* data;
  int64_t heads, length, width, stride_n, stride_h, stride_i;

  Rows(const Tensor& tensor, T* data)
      : data(data), heads(tensor.size(1)), length(tensor.size(2)), width(tensor.size(3)), stride_n(tensor.stride(0)),
        stride_h(tensor.stride(1)), stride_i(tensor.stride(2)) {
    STD_TORCH_CHECK(tensor.dim() == 4 && (width <= 1 || tensor.stride(3) == 1),
                    "attnreg cublas_block: a tensor needs four dimensions, the last one contiguous");
  }

  __host__ __device__ T* row(int64_t n, int64_t h, int64_t i) const {
    return data + n * stride_n + h * stride_h + i * stride_i;
  }
};

template <class T>
const T* read(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <class T>
Rows<const T> read_rows(const Tensor& tensor) {
  return {tensor, static_cast<const T*>(tensor.const_data_ptr())};
}

template <class T>
Rows<T> write_rows(const Tensor& tensor) {
  return {tensor, static_cast<T*>(tensor.mutable_data_ptr())};
}

}  // namespace attnreg
