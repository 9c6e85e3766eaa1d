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
  int64_t kv_heads, group, pitch, query_lead, key_lead;
  int64_t rows, columns, before;
  int64_t begin, end;  // the blocks that have a dense result: those whose rows and columns all lie on the line

  explicit Geometry(const std::vector<int64_t>& numbers) {
    STD_TORCH_CHECK(numbers.size() == 10, "attnreg cublas_block: a geometry has ten numbers");
    int64_t* const fields[] = {&kv_heads, &group, &pitch, &query_lead, &key_lead, &rows, &columns, &before, &begin, &end};
    for (size_t field = 0; field < 10; ++field) *fields[field] = numbers[field];
  }

  struct Place {
    int64_t n, kv_head, at;
  };

  __host__ __device__ Place place(int64_t x) const {
    const int64_t at = pop(x, pitch);
    const int64_t kv_head = pop(x, kv_heads);
    return {x, kv_head, at};
  }

  __host__ __device__ int64_t start(int64_t n, int64_t h) const { return (n * kv_heads + h / group) * pitch; }

  __host__ __device__ bool has_dense(int64_t x) const {
    const int64_t block = x / rows;
    return begin <= block && block < end;
  }

  // Whether the block of position x has columns of another sequence than that of x, which begins at `start`.
  __host__ __device__ bool meets_another(int64_t x, int64_t start) const {
    const int64_t first = x - x % rows - before;
    return first < start || first + columns > start + pitch;
  }
};

}  // namespace attnreg
