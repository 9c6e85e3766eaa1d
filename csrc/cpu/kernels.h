// What goes into the kernels and comes out of them: raw pointers, strides and plain numbers, nothing of torch.
//
// The kernels are compiled once for each instruction set; a table of function pointers is all that leaves such a file. They
// run on the calling thread. Their work is cut into units whose number and borders follow from the arguments alone, never
// from the number of threads: whoever calls may spread [0, units) over threads in any way, and gets the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace attnreg::cpu {

enum class Type : int32_t { kFloat, kDouble, kBFloat16, kHalf };

// A tensor (N, H, L, X) whose last dimension is contiguous. Strides in elements. No data: not given, or not wanted.
struct View {
  void* data = nullptr;
  int64_t n = 0, h = 0, l = 0;
};

// (N, H, Lq, W) of a type of its own; stride 0 where it broadcasts.
struct Bias {
  void* data = nullptr;
  Type type = Type::kFloat;
  int64_t n = 0, h = 0, l = 0, w = 0;
};

// A vector of numbers of a type of its own.
struct Numbers {
  void* data = nullptr;
  Type type = Type::kFloat;
  int64_t stride = 1;
};

// A contiguous vector of integers.
struct Integers {
  const void* data = nullptr;
  bool wide = true;  // int64, else int32
};

// Which keys rows see: the window, and what was given of the arguments of rows.
struct Rows {
  int64_t left = 0, right = 0;
  Integers key_lengths, key_starts, query_starts;  // (N,)
  Integers cu_seqlens_q, cu_seqlens_k;             // (S + 1,); of keys the same data as of queries where only that was given
  int64_t sequences = 0;                           // S
};

// A row's keys [first, last), first == last where it sees none, and the key of its first slot, which may lie anywhere.
struct Place {
  int64_t origin, first, last;
};

struct Sizes {
  int64_t batch, heads, kv_heads, query_length, key_length, head_dim, value_dim;
};

struct Attention {
  Sizes sizes;
  Type type;
  Rows rows;
  double scale = 1.0;
  double softcap = 0.0;  // 0: none
  View query, key, value;
  Bias bias;
  Numbers sinks;                  // (H,)
  double dropout_p = 0.0;         // 0: none
  uint64_t seed = 0;              // the bits of the int64
  View output;                    // forward: written whole
  void* log_sum_exp = nullptr;    // (N, H, Lq) contiguous; double for double, else float. Forward: written whole; backward: read
};

// Every gradient that is wanted is written whole: its memory may hold anything before.
struct AttentionBackward : Attention {
  View grad_output;
  const void* grad_log_sum_exp = nullptr;  // as log_sum_exp, or null
  View grad_query, grad_key, grad_value;
  Bias grad_bias;      // of the shape of the bias: stride 0 where that has size 1, and nowhere else
  Numbers grad_sinks;  // (H,)
};

// scores (N, H, Lq, W) = scale * query . key + bias, -inf where hidden.
struct DotProduct {
  Sizes sizes;  // value_dim is unused
  Type type;
  Rows rows;
  double scale = 1.0;
  View query, key;
  Bias bias;
  View scores;       // forward: written whole
  View grad_scores;  // backward: read
  View grad_query, grad_key;
  Bias grad_bias;
};

// output (N, H, Lq, D) = sum over visible slots of weight * value.
struct WeightedAverage {
  Sizes sizes;  // head_dim is unused
  Type type;
  Rows rows;
  View weights, value;
  View output;
  View grad_output;
  View grad_weights, grad_value;
};

// How a call is cut. First units [0, units) of the first pass, in any order and on any threads; when all are done, units
// [0, finishing) of the second pass likewise. Both passes of a call share `scratch` bytes, aligned to 64, that may hold
// anything before. `operations` is about how many multiplications all units make: a call of few is not worth threads.
struct Work {
  int64_t units = 0;
  int64_t finishing = 0;
  size_t scratch = 0;
  double operations = 0.0;
};

// What a row costs beside the slots of its window, in slots: it is read, and its result is written.
constexpr int64_t kSlotsOfARow = 16;

// The kernels of one instruction set.
struct Kernels {
  const char* name;

  Work (*plan_attention)(const Attention&);
  void (*attention)(const Attention&, int64_t begin, int64_t end);

  Work (*plan_attention_backward)(const AttentionBackward&);
  void (*attention_backward)(const AttentionBackward&, void* scratch, int64_t begin, int64_t end);
  void (*finish_attention_backward)(const AttentionBackward&, void* scratch, int64_t begin, int64_t end);

  Work (*plan_dot_product)(const DotProduct&);
  void (*dot_product)(const DotProduct&, int64_t begin, int64_t end);
  Work (*plan_dot_product_backward)(const DotProduct&);
  void (*dot_product_backward)(const DotProduct&, void* scratch, int64_t begin, int64_t end);
  void (*finish_dot_product_backward)(const DotProduct&, void* scratch, int64_t begin, int64_t end);

  Work (*plan_weighted_average)(const WeightedAverage&);
  void (*weighted_average)(const WeightedAverage&, int64_t begin, int64_t end);
  Work (*plan_weighted_average_backward)(const WeightedAverage&);
  void (*weighted_average_backward)(const WeightedAverage&, void* scratch, int64_t begin, int64_t end);
  void (*finish_weighted_average_backward)(const WeightedAverage&, void* scratch, int64_t begin, int64_t end);
};

// Null where the file was not compiled for a processor that has such an instruction set. Whether the machine at hand has it is
// asked by the caller, before any of the functions is called.
const Kernels* kernels_amx();  // only where kernels_avx512() is not null
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_baseline();

}  // namespace attnreg::cpu
