// Runs a kernel row by row: on the GPU the lanes of a row share its columns, on the host one lane takes them all.
//
// A kernel is a function object `kernel(row, lane, lanes)` that handles the columns lane, lane + lanes, ... of one row.
// Both devices run the same code, so the index arithmetic is tested where there is no GPU.
#pragma once

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
// How many loads of a lane are under way together.
constexpr int kAtOnce = 8;

// Divides 31-bit numbers by one that is known beforehand, with a product and a shift instead of a division: an index is
// taken apart for every row. Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.
class Divisor {
 public:
  explicit Divisor(int64_t size) : size_(static_cast<int32_t>(size)) {
    STD_TORCH_CHECK(size > 0 && size <= INT32_MAX, "attnreg cublas_block: a size must be in 1 .. 2^31 - 1, got ", size);
    while ((int64_t{1} << shift_) < size) ++shift_;
    factor_ = static_cast<uint32_t>((((uint64_t{1} << shift_) - size) << 32) / size + 1);
  }

  __host__ __device__ int32_t size() const { return size_; }

  __host__ __device__ int32_t quotient(int32_t index) const {
    const uint32_t number = static_cast<uint32_t>(index);
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(number) * factor_) >> 32);
    return static_cast<int32_t>((high + number) >> shift_);
  }

  // index -> index / size, returning index % size.
  __host__ __device__ int32_t pop(int32_t& index) const {
    const int32_t whole = quotient(index);
    const int32_t rest = index - whole * size_;
    index = whole;
    return rest;
  }

  __host__ __device__ int32_t remainder(int32_t index) const { return pop(index); }

 private:
  int32_t size_, shift_ = 0;
  uint32_t factor_;
};

// Calls store(c, load(c)) for kCount columns of a lane, from `first` on, all loads before their stores: they are under way
// together. `load` is called for columns past the last one, too, and must give anything there: a branch would hold the next
// load up.
template <int kCount, class Load, class Store>
__host__ __device__ inline void copy_some(int first, int lanes, int columns, const Load& load, const Store& store) {
  decltype(load(0)) values[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    values[k] = load(first + k * lanes);
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if (first + k * lanes < columns) store(first + k * lanes, values[k]);
  }
}

// The same for all columns of a lane, as many at once as there are, up to eight.
template <class Load, class Store>
__host__ __device__ inline void copy_columns(int lane, int lanes, int columns, const Load& load, const Store& store) {
  int begin = 0;
  for (; columns - begin > 6 * lanes; begin += kAtOnce * lanes) {
    copy_some<kAtOnce>(begin + lane, lanes, columns, load, store);
  }
  if (columns - begin > 2 * lanes) {
    copy_some<4>(begin + lane, lanes, columns, load, store);
    begin += 4 * lanes;
  }
  if (columns - begin > lanes) {
    copy_some<2>(begin + lane, lanes, columns, load, store);
  } else if (columns - begin > 0) {
    copy_some<1>(begin + lane, lanes, columns, load, store);
  }
}

// What `combine` makes of the values of all lanes of a row; all of them call it.
template <class T, class Combine>
__host__ __device__ inline T across_lanes(T value, int lanes, const Combine& combine) {
#ifdef __CUDA_ARCH__
  // The lanes of one row only: those of the warp's other rows may be through.
  const unsigned first_lane = threadIdx.y * lanes % kWarp;
  const unsigned row_lanes = (lanes == kWarp ? 0xffffffffu : (1u << lanes) - 1u) << first_lane;
  for (int other = lanes / 2; other > 0; other /= 2) {
    value = combine(value, __shfl_xor_sync(row_lanes, value, other));
  }
#endif
  return value;
}

template <class Kernel>
__global__ void __launch_bounds__(kThreads) run_rows(const __grid_constant__ Kernel kernel, int32_t rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row < rows) kernel(static_cast<int32_t>(row), static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
}

// How many lanes share a row: at least 8 side by side, which fill the sectors of memory that they touch, and more, up to
// a warp, where each would take more than eight columns.
inline int lanes_of(int64_t columns) {
  int lanes = 1;
  while (lanes < columns && (lanes < 8 || lanes * kAtOnce < columns) && lanes < kWarp) lanes *= 2;
  return lanes;
}

// Runs `kernel` over rows, each shared by `lanes` lanes, on the device of `output`, on its current stream.
template <class Kernel>
void for_each_row(const Kernel& kernel, int64_t rows, int lanes, const Tensor& output) {
  if (rows == 0) return;
  STD_TORCH_CHECK(rows <= INT32_MAX, "attnreg cublas_block: more than 2^31 - 1 rows: ", rows);
  if (!output.is_cuda()) {
    for (int32_t row = 0; row < rows; ++row) kernel(row, 0, 1);
    return;
  }
  const auto device = output.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "attnreg cublas_block: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));

  const int rows_per_block = kThreads / lanes;
  const auto blocks = static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block);
  run_rows<<<blocks, dim3(lanes, rows_per_block), 0, static_cast<cudaStream_t>(stream)>>>(
      kernel, static_cast<int32_t>(rows));
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "attnreg cublas_block: kernel launch failed: ", cudaGetErrorString(error));
}

}  // namespace attnreg
