// The dot product and its gradients.
#pragma once

#include "band_products.h"
#include "bias_gradient.h"

namespace attnreg::cpu {
namespace {

inline Band scores_of(const DotProduct& call, const View& band) {
  Band found;
  found.sizes = call.sizes;
  found.type = call.type;
  found.window = &call.rows;
  found.scale = call.scale;
  found.band = band;
  found.rows = call.query;
  found.keys = call.key;
  found.bias = call.bias;
  found.hidden = -Limits<double>::kInfinity;
  return found;
}

inline Work plan_dot_product(const DotProduct& call) {
  Work work;
  work.units = units_of_rows(call.sizes);
  work.operations = operations_of(call.sizes, call.rows);
  return work;
}

inline void dot_product(const DotProduct& call, int64_t begin, int64_t end) {
  const Band band = scores_of(call, call.scores);
  for (int64_t unit = begin; unit < end; ++unit) {
    in_accumulator(call.type, [&](auto zero) { multiply_to_band<decltype(zero)>(band, unit); });
  }
}

// Units of the gradient of queries, then of keys, then of the bias.
struct GradientUnits {
  explicit GradientUnits(const DotProduct& call)
      : query(call.grad_query.data == nullptr ? 0 : units_of_rows(call.sizes)),
        key(call.grad_key.data == nullptr ? 0 : units_of_keys(call.sizes)),
        bias(call.sizes, call.grad_bias, call.rows) {}

  int64_t query, key;
  BiasGradient bias;
};

inline Work plan_dot_product_backward(const DotProduct& call) {
  const GradientUnits units(call);
  Work work;
  work.units = units.query + units.key + units.bias.units;
  work.finishing = units.bias.finishing;
  work.scratch = units.bias.scratch;
  work.operations = ((units.query > 0) + (units.key > 0)) * operations_of(call.sizes, call.rows);
  return work;
}

inline void dot_product_backward(const DotProduct& call, void* scratch, int64_t begin, int64_t end) {
  const Band band = scores_of(call, call.grad_scores);
  const GradientUnits units(call);
  Band of_queries = band, of_keys = band;
  of_queries.rows = call.grad_query;
  of_keys.keys = call.grad_key;
  for (int64_t unit = begin; unit < end; ++unit) {
    in_accumulator(call.type, [&](auto zero) {
      using T = decltype(zero);
      if (unit < units.query) {
        average_to_rows<T>(of_queries, unit);
      } else if (unit < units.query + units.key) {
        average_to_keys<T>(of_keys, unit - units.query);
      } else {
        sum_to_bias<T>(units.bias, band, call.grad_bias, static_cast<double*>(scratch), unit - units.query - units.key);
      }
    });
  }
}

inline void finish_dot_product_backward(const DotProduct& call, void* scratch, int64_t begin, int64_t end) {
  const GradientUnits units(call);
  for (int64_t unit = begin; unit < end; ++unit) {
    finish_bias(units.bias, call.grad_bias, static_cast<double*>(scratch), unit);
  }
}

}  // namespace
}  // namespace attnreg::cpu
