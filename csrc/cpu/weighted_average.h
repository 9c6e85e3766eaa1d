// The weighted average and its gradients.
#pragma once

#include "band_products.h"

namespace attnreg::cpu {
namespace {

inline Band weights_of(const WeightedAverage& call, const View& band, const View& rows, const View& keys) {
  Band found;
  found.sizes = call.sizes;
  found.sizes.head_dim = call.sizes.value_dim;
  found.type = call.type;
  found.window = &call.rows;
  found.band = band;
  found.rows = rows;
  found.keys = keys;
  return found;
}

inline Work plan_weighted_average(const WeightedAverage& call) {
  Work work;
  work.units = units_of_rows(call.sizes);
  work.operations = operations_of(weights_of(call, call.weights, call.output, call.value).sizes, call.rows);
  return work;
}

inline void weighted_average(const WeightedAverage& call, int64_t begin, int64_t end) {
  const Band band = weights_of(call, call.weights, call.output, call.value);
  for (int64_t unit = begin; unit < end; ++unit) {
    in_accumulator(call.type, [&](auto zero) { average_to_rows<decltype(zero)>(band, unit); });
  }
}

// Units of the gradient of weights, then of values.
inline Work plan_weighted_average_backward(const WeightedAverage& call) {
  const double operations = plan_weighted_average(call).operations;
  Work work;
  if (call.grad_weights.data != nullptr) {
    work.units += units_of_rows(call.sizes);
    work.operations += operations;
  }
  if (call.grad_value.data != nullptr) {
    work.units += units_of_keys(call.sizes);
    work.operations += operations;
  }
  return work;
}

inline void weighted_average_backward(const WeightedAverage& call, void*, int64_t begin, int64_t end) {
  const Band of_weights = weights_of(call, call.grad_weights, call.grad_output, call.value);
  const Band of_values = weights_of(call, call.weights, call.grad_output, call.grad_value);
  const int64_t first = call.grad_weights.data == nullptr ? 0 : units_of_rows(call.sizes);
  for (int64_t unit = begin; unit < end; ++unit) {
    in_accumulator(call.type, [&](auto zero) {
      using T = decltype(zero);
      if (unit < first) {
        multiply_to_band<T>(of_weights, unit);
      } else {
        average_to_keys<T>(of_values, unit - first);
      }
    });
  }
}

inline void finish_weighted_average_backward(const WeightedAverage&, void*, int64_t, int64_t) {}

}  // namespace
}  // namespace attnreg::cpu
