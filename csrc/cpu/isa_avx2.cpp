#include "kernels_of_isa.h"

namespace attnreg::cpu {

const Kernels* kernels_avx2() {
#if defined(__AVX2__) && defined(__FMA__)
  static constexpr Kernels kernels = table_of("avx2");
  return &kernels;
#else
  return nullptr;
#endif
}

}  // namespace attnreg::cpu
