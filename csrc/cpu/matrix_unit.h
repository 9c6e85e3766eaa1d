// The processor's matrix unit (AMX): its registers, and its instructions as bytes, which older assemblers take, too.
#pragma once

#include <cstdint>

// tilezero c; tileloadd (%rax,%rcx,1), c; tilestored c, (%rax,%rcx,1); tdpbf16ps b, a, c.
#define ATTNREG_PAIRS_ZERO(c) asm volatile(".byte 0xc4,0xe2,0x7b,0x49,0xc0+8*" #c ::)
#define ATTNREG_PAIRS_LOAD(c, from, bytes)                                                                                     \
  asm volatile(".byte 0xc4,0xe2,0x7b,0x4b,0x04+8*" #c ",0x08" ::"a"(static_cast<const void*>(from)),                           \
               "c"(static_cast<int64_t>(bytes))                                                                                \
               : "memory")
#define ATTNREG_PAIRS_STORE(c, to, bytes)                                                                                      \
  asm volatile(".byte 0xc4,0xe2,0x7a,0x4b,0x04+8*" #c ",0x08" ::"a"(static_cast<void*>(to)), "c"(static_cast<int64_t>(bytes)) \
               : "memory")
#define ATTNREG_PAIRS_ADD(c, a, b) asm volatile(".byte 0xc4,0xe2,0x7a-8*" #b ",0x5c,0xc0+8*" #c "+" #a ::)

namespace attnreg::cpu {
namespace {

#if defined(ATTNREG_PAIRS)
// The matrix unit's registers, as this thread has them while this exists: all of 16 rows of 64 bytes.
class PairRegisters {
 public:
  PairRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    asm volatile(".byte 0xc4,0xe2,0x78,0x49,0x00" ::"a"(&shapes), "m"(shapes));  // ldtilecfg (%rax)
  }
  ~PairRegisters() {
    asm volatile(".byte 0xc4,0xe2,0x78,0x49,0xc0" ::: "memory");  // tilerelease
  }
  PairRegisters(const PairRegisters&) = delete;
  PairRegisters& operator=(const PairRegisters&) = delete;
};
#else
struct PairRegisters {};
#endif

}  // namespace
}  // namespace attnreg::cpu
