// pack: (N, H, L, E) rows of any strides -> (N, Hkv, P, G, E padded), zero outside the sequence and at unseen rows.
//
// Padded row p is sequence position p + first. The G = H / Hkv query heads of a key/value head lie side by side, so
// that any range of positions is one matrix. Unseen rows (keys past the key length, queries that see no key) may hold
// NaN, which a product would spread even through zero weights: they are never loaded.
#pragma once

#include "band.cuh"

namespace attnreg {

template <class Word>
struct Pack {
  const char* source;
  Word* packed;
  int64_t kv_heads, pitch, group, words, padded_words;  // sizes of the result, the last two in words
  int64_t length, stride_n, stride_h, stride_l;         // of the source, strides in bytes
  int64_t first;
  int64_t reach, extent;  // the row at position x sees (or is) the keys x + reach .. x + reach + extent - 1
  Lengths key_lengths;

  __host__ __device__ bool seen(int64_t n, int64_t x) const {
    if (x < 0 || x >= length) return false;
    const int64_t begin = x + reach > 0 ? x + reach : 0;
    const int64_t key_length = key_lengths[n];
    const int64_t end = x + reach + extent < key_length ? x + reach + extent : key_length;
    return begin < end;
  }

  __host__ __device__ void operator()(int64_t row, int lane, int lanes) const {
    Word* to = packed + row * padded_words;
    const int64_t g = pop(row, group);
    const int64_t x = pop(row, pitch) + first;
    const int64_t kv_head = pop(row, kv_heads);
    const int64_t n = row;
    const bool load = seen(n, x);
    const Word* from = reinterpret_cast<const Word*>(
        source + (load ? n * stride_n + (kv_head * group + g) * stride_h + x * stride_l : 0));
    for (int64_t e = lane; e < padded_words; e += lanes) to[e] = load && e < words ? from[e] : Word{};
  }
};

template <class Word>
void run_pack(const Tensor& source, const Tensor& packed, int64_t element, int64_t first, int64_t reach,
              int64_t extent, const Lengths& key_lengths) {
  const int64_t word = sizeof(Word);
  const Pack<Word> kernel{
      static_cast<const char*>(source.const_data_ptr()),
      static_cast<Word*>(packed.mutable_data_ptr()),
      packed.size(1), packed.size(2), packed.size(3),
      source.size(3) * element / word, packed.size(4) * element / word,
      source.size(2), source.stride(0) * element, source.stride(1) * element, source.stride(2) * element,
      first, reach, extent, key_lengths};
  const int64_t rows = packed.size(0) * packed.size(1) * packed.size(2) * packed.size(3);
  for_each_row(kernel, rows, kernel.padded_words, packed);
}

inline void pack(Tensor source, Tensor packed, std::optional<Tensor> key_lengths, int64_t keys, int64_t first,
                 int64_t reach, int64_t extent) {
  STD_TORCH_CHECK(packed.is_contiguous() && packed.size(1) * packed.size(3) == source.size(1) &&
                      packed.size(4) >= source.size(3),
                  "attnreg cublas_block: pack got tensors that do not fit");
  const int64_t element = source.scalar_type() == ScalarType::Float ? 4 : 2;
  const Lengths lengths(key_lengths, keys);
  // The widest word that divides every address a row can start at, and its length. Only bits are moved.
  int64_t alignment = reinterpret_cast<uintptr_t>(source.const_data_ptr()) |
                      reinterpret_cast<uintptr_t>(packed.mutable_data_ptr()) | source.size(3) * element |
                      packed.size(4) * element;
  for (int64_t dim = 0; dim < 3; ++dim) {
    if (source.size(dim) > 1) alignment |= source.stride(dim) * element;
  }
  if (alignment % 16 == 0) return run_pack<uint4>(source, packed, element, first, reach, extent, lengths);
  if (alignment % 8 == 0) return run_pack<uint2>(source, packed, element, first, reach, extent, lengths);
  if (alignment % 4 == 0) return run_pack<uint32_t>(source, packed, element, first, reach, extent, lengths);
  return run_pack<uint16_t>(source, packed, element, first, reach, extent, lengths);
}

}  // namespace attnreg
