// The sequences of a call laid end to end on lines of positions, and the lines cut into blocks.
//
// There is one line, with the sequences (n, key/value head) in this order, or one for each key/value head, with sequences n: lines
// are numbered through, one after the other, and so are their positions. Sequence s has positions s * pitch ..
// (s + 1) * pitch - 1: query i of it lies at query_lead + i and key j at key_lead + j, less the start of the sequence where each
// has its own, so that slot c of a query at x is the key at x - left + c. Block b of a line owns the rows from its place
// first + b * rows on, `rows` of them, and its columns begin `before` positions before these; both may reach over the end of a
// sequence, and where there is one line over its own ends. Rows of a line that no block owns are edge rows. See
// attnreg_cublas/blocks.py.
#pragma once

#include <vector>

#include "rows.cuh"

namespace attnreg {

struct Geometry {
  Divisor kv_heads, group, pitch;
  int32_t query_lead, key_lead;
  Divisor rows;
  int32_t columns, before, first, count, lines;
  Divisor sequences;  // of a line
  Divisor length;     // of a line
  Divisor owned_rows, edge_rows;  // of a line; one instead of none

  explicit Geometry(const std::vector<int64_t>& numbers)
      : kv_heads(number(numbers, 0)), group(number(numbers, 1)), pitch(number(numbers, 2)),
        query_lead(number(numbers, 3)), key_lead(number(numbers, 4)), rows(number(numbers, 5)),
        columns(number(numbers, 6)), before(number(numbers, 7)), first(number(numbers, 8)),
        count(number(numbers, 9)), lines(number(numbers, 10)), sequences(number(numbers, 11)),
        length(numbers[11] * numbers[2]), owned_rows(numbers[9] * numbers[5]),
        edge_rows(edges_of_line() > 0 ? edges_of_line() : 1) {}

  struct Place {
    int32_t n, kv_head, at;
  };

  __host__ __device__ Place place(int32_t x) const {
    const int32_t at = pitch.pop(x);
    if (lines > 1) {
      const int32_t n = sequences.pop(x);
      return {n, x, at};
    }
    const int32_t kv_head = kv_heads.pop(x);
    return {x, kv_head, at};
  }

  // The position of an owned row, counted from the first one of `line` on, through this and the next lines.
  __host__ __device__ int32_t position(int32_t line, int32_t row) const {
    const int32_t on_line = owned_rows.pop(row);
    return (line + row) * length.size() + first + on_line;
  }
  __host__ __device__ bool owned(int32_t x) const {
    const int32_t on_line = length.remainder(x) - first;
    return on_line >= 0 && on_line < owned_rows.size();
  }

  // The key of slot 0 in row 0, less the start of the sequence where each has its own.
  int64_t shift(int64_t left) const { return int64_t{query_lead} - key_lead - left; }

  // The columns of the blocks that own the `count` rows from x on, counted from x.
  struct Columns {
    int32_t begin, end;
  };

  __host__ __device__ Columns columns_of(int32_t x, int32_t count) const {
    const int32_t row = length.remainder(x) - first;
    const int32_t last = row + count - 1;
    return {-rows.remainder(row) - before, last - rows.remainder(last) - row - before + columns};
  }

  // Edge rows: of each line those before its first block, then those after its last one.
  int64_t all_edge_rows() const { return edges_of_line() * int64_t{lines}; }
  __host__ __device__ int32_t edge_place(int32_t index) const {
    const int32_t on_line = edge_rows.pop(index);
    return index * length.size() + (on_line < first ? on_line : on_line + owned_rows.size());
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
  int64_t edges_of_line() const {
    const int64_t after = int64_t{length.size()} - first - owned_rows.size();
    return after > 0 ? first + after : first;
  }

  static int32_t number(const std::vector<int64_t>& numbers, size_t index) {
    STD_TORCH_CHECK(numbers.size() == 12, "attnreg cublas_block: a geometry has twelve numbers, got ", numbers.size());
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
