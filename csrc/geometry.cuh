// The sequences of a call laid end to end on one line of positions, and the line cut into blocks.
//
// Sequence s = n * Hkv + (key/value head) has positions s * pitch .. (s + 1) * pitch - 1: query i of it lies at
// query_lead + i and key j at key_lead + j, so that slot c of a query at x is the key at x - left + c. Block b owns the
// rows at b * rows .. (b + 1) * rows - 1 and its columns begin at b * rows - before; both may reach over the end of a
// sequence. See attnreg_cublas/blocks.py.
#pragma once

#include <vector>

#include "rows.cuh"

namespace attnreg {

struct Geometry {
  Divisor kv_heads, group, pitch;
  int32_t query_lead, key_lead;
  Divisor rows;
  int32_t columns, before;

  explicit Geometry(const std::vector<int64_t>& numbers)
      : kv_heads(number(numbers, 0)), group(number(numbers, 1)), pitch(number(numbers, 2)),
        query_lead(number(numbers, 3)), key_lead(number(numbers, 4)), rows(number(numbers, 5)),
        columns(number(numbers, 6)), before(number(numbers, 7)) {}

  struct Place {
    int32_t n, kv_head, at;
  };

  __host__ __device__ Place place(int32_t x) const {
    const int32_t at = pitch.pop(x);
    const int32_t kv_head = kv_heads.pop(x);
    return {x, kv_head, at};
  }

  // Rows whose block may have columns of another sequence lie at the ends of their own.
  __host__ __device__ int32_t head() const { return before + rows.size(); }
  __host__ __device__ int32_t ends() const {
    const int32_t both = head() + columns - before;
    return both < pitch.size() ? both : pitch.size();
  }
  // The place of the `index`-th such row of a sequence, `index` < ends().
  __host__ __device__ int32_t end_place(int32_t index) const {
    return index < head() ? index : pitch.size() - ends() + index;
  }

 private:
  static int32_t number(const std::vector<int64_t>& numbers, size_t index) {
    STD_TORCH_CHECK(numbers.size() == 8, "attnreg cublas_block: a geometry has eight numbers, got ", numbers.size());
    STD_TORCH_CHECK(numbers[index] >= INT32_MIN && numbers[index] <= INT32_MAX,
                    "attnreg cublas_block: positions must be below 2^31, got ", numbers[index]);
    return static_cast<int32_t>(numbers[index]);
  }
};

}  // namespace attnreg
