#include "kernels_of_isa.h"

namespace attnreg::cpu {

const Kernels* kernels_avx512() {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
  static constexpr Kernels kernels = table_of("avx512");
  return &kernels;
#else
  return nullptr;
#endif
}

}  // namespace attnreg::cpu
