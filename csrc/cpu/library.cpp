// The ops of the attnreg_cpu backend, registered through torch's stable ABI: one build serves many torch versions.
//
// Every op writes into tensors that it is given. Here tensors become raw pointers, whose sizes are checked; the kernels of the
// best instruction set that the processor has do the rest, unit by unit.
#include <atomic>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "kernels.h"
#include "rows.h"
#include "threads.h"

namespace attnreg::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Which kernels run

std::atomic<const Kernels*> chosen{nullptr};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// The processor's matrix unit, for bfloat16. Linux lets a process use it that has asked for it.
bool may_use_amx() {
#if defined(__linux__)
  constexpr unsigned kBFloat16Tiles = 1u << 22, kTiles = 1u << 24;
  constexpr long kAskFor = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kBFloat16Tiles) == 0 || (d & kTiles) == 0) return false;
  return has_avx512() && syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  static const bool answer = may_use_amx();
  return answer;
}
#endif

// Calls `use` with the kernels of each instruction set that the processor has, the best one first, until it says that it is done.
template <class Use>
void for_each_isa(const Use& use) {
  const Kernels* all[] = {
#if defined(__x86_64__)
      has_amx() ? kernels_amx() : nullptr,
      has_avx512() ? kernels_avx512() : nullptr,
      has_avx2() ? kernels_avx2() : nullptr,
#endif
      kernels_baseline(),
  };
  for (const Kernels* each : all) {
    if (each != nullptr && use(*each)) return;
  }
}

// Their names, with blanks between them.
std::string isas() {
  std::string names;
  for_each_isa([&](const Kernels& each) {
    names += (names.empty() ? "" : " ") + std::string(each.name);
    return false;
  });
  return names;
}

// Those of this name, the best ones where it is empty.
const Kernels* find_isa(const std::string& name) {
  const Kernels* found = nullptr;
  for_each_isa([&](const Kernels& each) {
    if (name.empty() || name == each.name) found = &each;
    return found != nullptr;
  });
  return found;
}

// Runs those of this name from now on, of the best one where it is empty; returns the name.
std::string choose_isa(std::string name) {
  const Kernels* const found = find_isa(name);
  STD_TORCH_CHECK(found != nullptr, "attnreg_cpu: no kernels for the instruction set '", name, "'");
  chosen = found;
  return found->name;
}

// For a process that was forked before it loaded the library.
void compute_alone() { forked.store(true); }

// From tensors to pointers

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Type::kFloat;
    case ScalarType::Double:
      return Type::kDouble;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    case ScalarType::Half:
      return Type::kHalf;
    default:
      STD_TORCH_CHECK(false, "attnreg_cpu: it computes float16, bfloat16, float32 and float64");
  }
}

void* data_of(const Tensor& tensor) { return const_cast<void*>(tensor.const_data_ptr()); }

// (N, H, L, X) of this type.
View view(const Tensor& tensor, Type type, int64_t batch, int64_t heads, int64_t length, int64_t width) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == batch && tensor.size(1) == heads && tensor.size(2) == length &&
                      tensor.size(3) == width && width > 0 && (width == 1 || tensor.stride(3) == 1) && type_of(tensor) == type,
                  "attnreg_cpu: it got tensors that do not fit");
  return {data_of(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

View view(const MaybeTensor& tensor, Type type, int64_t batch, int64_t heads, int64_t length, int64_t width) {
  return tensor.has_value() ? view(*tensor, type, batch, heads, length, width) : View{};
}

// A bias, or its gradient; `width` is W.
Bias bias_of(const MaybeTensor& tensor, const Sizes& sizes, int64_t width) {
  if (!tensor.has_value()) return {};
  const int64_t whole[] = {sizes.batch, sizes.heads, sizes.query_length, width};
  STD_TORCH_CHECK(tensor->dim() == 4, "attnreg_cpu: it got a bias that does not fit");
  int64_t strides[4];
  for (int dim = 0; dim < 4; ++dim) {
    const int64_t size = tensor->size(dim);
    STD_TORCH_CHECK(size == 1 || size == whole[dim], "attnreg_cpu: it got a bias that does not fit");
    strides[dim] = size == 1 ? 0 : tensor->stride(dim);
  }
  return {data_of(*tensor), type_of(*tensor), strides[0], strides[1], strides[2], strides[3]};
}

Numbers numbers_of(const MaybeTensor& tensor, int64_t size) {
  if (!tensor.has_value()) return {};
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == size, "attnreg_cpu: it got sinks that do not fit");
  return {data_of(*tensor), type_of(*tensor), tensor->stride(0)};
}

Integers integers_of(const MaybeTensor& tensor, int64_t size) {
  if (!tensor.has_value()) return {};
  const auto type = tensor->scalar_type();
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == size && (size == 1 || tensor->stride(0) == 1) &&
                      (type == ScalarType::Long || type == ScalarType::Int),
                  "attnreg_cpu: it got integers that do not fit");
  return {tensor->const_data_ptr(), type == ScalarType::Long};
}

// What is cut by offsets that decrease does not fit into the room that was made for it.
Integers offsets_of(const MaybeTensor& tensor, int64_t size) {
  const Integers offsets = integers_of(tensor, size);
  for (int64_t i = 1; i < size; ++i) {
    STD_TORCH_CHECK(at(offsets, i - 1) <= at(offsets, i), "attnreg_cpu: it got offsets that decrease");
  }
  return offsets;
}

Rows rows_of(const Sizes& sizes, int64_t left, int64_t right, const MaybeTensor& key_lengths, const MaybeTensor& key_starts,
             const MaybeTensor& query_starts, const MaybeTensor& cu_seqlens_q, const MaybeTensor& cu_seqlens_k) {
  constexpr int64_t kWidest = int64_t{1} << 62;
  STD_TORCH_CHECK(left >= 0 && right >= 0 && left < kWidest && right < kWidest, "attnreg_cpu: it got a window that does not fit");
  Rows rows;
  rows.left = left;
  rows.right = right;
  rows.key_lengths = integers_of(key_lengths, sizes.batch);
  rows.key_starts = integers_of(key_starts, sizes.batch);
  rows.query_starts = integers_of(query_starts, sizes.batch);
  if (cu_seqlens_q.has_value()) {
    const int64_t offsets = cu_seqlens_q->size(0);
    STD_TORCH_CHECK(sizes.batch == 1 && offsets >= 1, "attnreg_cpu: it got offsets that do not fit");
    rows.sequences = offsets - 1;
    rows.cu_seqlens_q = offsets_of(cu_seqlens_q, offsets);
    rows.cu_seqlens_k = cu_seqlens_k.has_value() ? offsets_of(cu_seqlens_k, offsets) : rows.cu_seqlens_q;
  }
  return rows;
}

// Sizes of queries (N, H, Lq, .) against keys (N, Hkv, Lk, .).
Sizes sizes_of(const Tensor& queries, const Tensor& keys, int64_t head_dim, int64_t value_dim) {
  STD_TORCH_CHECK(queries.dim() == 4 && keys.dim() == 4, "attnreg_cpu: it got tensors that do not fit");
  const Sizes sizes{queries.size(0), queries.size(1), keys.size(1), queries.size(2), keys.size(2), head_dim, value_dim};
  STD_TORCH_CHECK(sizes.kv_heads > 0 && sizes.heads % sizes.kv_heads == 0, "attnreg_cpu: it got heads that do not fit");
  STD_TORCH_CHECK(sizes.batch > 0 && sizes.heads > 0 && sizes.query_length > 0 && sizes.key_length > 0,
                  "attnreg_cpu: it got tensors without sequences, heads, rows or keys");
  return sizes;
}

// Running

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

std::unique_ptr<void, Free> scratch_of(size_t bytes) {
  constexpr size_t kLine = 64;
  if (bytes == 0) return nullptr;
  void* memory = std::aligned_alloc(kLine, (bytes + kLine - 1) / kLine * kLine);
  STD_TORCH_CHECK(memory != nullptr, "attnreg_cpu: no memory for ", bytes, " bytes of scratch");
  return std::unique_ptr<void, Free>(memory);
}

// To be asked for once in a call: other kernels may be chosen meanwhile, which cut it in another way.
const Kernels& kernels() {
  const Kernels* const now = chosen.load();
  return now != nullptr ? *now : *find_isa("");
}

template <class Call>
void run(const Call& call, const Work& work, void (*compute)(const Call&, int64_t, int64_t)) {
  for_each_unit(work.units, work.operations, [&](int64_t unit) { compute(call, unit, unit + 1); });
}

template <class Call>
void run(const Call& call, const Work& work, void (*compute)(const Call&, void*, int64_t, int64_t),
         void (*finish)(const Call&, void*, int64_t, int64_t)) {
  const auto scratch = scratch_of(work.scratch);
  for_each_unit(work.units, work.operations, [&](int64_t unit) { compute(call, scratch.get(), unit, unit + 1); });
  for_each_unit(work.finishing, work.operations, [&](int64_t unit) { finish(call, scratch.get(), unit, unit + 1); });
}

// The ops

void dot_product(Tensor query, Tensor key, Tensor scores, MaybeTensor bias, MaybeTensor key_lengths, MaybeTensor key_starts,
                 MaybeTensor query_starts, MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, int64_t left, int64_t right,
                 double scale) {
  DotProduct call;
  const Sizes sizes = call.sizes = sizes_of(query, key, query.size(3), 0);
  const Type type = call.type = type_of(query);
  const int64_t width = left + right + 1;
  call.rows = rows_of(sizes, left, right, key_lengths, key_starts, query_starts, cu_seqlens_q, cu_seqlens_k);
  call.scale = scale;
  call.query = view(query, type, sizes.batch, sizes.heads, sizes.query_length, sizes.head_dim);
  call.key = view(key, type, sizes.batch, sizes.kv_heads, sizes.key_length, sizes.head_dim);
  call.scores = view(scores, type, sizes.batch, sizes.heads, sizes.query_length, width);
  call.bias = bias_of(bias, sizes, width);
  const Kernels& isa = kernels();
  run(call, isa.plan_dot_product(call), isa.dot_product);
}

void dot_product_backward(Tensor grad_scores, Tensor query, Tensor key, MaybeTensor grad_query, MaybeTensor grad_key,
                          MaybeTensor grad_bias, MaybeTensor bias, MaybeTensor key_lengths, MaybeTensor key_starts,
                          MaybeTensor query_starts, MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, int64_t left,
                          int64_t right, double scale) {
  DotProduct call;
  const Sizes sizes = call.sizes = sizes_of(query, key, query.size(3), 0);
  const Type type = call.type = type_of(query);
  const int64_t width = left + right + 1;
  call.rows = rows_of(sizes, left, right, key_lengths, key_starts, query_starts, cu_seqlens_q, cu_seqlens_k);
  call.scale = scale;
  call.query = view(query, type, sizes.batch, sizes.heads, sizes.query_length, sizes.head_dim);
  call.key = view(key, type, sizes.batch, sizes.kv_heads, sizes.key_length, sizes.head_dim);
  call.grad_scores = view(grad_scores, type, sizes.batch, sizes.heads, sizes.query_length, width);
  call.bias = bias_of(bias, sizes, width);
  call.grad_query = view(grad_query, type, sizes.batch, sizes.heads, sizes.query_length, sizes.head_dim);
  call.grad_key = view(grad_key, type, sizes.batch, sizes.kv_heads, sizes.key_length, sizes.head_dim);
  call.grad_bias = bias_of(grad_bias, sizes, width);
  const Kernels& isa = kernels();
  run(call, isa.plan_dot_product_backward(call), isa.dot_product_backward, isa.finish_dot_product_backward);
}

void weighted_average(Tensor weights, Tensor value, Tensor output, MaybeTensor key_lengths, MaybeTensor key_starts,
                      MaybeTensor query_starts, MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, int64_t left,
                      int64_t right) {
  WeightedAverage call;
  const Sizes sizes = call.sizes = sizes_of(weights, value, 0, value.size(3));
  const Type type = call.type = type_of(weights);
  call.rows = rows_of(sizes, left, right, key_lengths, key_starts, query_starts, cu_seqlens_q, cu_seqlens_k);
  call.weights = view(weights, type, sizes.batch, sizes.heads, sizes.query_length, left + right + 1);
  call.value = view(value, type, sizes.batch, sizes.kv_heads, sizes.key_length, sizes.value_dim);
  call.output = view(output, type, sizes.batch, sizes.heads, sizes.query_length, sizes.value_dim);
  const Kernels& isa = kernels();
  run(call, isa.plan_weighted_average(call), isa.weighted_average);
}

void weighted_average_backward(Tensor grad_output, Tensor weights, Tensor value, MaybeTensor grad_weights,
                               MaybeTensor grad_value, MaybeTensor key_lengths, MaybeTensor key_starts,
                               MaybeTensor query_starts, MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, int64_t left,
                               int64_t right) {
  WeightedAverage call;
  const Sizes sizes = call.sizes = sizes_of(weights, value, 0, value.size(3));
  const Type type = call.type = type_of(weights);
  const int64_t width = left + right + 1;
  call.rows = rows_of(sizes, left, right, key_lengths, key_starts, query_starts, cu_seqlens_q, cu_seqlens_k);
  call.weights = view(weights, type, sizes.batch, sizes.heads, sizes.query_length, width);
  call.value = view(value, type, sizes.batch, sizes.kv_heads, sizes.key_length, sizes.value_dim);
  call.grad_output = view(grad_output, type, sizes.batch, sizes.heads, sizes.query_length, sizes.value_dim);
  call.grad_weights = view(grad_weights, type, sizes.batch, sizes.heads, sizes.query_length, width);
  call.grad_value = view(grad_value, type, sizes.batch, sizes.kv_heads, sizes.key_length, sizes.value_dim);
  const Kernels& isa = kernels();
  run(call, isa.plan_weighted_average_backward(call), isa.weighted_average_backward, isa.finish_weighted_average_backward);
}

// What forward and backward of attention are given alike.
void set_attention(Attention& call, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& log_sum_exp,
                   const MaybeTensor& bias, const MaybeTensor& key_lengths, const MaybeTensor& key_starts,
                   const MaybeTensor& query_starts, const MaybeTensor& cu_seqlens_q, const MaybeTensor& cu_seqlens_k,
                   const MaybeTensor& sinks, const MaybeTensor& seed, int64_t left, int64_t right, double scale,
                   double softcap, double dropout_p) {
  const Sizes sizes = call.sizes = sizes_of(query, key, query.size(3), value.size(3));
  const Type type = call.type = type_of(query);
  call.rows = rows_of(sizes, left, right, key_lengths, key_starts, query_starts, cu_seqlens_q, cu_seqlens_k);
  call.scale = scale;
  call.softcap = softcap;
  call.query = view(query, type, sizes.batch, sizes.heads, sizes.query_length, sizes.head_dim);
  call.key = view(key, type, sizes.batch, sizes.kv_heads, sizes.key_length, sizes.head_dim);
  call.value = view(value, type, sizes.batch, sizes.kv_heads, sizes.key_length, sizes.value_dim);
  call.bias = bias_of(bias, sizes, left + right + 1);
  call.sinks = numbers_of(sinks, sizes.heads);
  if (dropout_p != 0.0) {
    STD_TORCH_CHECK(seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                    "attnreg_cpu: it got a seed that does not fit");
    call.dropout_p = dropout_p;
    call.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  }
  const auto wanted = type == Type::kDouble ? Type::kDouble : Type::kFloat;
  STD_TORCH_CHECK(log_sum_exp.is_contiguous() && type_of(log_sum_exp) == wanted &&
                      log_sum_exp.numel() == sizes.batch * sizes.heads * sizes.query_length,
                  "attnreg_cpu: it got a log-sum-exp that does not fit");
  call.log_sum_exp = data_of(log_sum_exp);
}

void attention(Tensor query, Tensor key, Tensor value, Tensor output, Tensor log_sum_exp, MaybeTensor bias,
               MaybeTensor key_lengths, MaybeTensor key_starts, MaybeTensor query_starts, MaybeTensor cu_seqlens_q,
               MaybeTensor cu_seqlens_k, MaybeTensor sinks, MaybeTensor seed, int64_t left, int64_t right, double scale,
               double softcap, double dropout_p) {
  Attention call;
  set_attention(call, query, key, value, log_sum_exp, bias, key_lengths, key_starts, query_starts, cu_seqlens_q,
                cu_seqlens_k, sinks, seed, left, right, scale, softcap, dropout_p);
  const Sizes& sizes = call.sizes;
  call.output = view(output, call.type, sizes.batch, sizes.heads, sizes.query_length, sizes.value_dim);
  const Kernels& isa = kernels();
  run(call, isa.plan_attention(call), isa.attention);
}

// A contiguous tensor on the CPU, not initialised.
Tensor empty(ScalarType type, std::initializer_list<int64_t> sizes) {
  int64_t strides[4] = {}, step = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = step;
    step *= sizes.begin()[dim];
  }
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                  static_cast<int32_t>(type), aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// Of contiguous queries and with nothing else given: a tiny call takes as long as what is handed over.
std::tuple<Tensor, Tensor> plain_attention(Tensor query, Tensor key, Tensor value, int64_t left, int64_t right, double scale) {
  const int64_t batch = query.size(0), heads = query.size(1), length = query.size(2);
  const auto type = query.scalar_type();
  Tensor output = empty(type, {batch, heads, length, value.size(3)});
  Tensor log_sum_exp = empty(type == ScalarType::Double ? type : ScalarType::Float, {batch, heads, length});
  attention(query, key, value, output, log_sum_exp, {}, {}, {}, {}, {}, {}, {}, {}, left, right, scale, 0.0, 0.0);
  return {output, log_sum_exp};
}

void attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor log_sum_exp,
                        MaybeTensor grad_log_sum_exp, MaybeTensor grad_query, MaybeTensor grad_key, MaybeTensor grad_value,
                        MaybeTensor grad_bias, MaybeTensor grad_sinks, MaybeTensor bias, MaybeTensor key_lengths,
                        MaybeTensor key_starts, MaybeTensor query_starts, MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k,
                        MaybeTensor sinks, MaybeTensor seed, int64_t left, int64_t right, double scale, double softcap,
                        double dropout_p) {
  AttentionBackward call;
  set_attention(call, query, key, value, log_sum_exp, bias, key_lengths, key_starts, query_starts, cu_seqlens_q,
                cu_seqlens_k, sinks, seed, left, right, scale, softcap, dropout_p);
  const Sizes& sizes = call.sizes;
  const Type type = call.type;
  call.grad_output = view(grad_output, type, sizes.batch, sizes.heads, sizes.query_length, sizes.value_dim);
  if (grad_log_sum_exp.has_value()) {
    STD_TORCH_CHECK(grad_log_sum_exp->is_contiguous() && grad_log_sum_exp->scalar_type() == log_sum_exp.scalar_type() &&
                        grad_log_sum_exp->numel() == log_sum_exp.numel(),
                    "attnreg_cpu: it got a gradient of the log-sum-exp that does not fit");
    call.grad_log_sum_exp = grad_log_sum_exp->const_data_ptr();
  }
  call.grad_query = view(grad_query, type, sizes.batch, sizes.heads, sizes.query_length, sizes.head_dim);
  call.grad_key = view(grad_key, type, sizes.batch, sizes.kv_heads, sizes.key_length, sizes.head_dim);
  call.grad_value = view(grad_value, type, sizes.batch, sizes.kv_heads, sizes.key_length, sizes.value_dim);
  call.grad_bias = bias_of(grad_bias, sizes, left + right + 1);
  call.grad_sinks = numbers_of(grad_sinks, sizes.heads);
  const Kernels& isa = kernels();
  run(call, isa.plan_attention_backward(call), isa.attention_backward, isa.finish_attention_backward);
}

}  // namespace
}  // namespace attnreg::cpu

#define ATTNREG_ROWS "Tensor? key_lengths, Tensor? key_starts, Tensor? query_starts, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "

STABLE_TORCH_LIBRARY(attnreg_cpu, m) {
  m.def("isas() -> str");
  m.def("choose_isa(str name) -> str");
  m.def("compute_alone() -> ()");
  m.def("dot_product(Tensor query, Tensor key, Tensor(a!) scores, Tensor? bias, " ATTNREG_ROWS
        "int left, int right, float scale) -> ()");
  m.def("dot_product_backward(Tensor grad_scores, Tensor query, Tensor key, Tensor(a!)? grad_query, Tensor(b!)? grad_key, "
        "Tensor(c!)? grad_bias, Tensor? bias, " ATTNREG_ROWS "int left, int right, float scale) -> ()");
  m.def("weighted_average(Tensor weights, Tensor value, Tensor(a!) output, " ATTNREG_ROWS "int left, int right) -> ()");
  m.def("weighted_average_backward(Tensor grad_output, Tensor weights, Tensor value, Tensor(a!)? grad_weights, "
        "Tensor(b!)? grad_value, " ATTNREG_ROWS "int left, int right) -> ()");
  m.def("attention(Tensor query, Tensor key, Tensor value, Tensor(a!) output, Tensor(b!) log_sum_exp, Tensor? bias, "
        ATTNREG_ROWS "Tensor? sinks, Tensor? seed, int left, int right, float scale, float softcap, float dropout_p) -> ()");
  m.def("plain_attention(Tensor query, Tensor key, Tensor value, int left, int right, float scale) -> (Tensor, Tensor)");
  m.def("attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor log_sum_exp, "
        "Tensor? grad_log_sum_exp, Tensor(a!)? grad_query, Tensor(b!)? grad_key, Tensor(c!)? grad_value, "
        "Tensor(d!)? grad_bias, Tensor(e!)? grad_sinks, Tensor? bias, " ATTNREG_ROWS
        "Tensor? sinks, Tensor? seed, int left, int right, float scale, float softcap, float dropout_p) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(attnreg_cpu, CompositeExplicitAutograd, m) {
  m.impl("isas", TORCH_BOX(&attnreg::cpu::isas));
  m.impl("choose_isa", TORCH_BOX(&attnreg::cpu::choose_isa));
  m.impl("compute_alone", TORCH_BOX(&attnreg::cpu::compute_alone));
}

STABLE_TORCH_LIBRARY_IMPL(attnreg_cpu, CPU, m) {
  m.impl("dot_product", TORCH_BOX(&attnreg::cpu::dot_product));
  m.impl("dot_product_backward", TORCH_BOX(&attnreg::cpu::dot_product_backward));
  m.impl("weighted_average", TORCH_BOX(&attnreg::cpu::weighted_average));
  m.impl("weighted_average_backward", TORCH_BOX(&attnreg::cpu::weighted_average_backward));
  m.impl("attention", TORCH_BOX(&attnreg::cpu::attention));
  m.impl("plain_attention", TORCH_BOX(&attnreg::cpu::plain_attention));
  m.impl("attention_backward", TORCH_BOX(&attnreg::cpu::attention_backward));
}
