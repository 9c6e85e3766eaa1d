// multiply: result = scale * left @ right + beta * result for the blocks of several lines, in one launch of cuBLAS.
//
// The blocks of one line are evenly spaced, and so are the lines, but cuBLAS takes one distance alone: it is told the address of
// every matrix instead. That spares the host a launch for each line, and copies of tensors whose heads lie side by side.
#pragma once

#include "band.cuh"

extern "C" {
// Weak, like torch's stream in rows.cuh. The cuBLAS is the one that torch has loaded; nvcc may come without its header.
__attribute__((weak)) AOTITorchError torch_get_current_cuda_blas_handle(void** handle);
__attribute__((weak)) int cublasSetMathMode(void* handle, int mode);
__attribute__((weak)) int cublasGemmBatchedEx(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha,
                                              const void* const* a, cudaDataType a_type, int a_pitch, const void* const* b,
                                              cudaDataType b_type, int b_pitch, const void* beta, void* const* c,
                                              cudaDataType c_type, int c_pitch, int count, int compute_type, int algorithm);
}

namespace attnreg {

// cublasOperation_t, cublasComputeType_t, cublasGemmAlgo_t and cublasMath_t.
constexpr int kPlain = 0, kTransposed = 1, kComputeFp32 = 68, kAnyAlgorithm = -1, kSumOnlyInFp32 = 16;

// The matrices (rows, columns) of a tensor (lines, blocks, rows, columns), row by row or column by column.
struct Matrices {
  int32_t rows, columns, pitch;
  bool transposed;
  int64_t address, per_line, per_block;  // in bytes

  explicit Matrices(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.dim() == 4 && (tensor.stride(3) == 1 || tensor.stride(2) == 1),
                    "attnreg cublas_block: multiply got matrices without a dimension of stride 1");
    rows = size(tensor.size(2));
    columns = size(tensor.size(3));
    transposed = tensor.stride(3) != 1;
    const int32_t least = transposed ? rows : columns, found = size(tensor.stride(transposed ? 3 : 2));
    pitch = found > least ? found : least;  // of a single row it says nothing
    const auto element = static_cast<int64_t>(tensor.element_size());
    address = static_cast<int64_t>(reinterpret_cast<intptr_t>(tensor.const_data_ptr()));
    per_line = tensor.stride(0) * element;
    per_block = tensor.stride(1) * element;
  }

  int op() const { return transposed ? kTransposed : kPlain; }

  // How far element (row, column) is from the first one.
  int64_t offset(int32_t row, int32_t column) const {
    return transposed ? int64_t{column} * pitch + row : int64_t{row} * pitch + column;
  }

 private:
  static int32_t size(int64_t number) {
    STD_TORCH_CHECK(number >= 0 && number <= INT32_MAX, "attnreg cublas_block: multiply got a size or stride of ", number);
    return static_cast<int32_t>(number);
  }
};

// The addresses of the left, the right and the resulting matrices, one list after the other.
struct Addresses {
  Matrices left, right, result;
  Divisor blocks;
  int64_t* lists;
  int32_t count;

  __host__ __device__ void operator()(int32_t row, int, int) const {
    int32_t line = row;
    const int32_t block = blocks.pop(line);
    const auto at = [&](const Matrices& of) { return of.address + line * of.per_line + block * of.per_block; };
    lists[row] = at(left);
    lists[count + row] = at(right);
    lists[2 * count + row] = at(result);
  }
};

// On the host.
template <class T>
void multiply_plainly(const Addresses& kernel, float scale, float beta) {
  for (int32_t index = 0; index < kernel.count; ++index) {
    const T* left = reinterpret_cast<const T*>(kernel.lists[index]);
    const T* right = reinterpret_cast<const T*>(kernel.lists[kernel.count + index]);
    T* result = reinterpret_cast<T*>(kernel.lists[2 * kernel.count + index]);
    for (int32_t row = 0; row < kernel.result.rows; ++row) {
      for (int32_t column = 0; column < kernel.result.columns; ++column) {
        float sum = 0;
        for (int32_t k = 0; k < kernel.left.columns; ++k) {
          sum += static_cast<float>(left[kernel.left.offset(row, k)]) *
                 static_cast<float>(right[kernel.right.offset(k, column)]);
        }
        T& into = result[kernel.result.offset(row, column)];
        into = T(scale * sum + (beta == 0 ? 0.0f : beta * static_cast<float>(into)));
      }
    }
  }
}

inline void multiply_by_cublas(const Addresses& kernel, cudaDataType type, int64_t device, float scale, float beta) {
  STD_TORCH_CHECK(torch_get_current_cuda_blas_handle != nullptr && cublasSetMathMode != nullptr &&
                      cublasGemmBatchedEx != nullptr,
                  "attnreg cublas_block: this torch has no cuBLAS");
  const torch::stable::accelerator::DeviceGuard guard(static_cast<torch::stable::accelerator::DeviceIndex>(device));
  void* handle = nullptr;
  // On the current stream; in fp32 as torch's precision setting has it.
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  // Torch sets it anew for its own products.
  int status = type == CUDA_R_32F ? 0 : cublasSetMathMode(handle, kSumOnlyInFp32);
  const auto list = [&](int which) { return reinterpret_cast<void* const*>(kernel.lists + which * int64_t{kernel.count}); };
  // To cuBLAS, rows are columns: it multiplies the transposes, right times left.
  if (status == 0) {
    status = cublasGemmBatchedEx(handle, kernel.right.op(), kernel.left.op(), kernel.result.columns, kernel.result.rows,
                                 kernel.left.columns, &scale, list(1), type, kernel.right.pitch, list(0), type,
                                 kernel.left.pitch, &beta, list(2), type, kernel.result.pitch, kernel.count, kComputeFp32,
                                 kAnyAlgorithm);
  }
  STD_TORCH_CHECK(status == 0, "attnreg cublas_block: cuBLAS failed with status ", status);
}

inline void multiply(Tensor left, Tensor right, Tensor result, Tensor addresses, double scale, double beta) {
  const int64_t count = result.size(0) * result.size(1);
  const auto matrices = [&](const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == result.size(0) && tensor.size(1) == result.size(1) &&
                        tensor.scalar_type() == result.scalar_type(),
                    "attnreg cublas_block: multiply got tensors that do not fit");
    return Matrices(tensor);
  };
  STD_TORCH_CHECK(addresses.is_contiguous() && addresses.element_size() == sizeof(int64_t) &&
                      addresses.numel() == 3 * count && count <= INT32_MAX,
                  "attnreg cublas_block: multiply got no room for ", count, " addresses");
  const Addresses kernel{matrices(left),          matrices(right), matrices(result),
                         Divisor(result.size(1)), static_cast<int64_t*>(addresses.mutable_data_ptr()),
                         static_cast<int32_t>(count)};
  STD_TORCH_CHECK(!kernel.result.transposed && kernel.left.rows == kernel.result.rows &&
                      kernel.left.columns == kernel.right.rows && kernel.right.columns == kernel.result.columns,
                  "attnreg cublas_block: multiply got matrices that do not fit");
  for_each_row(kernel, count, 1, addresses);
  dispatch_dtype(result.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto of_two_bytes = std::is_same_v<T, __half> ? CUDA_R_16F : CUDA_R_16BF;
    if (result.is_cuda()) {
      multiply_by_cublas(kernel, sizeof(T) == 4 ? CUDA_R_32F : of_two_bytes, result.get_device_index(),
                         static_cast<float>(scale), static_cast<float>(beta));
    } else {
      multiply_plainly<T>(kernel, static_cast<float>(scale), static_cast<float>(beta));
    }
  });
}

}  // namespace attnreg
