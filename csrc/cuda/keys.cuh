// Where rows stand among the keys, and which of these they may see: what a call gives of that, and what it means.
//
// Row i of sequence n has slots for the keys from i + shift + start(n) on, and sees those in bounds(n, i). On a GPU nobody has
// checked what the tensors hold: it is clamped to what exists, in 64 bits.
//
// Where sequences are packed one after the other, every row has a sequence of its own to ask. So its bounds are a table, which
// bound_packed_rows makes once for a call. Queries and keys have the same offsets there: row i stands at key i, and a key is seen
// by rows of its own bounds alone.
#pragma once

#include <optional>
#include <vector>

#include "rows.cuh"

namespace attnreg {

using torch::headeronly::ScalarType;

// The keys, or the rows, from low on to before high; none where that is reversed.
struct Bounds {
  int64_t low, high;

  __host__ __device__ bool empty() const { return low >= high; }
};

__host__ __device__ inline int64_t between(int64_t number, int64_t least, int64_t most) {
  return number < least ? least : number < most ? number : most;
}

// A contiguous tensor of int32 or int64; null where a call gives none.
struct Integers {
  const void* data = nullptr;
  bool wide = false;

  Integers() = default;
  explicit Integers(const std::optional<Tensor>& tensor) {
    if (!tensor) return;
    data = tensor->const_data_ptr();
    wide = tensor->scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK((wide || tensor->scalar_type() == ScalarType::Int) && tensor->is_contiguous(),
                    "attnreg cublas_block: lengths, starts and offsets must be contiguous, int32 or int64");
  }

  __host__ __device__ int64_t operator[](int64_t index) const {
    return wide ? static_cast<const int64_t*>(data)[index] : static_cast<const int32_t*>(data)[index];
  }
};

// What a call gives: nothing, or key_lengths, key_starts, query_starts (N,) and the table (2, Lq), each of them or null.
using Given = std::vector<std::optional<Tensor>>;

// Most calls give nothing, and their kernels ask for nothing.
template <bool kGiven>
class KeysOfRows {
 public:
  KeysOfRows(const Given& given, int64_t keys) : keys_(keys) {
    if (!kGiven || given.empty()) return;
    STD_TORCH_CHECK(given.size() == 4, "attnreg cublas_block: four tensors say what rows see, got ", given.size());
    lengths_ = Integers(given[0]);
    key_starts_ = Integers(given[1]);
    query_starts_ = Integers(given[2]);
    if (!given[3]) return;
    STD_TORCH_CHECK(given[3]->is_contiguous() && given[3]->dim() == 2 && given[3]->size(0) == 2 &&
                        given[3]->scalar_type() == ScalarType::Int,
                    "attnreg cublas_block: the table of packed rows must be int32, (2, Lq)");
    table_ = static_cast<const int32_t*>(given[3]->const_data_ptr());
    rows_ = given[3]->size(1);
  }

  __host__ __device__ bool packed() const { return kGiven && table_ != nullptr; }

  // At which key row 0 of a sequence stands, where it is told so, else 0: it is then the same for all.
  __host__ __device__ int64_t start(int64_t n) const {
    if constexpr (!kGiven) return 0;
    // Positions are below 2^31: so far away no row sees any key.
    return query_starts_.data == nullptr ? 0 : between(query_starts_[n], -(int64_t{1} << 33), int64_t{1} << 33);
  }

  // The keys that row i, or a packed row that stands at key i, may see wherever its window ends.
  __host__ __device__ Bounds bounds(int64_t n, int64_t i) const {
    if constexpr (!kGiven) return {0, keys_};
    if (packed()) {
      if (i < 0 || i >= rows_) return {0, 0};
      return {table_[i], table_[rows_ + i]};
    }
    return {key_starts_.data == nullptr ? 0 : between(key_starts_[n], 0, keys_),
            lengths_.data == nullptr ? keys_ : between(lengths_[n], 0, keys_)};
  }

 private:
  int64_t keys_, rows_ = 0;
  Integers lengths_, key_starts_, query_starts_;
  const int32_t* table_ = nullptr;
};

// One column of the table.
struct BoundPackedRows {
  Integers offsets;
  int32_t count;    // of offsets
  int64_t longest;  // no sequence goes beyond: the lesser number of queries and keys
  int32_t* table;
  int32_t rows;

  __host__ __device__ void operator()(int32_t row, int, int) const {
    // How many offsets do not lie behind the row.
    int32_t begun = 0, end = count;
    while (begun < end) {
      const int32_t middle = (begun + end) / 2;
      if (offsets[middle] <= row) {
        begun = middle + 1;
      } else {
        end = middle;
      }
    }
    // Before the first one and from the last one on no sequence is.
    const bool inside = begun > 0 && begun < count;
    table[row] = inside ? static_cast<int32_t>(between(offsets[begun - 1], 0, longest)) : 0;
    table[rows + row] = inside ? static_cast<int32_t>(between(offsets[begun], 0, longest)) : 0;
  }
};

inline void bound_packed_rows(Tensor offsets, Tensor table, int64_t keys) {
  STD_TORCH_CHECK(table.is_contiguous() && table.dim() == 2 && table.size(0) == 2 && table.size(1) <= INT32_MAX &&
                      table.scalar_type() == ScalarType::Int && offsets.dim() == 1 && offsets.size(0) < INT32_MAX / 2,
                  "attnreg cublas_block: bound_packed_rows got tensors that do not fit");
  const int64_t rows = table.size(1);
  const BoundPackedRows kernel{Integers(offsets), static_cast<int32_t>(offsets.size(0)), rows < keys ? rows : keys,
                               static_cast<int32_t*>(table.mutable_data_ptr()), static_cast<int32_t>(rows)};
  for_each_row(kernel, rows, 1, table);
}

}  // namespace attnreg
