// unpack: rows by position, (positions, G, E padded), -> a result (N, H, L, E) of any strides, zero where a row has no position.
//
// What pack does, the other way round: a product comes back by position, and its rows lie in memory as the caller's do.
#pragma once

#include "access.cuh"
#include "keys.cuh"

namespace attnreg {

template <class Word>
struct Unpack {
  const Word* packed;
  char* result;
  Divisor kv_heads, group, length;
  int32_t pitch, lead;          // where row 0 of a sequence lies in it, less its start if it is a key
  int32_t words, padded_words;  // of a row
  int64_t stride_n, stride_h, stride_l;  // of the result, in bytes
  bool of_keys;
  KeysOfRows<true> keys;

  __host__ __device__ void operator()(int32_t row, int lane, int lanes) const {
    const int32_t g = group.pop(row);
    const int32_t l = length.pop(row);
    const int32_t kv_head = kv_heads.pop(row);
    const int64_t n = row;
    const int64_t at = l + lead - (of_keys ? keys.start(n) : 0);
    const bool has_position = at >= 0 && at < pitch;
    const int64_t x = has_position ? (n * kv_heads.size() + kv_head) * pitch + at : 0;
    const Word* __restrict__ from = packed + (x * group.size() + g) * padded_words;
    Word* __restrict__ to = reinterpret_cast<Word*>(
        result + n * stride_n + int64_t{kv_head * group.size() + g} * stride_h + l * stride_l);
    for (int e = lane; e < words; e += lanes) to[e] = has_position ? from[e] : Word{};
  }
};

template <class Word>
void run_unpack(const Tensor& packed, const Tensor& result, int64_t element, int64_t pitch, int64_t lead, bool of_keys,
                const KeysOfRows<true>& keys) {
  const int64_t word = sizeof(Word), group = packed.size(1);
  const Unpack<Word> kernel{static_cast<const Word*>(packed.const_data_ptr()),
                            static_cast<char*>(result.mutable_data_ptr()),
                            Divisor(result.size(1) / group),
                            Divisor(group),
                            Divisor(result.size(2)),
                            static_cast<int32_t>(pitch),
                            static_cast<int32_t>(lead),
                            static_cast<int32_t>(result.size(3) * element / word),
                            static_cast<int32_t>(packed.size(2) * element / word),
                            result.stride(0) * element,
                            result.stride(1) * element,
                            result.stride(2) * element,
                            of_keys,
                            keys};
  for_each_row(kernel, result.size(0) * result.size(1) * result.size(2), lanes_of(kernel.words), result);
}

inline void unpack(Tensor packed, Tensor result, Given given, int64_t pitch, int64_t lead, bool of_keys) {
  STD_TORCH_CHECK(packed.is_contiguous() && packed.dim() == 3 && result.dim() == 4 &&
                      result.size(1) % packed.size(1) == 0 && packed.size(2) >= result.size(3) &&
                      (result.size(3) == 1 || result.stride(3) == 1) && packed.scalar_type() == result.scalar_type() &&
                      packed.size(0) * packed.size(1) >= result.size(0) * result.size(1) * pitch,
                  "attnreg cublas_block: unpack got tensors that do not fit");
  const auto element = static_cast<int64_t>(result.element_size());
  const KeysOfRows<true> keys(given, of_keys ? result.size(2) : 0);
  dispatch_word(access_bytes(packed) | access_bytes(result) | result.size(3) * element | packed.size(2) * element,
                [&](auto word) { run_unpack<decltype(word)>(packed, result, element, pitch, lead, of_keys, keys); });
}

}  // namespace attnreg
