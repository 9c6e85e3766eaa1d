#include "kernels_of_isa.h"

namespace attnreg::cpu {

const Kernels* kernels_baseline() {
  static constexpr Kernels kernels = table_of("baseline");
  return &kernels;
}

}  // namespace attnreg::cpu
