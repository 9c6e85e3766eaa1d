// The ops of the cublas_block backend, registered through torch's stable ABI: one build serves many torch versions.
//
// Every op writes into a tensor that it is given; the products between them are torch's own (cuBLAS), or made by its cuBLAS.
// The host kernels are the same code in a plain loop: they test the index arithmetic where there is no GPU.
#include "gather.cuh"
#include "keys.cuh"
#include "mask.cuh"
#include "mend.cuh"
#include "multiply.cuh"
#include "pack.cuh"
#include "scatter.cuh"
#include "split.cuh"
#include "unpack.cuh"

STABLE_TORCH_LIBRARY(attnreg_cublas, m) {
  m.def("pack(Tensor source, Tensor(a!) packed, Tensor?[] given, int keys, bool by_head, int pitch, int first, "
        "int lead, bool of_keys, int shift, int width) -> ()");
  m.def("bound_packed_rows(Tensor offsets, Tensor(a!) table, int keys) -> ()");
  m.def("unpack(Tensor packed, Tensor(a!) result, Tensor?[] given, int pitch, int lead, bool of_keys) -> ()");
  m.def("split(Tensor source, Tensor(a!) factors, Tensor(b!) scales, Tensor?[] given, int pitch, int first, int lead, "
        "bool of_keys) -> ()");
  m.def("gather_band(Tensor query, Tensor key, Tensor dense, Tensor? query_scales, Tensor? key_scales, "
        "Tensor(a!) band, Tensor? bias, Tensor?[] given, int[] geometry, int first_line, int first_block, int left, "
        "float scale, float hidden) -> ()");
  m.def("scatter_band(Tensor band, Tensor(a!) dense, Tensor? bias, Tensor?[] given, int[] geometry, "
        "int first_line, int first_block, int keys, int left) -> ()");
  m.def("scatter_band_by_key(Tensor band, Tensor(a!) dense, Tensor? bias, Tensor?[] given, int[] geometry, "
        "int first_line, int first_block, int keys, int left) -> ()");
  m.def("mend_rows(Tensor band, Tensor source, Tensor(a!) output, Tensor? bias, Tensor?[] given, "
        "int[] geometry, int keys, int left, float scale) -> ()");
  m.def("mend_rows_by_key(Tensor band, Tensor source, Tensor(a!) output, Tensor? bias, Tensor?[] given, "
        "int[] geometry, int keys, int left, float scale) -> ()");
  m.def("multiply(Tensor left, Tensor right, Tensor(a!) result, Tensor(b!) addresses, float scale, float beta) -> ()");
  m.def("mask_band(Tensor band, Tensor(a!) masked, Tensor? bias, Tensor?[] given, int keys, int shift) -> ()");
}

namespace {

void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("pack", TORCH_BOX(&attnreg::pack));
  m.impl("bound_packed_rows", TORCH_BOX(&attnreg::bound_packed_rows));
  m.impl("unpack", TORCH_BOX(&attnreg::unpack));
  m.impl("split", TORCH_BOX(&attnreg::split));
  m.impl("gather_band", TORCH_BOX(&attnreg::gather_band));
  m.impl("scatter_band", TORCH_BOX(&attnreg::scatter_band));
  m.impl("scatter_band_by_key", TORCH_BOX(&attnreg::scatter_band_by_key));
  m.impl("mend_rows", TORCH_BOX(&attnreg::mend_rows));
  m.impl("mend_rows_by_key", TORCH_BOX(&attnreg::mend_rows_by_key));
  m.impl("multiply", TORCH_BOX(&attnreg::multiply));
  m.impl("mask_band", TORCH_BOX(&attnreg::mask_band));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(attnreg_cublas, CUDA, m) { register_kernels(m); }
STABLE_TORCH_LIBRARY_IMPL(attnreg_cublas, CPU, m) { register_kernels(m); }
