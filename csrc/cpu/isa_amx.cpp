// AVX-512, and attention in bfloat16 by the processor's matrix unit, whose instructions no compiler has to know.
#if defined(__x86_64__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define ATTNREG_PAIRS
#endif

#include "kernels.h"

#if defined(ATTNREG_PAIRS)
#include "attention.h"
#include "attention_backward.h"
#endif

namespace attnreg::cpu {

#if defined(ATTNREG_PAIRS)
namespace {

// What is not multiplied in pairs, AVX-512 does; and tiny calls, which take less time than to set the unit up.
inline bool goes_here(const Attention& call) {
  if (call.sizes.query_length < kRowsOfPairs && call.sizes.key_length < 64) return false;
  return goes_in_pairs<float>(call.type, call.sizes.head_dim) && goes_in_pairs<float>(call.type, call.sizes.value_dim);
}

void attend_in_pairs(const Attention& call, int64_t begin, int64_t end) {
  if (goes_here(call)) {
    attend<float>(call, begin, end);
  } else {
    kernels_avx512()->attention(call, begin, end);
  }
}

void go_back_in_pairs(const AttentionBackward& call, void* scratch, int64_t begin, int64_t end) {
  if (goes_here(call)) {
    go_back<float>(call, scratch, begin, end);
  } else {
    kernels_avx512()->attention_backward(call, scratch, begin, end);
  }
}

}  // namespace
#endif

const Kernels* kernels_amx() {
#if defined(ATTNREG_PAIRS)
  static const Kernels kernels = [] {
    Kernels all = *kernels_avx512();
    all.name = "amx";
    all.attention = attend_in_pairs;
    all.attention_backward = go_back_in_pairs;
    return all;
  }();
  return &kernels;
#else
  return nullptr;
#endif
}

}  // namespace attnreg::cpu
