// pack: rows (N, H, L, E) of any strides -> (positions, G, E padded) on the line, zero where no row lies or is seen.
//
// Of one line, or of lines for each key/value head, numbered through: see geometry.cuh. The G = H / Hkv query heads of a
// key/value head lie side by side, so that any range of positions is one matrix. Rows without use (keys that no row may see,
// queries that see no key) may hold NaN, which a product would spread even through zero weights: they are never loaded.
#pragma once

#include "access.cuh"
#include "band.cuh"

namespace attnreg {

template <class Word>
struct Pack {
  const char* source;
  Word* packed;
  Divisor batch, kv_heads, group, pitch;
  bool by_head;  // whether each key/value head has a line
  int32_t words, padded_words;                  // of a row
  int64_t length, stride_n, stride_h, stride_l;                // of the source, strides in bytes
  int32_t first, lead;  // the first packed position; where row 0 of a sequence lies in it, less its start if it is a key
  bool of_keys;
  int64_t shift, width;  // query l has slots for the keys from l + shift + start on
  KeysOfRows<true> keys;

  // Whether row l is of use: as a key, or as a query.
  __host__ __device__ bool used(int64_t n, int64_t l, int64_t start) const {
    if (l < 0 || l >= length) return false;
    const Bounds seen = keys.bounds(n, l);
    if (of_keys) return l >= seen.low && l < seen.high;
    const int64_t first_key = l + shift + start;
    return !seen.empty() && first_key < seen.high && first_key + width > seen.low;
  }

  __host__ __device__ void operator()(int32_t row, int lane, int lanes) const {
    Word* to = packed + int64_t{row} * padded_words;
    const int32_t g = group.pop(row);
    int32_t n = first + row;
    const bool on_line = n >= 0;
    if (!on_line) n = 0;
    const int32_t at = pitch.pop(n);
    int32_t kv_head = n;
    if (by_head) {
      n = batch.pop(kv_head);
    } else {
      kv_head = kv_heads.pop(n);
    }
    const bool inside = on_line && n < batch.size() && kv_head < kv_heads.size();
    const int64_t start = inside ? keys.start(n) : 0;
    const int64_t l = at - lead + (of_keys ? start : 0);
    const bool load = inside && used(n, l, start);
    const Word* from = reinterpret_cast<const Word*>(
        source + (load ? n * stride_n + int64_t{kv_head * group.size() + g} * stride_h + l * stride_l : 0));
    for (int e = lane; e < padded_words; e += lanes) to[e] = load && e < words ? from[e] : Word{};
  }
};

template <class Word>
void run_pack(const Tensor& source, const Tensor& packed, int64_t element, bool by_head, int64_t pitch, int64_t first,
              int64_t lead, bool of_keys, int64_t shift, int64_t width, const KeysOfRows<true>& keys) {
  const int64_t word = sizeof(Word), group = packed.size(1);
  const Pack<Word> kernel{
      static_cast<const char*>(source.const_data_ptr()),
      static_cast<Word*>(packed.mutable_data_ptr()),
      Divisor(source.size(0)), Divisor(source.size(1) / group), Divisor(group), Divisor(pitch), by_head,
      static_cast<int32_t>(source.size(3) * element / word), static_cast<int32_t>(packed.size(2) * element / word),
      source.size(2), source.stride(0) * element, source.stride(1) * element, source.stride(2) * element,
      static_cast<int32_t>(first), static_cast<int32_t>(lead), of_keys, shift, width, keys};
  for_each_row(kernel, packed.size(0) * group, lanes_of(kernel.padded_words), packed);
}

inline void pack(Tensor source, Tensor packed, Given given, int64_t keys, bool by_head, int64_t pitch,
                 int64_t first, int64_t lead, bool of_keys, int64_t shift, int64_t width) {
  STD_TORCH_CHECK(packed.is_contiguous() && packed.dim() == 3 && source.size(1) % packed.size(1) == 0 &&
                      packed.size(2) >= source.size(3),
                  "attnreg cublas_block: pack got tensors that do not fit");
  const auto element = static_cast<int64_t>(source.element_size());
  const KeysOfRows<true> keys_of_rows(given, keys);
  dispatch_word(access_bytes(source) | access_bytes(packed) | source.size(3) * element | packed.size(2) * element,
                [&](auto word) {
                  run_pack<decltype(word)>(source, packed, element, by_head, pitch, first, lead, of_keys, shift, width,
                                           keys_of_rows);
                });
}

}  // namespace attnreg
