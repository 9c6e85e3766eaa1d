// The sequences of a call laid end to end on one line of positions, and the line cut into blocks.
//
// Sequence s = n * Hkv + (key/value head) has positions s * pitch .. (s + 1) * pitch - 1: query i of it lies at
// query_lead + i and key j at key_lead + j, so that slot c of a query at x is the key at x - left + c. Block b owns the
// rows from first + b * rows on, `rows` of them, and its columns begin `before` positions before these; both may reach
// over the end of a sequence. Rows of the line that no block owns are edge rows. See attnreg_cublas/blocks.py.
#pragma once

#include <vector>

#include "rows.cuh"

namespace attnreg {

struct Geometry {
  Divisor kv_heads, group, pitch;
  int32_t query_lead, key_lead;
  Divisor rows;
  int32_t columns, before, first, count;

  explicit Geometry(const std::vector<int64_t>& numbers)
      : kv_heads(number(numbers, 0)), group(number(numbers, 1)), pitch(number(numbers, 2)),
        query_lead(number(numbers, 3)), key_lead(number(numbers, 4)), rows(number(numbers, 5)),
        columns(number(numbers, 6)), before(number(numbers, 7)), first(number(numbers, 8)),
        count(number(numbers, 9)) {}

  struct Place {
    int32_t n, kv_head, at;
  };

  __host__ __device__ Place place(int32_t x) const {
    const int32_t at = pitch.pop(x);
    const int32_t kv_head = kv_heads.pop(x);
    return {x, kv_head, at};
  }

  // The position of the first row of a block.
  __host__ __device__ int32_t begin(int32_t block) const { return first + block * rows.size(); }
  __host__ __device__ bool owned(int32_t x) const { return x >= first && x < begin(count); }

  // The edge rows of a line of so many sequences: those before the first block, then those after the last one.
  int64_t edge_rows(int64_t sequences) const {
    const int64_t after = sequences * pitch.size() - begin(count);
    return after > 0 ? first + after : first;
  }
  __host__ __device__ int32_t edge_place(int32_t index) const {
    return index < first ? index : index + count * rows.size();
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
    STD_TORCH_CHECK(numbers.size() == 10, "attnreg cublas_block: a geometry has ten numbers, got ", numbers.size());
    STD_TORCH_CHECK(numbers[index] >= INT32_MIN && numbers[index] <= INT32_MAX,
                    "attnreg cublas_block: positions must be below 2^31, got ", numbers[index]);
    return static_cast<int32_t>(numbers[index]);
  }
};

// The edge rows of a launch, of all heads. They take longest: they come first, and are shared out in pieces of a few columns,
// to all multiprocessors alike.
struct EdgePieces {
  int32_t count;    // all of them
  int32_t columns;  // of one
  Divisor per_row;

  EdgePieces(int64_t rows, int64_t width, int columns)
      : columns(columns), per_row((width + columns - 1) / columns) {
    STD_TORCH_CHECK(rows * per_row.size() <= INT32_MAX, "attnreg cublas_block: more than 2^31 - 1 pieces of edge rows");
    count = static_cast<int32_t>(rows * per_row.size());
  }

  // index -> its row, returning the first column of the piece.
  __host__ __device__ int32_t pop(int32_t& index) const { return columns * per_row.pop(index); }
};

}  // namespace attnreg
