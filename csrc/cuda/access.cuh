// How rows are read: neighbours of a row in one access, where every row begins at a multiple of its size.
#pragma once

#include "rows.cuh"

namespace attnreg {

constexpr int64_t kAccessBytes = 16;

// The widest access in bytes, a power of two up to 16, that may begin wherever a row of a tensor does.
inline int64_t access_bytes(const Tensor& tensor) {
  int64_t starts = kAccessBytes | static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()));
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) {
    if (tensor.size(dim) > 1) starts |= tensor.stride(dim) * static_cast<int64_t>(tensor.element_size());
  }
  return starts & -starts;
}

// Calls run(Word{}) with the widest word that divides everything `starts` is made of. Words only move bits.
template <class Run>
void dispatch_word(int64_t starts, const Run& run) {
  if (starts % 16 == 0) return run(uint4{});
  if (starts % 8 == 0) return run(uint2{});
  if (starts % 4 == 0) return run(uint32_t{});
  return run(uint16_t{});
}

template <class T, int kSize>
struct alignas(kSize * sizeof(T)) Vector {
  T at[kSize];
};

template <int kSize, class T>
__host__ __device__ inline Vector<T, kSize> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, kSize>*>(from);
}

}  // namespace attnreg
