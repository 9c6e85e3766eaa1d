// All kernels, for the instruction set that the including file is compiled for: each has its own copy, which no other file sees.
#pragma once

#include "attention.h"
#include "attention_backward.h"
#include "dot_product.h"
#include "weighted_average.h"

namespace attnreg::cpu {
namespace {

constexpr Kernels table_of(const char* name) {
  Kernels kernels = {};
  kernels.name = name;
  kernels.plan_attention = plan_attention;
  kernels.attention = run_attention;
  kernels.plan_attention_backward = plan_attention_backward;
  kernels.attention_backward = run_attention_backward;
  kernels.finish_attention_backward = finish_attention_backward;
  kernels.plan_dot_product = plan_dot_product;
  kernels.dot_product = dot_product;
  kernels.plan_dot_product_backward = plan_dot_product_backward;
  kernels.dot_product_backward = dot_product_backward;
  kernels.finish_dot_product_backward = finish_dot_product_backward;
  kernels.plan_weighted_average = plan_weighted_average;
  kernels.weighted_average = weighted_average;
  kernels.plan_weighted_average_backward = plan_weighted_average_backward;
  kernels.weighted_average_backward = weighted_average_backward;
  kernels.finish_weighted_average_backward = finish_weighted_average_backward;
  return kernels;
}

}  // namespace
}  // namespace attnreg::cpu
