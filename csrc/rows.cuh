// Runs a kernel row by row: on the GPU the lanes of a row share its columns, on the host one lane takes them all.
//
// A kernel is a function object `kernel(row, lane, lanes)` that handles the columns lane, lane + lanes, ... of one row.
// Both devices run the same code, so the index arithmetic is tested where there is no GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

// Weak, because torch built without CUDA lacks it and this library should load there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace attnreg {

using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// index -> index / size, returning index % size. The compiler divides in 32 bits where both fit.
__host__ __device__ inline int64_t pop(int64_t& index, int64_t size) {
  const int64_t quotient = index / size;
  const int64_t remainder = index - quotient * size;
  index = quotient;
  return remainder;
}

template <class Kernel>
__global__ void __launch_bounds__(kThreads) run_rows(const __grid_constant__ Kernel kernel, int64_t rows) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < rows; row += step) {
    kernel(row, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
  }
}

// Runs `kernel` over rows x columns on the device of `output`, on its current stream.
template <class Kernel>
void for_each_row(const Kernel& kernel, int64_t rows, int64_t columns, const Tensor& output) {
  if (rows == 0) return;
  if (!output.is_cuda()) {
    for (int64_t row = 0; row < rows; ++row) kernel(row, 0, 1);
    return;
  }
  const auto device = output.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "attnreg cublas_block: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));

  int lanes = 1;
  while (lanes < columns && lanes < kWarp) lanes *= 2;
  const int rows_per_block = kThreads / lanes;
  constexpr int64_t kMaxBlocks = 1 << 20;
  const auto blocks = std::min((rows + rows_per_block - 1) / rows_per_block, kMaxBlocks);
  run_rows<<<static_cast<unsigned>(blocks), dim3(lanes, rows_per_block), 0, static_cast<cudaStream_t>(stream)>>>(
      kernel, rows);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "attnreg cublas_block: kernel launch failed: ", cudaGetErrorString(error));
}

}  // namespace attnreg
