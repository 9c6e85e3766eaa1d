// The matrix unit of csrc/cpu/matrix_unit.h in plain C++: eight registers of 16 rows of 64 bytes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace attnreg::cpu {
namespace {

using MatrixRegister = uint32_t[16][16];
inline thread_local MatrixRegister matrix_registers[8];
inline thread_local bool has_matrix_registers = false;

inline void check_registers() {
  if (!has_matrix_registers) __builtin_trap();
}

inline void zero_register(int c) {
  check_registers();
  memset(matrix_registers[c], 0, sizeof(MatrixRegister));
}

inline void load_register(int c, const void* from, int64_t bytes) {
  check_registers();
  for (int64_t row = 0; row < 16; ++row) memcpy(matrix_registers[c][row], static_cast<const char*>(from) + row * bytes, 64);
}

inline void store_register(int c, void* to, int64_t bytes) {
  check_registers();
  for (int64_t row = 0; row < 16; ++row) memcpy(static_cast<char*>(to) + row * bytes, matrix_registers[c][row], 64);
}

inline float float_of(uint32_t bits) {
  float number;
  memcpy(&number, &bits, sizeof(number));
  return number;
}

// Numbers below the normal ones are 0, in what is multiplied and in what comes out.
inline float flushed(float number) { return std::fabs(number) < __FLT_MIN__ ? 0.0f * number : number; }

// C += A * B, of pairs of bfloat16, the first one in the lower half of 32 bits.
inline void add_products(int c, int a, int b) {
  check_registers();
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 16; ++column) {
      float sum = flushed(float_of(matrix_registers[c][row][column]));
      for (int pair = 0; pair < 16; ++pair) {
        const uint32_t left = matrix_registers[a][row][pair], right = matrix_registers[b][pair][column];
        sum = flushed(sum + flushed(float_of(left << 16)) * flushed(float_of(right << 16)));
        sum = flushed(sum + flushed(float_of(left & 0xffff0000u)) * flushed(float_of(right & 0xffff0000u)));
      }
      memcpy(&matrix_registers[c][row][column], &sum, sizeof(sum));
    }
  }
}

// Where none exists, the registers are not to be used.
class PairRegisters {
 public:
  PairRegisters() { has_matrix_registers = true; }
  ~PairRegisters() { has_matrix_registers = false; }
  PairRegisters(const PairRegisters&) = delete;
  PairRegisters& operator=(const PairRegisters&) = delete;
};

}  // namespace
}  // namespace attnreg::cpu

#define ATTNREG_PAIRS_ZERO(c) zero_register(c)
#define ATTNREG_PAIRS_LOAD(c, from, bytes) load_register(c, from, bytes)
#define ATTNREG_PAIRS_STORE(c, to, bytes) store_register(c, to, bytes)
#define ATTNREG_PAIRS_ADD(c, a, b) add_products(c, a, b)
