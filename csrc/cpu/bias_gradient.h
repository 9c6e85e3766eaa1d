// The gradient of a bias: a band's visible slots, summed over the dimensions in which the bias broadcasts. Sums are made in double.
#pragma once

#include "band.h"

namespace attnreg::cpu {
namespace {

// How it is cut: into heads of the bias and pieces of the rows; sums over rows are made of those of the pieces.
struct BiasGradient {
  BiasGradient(const Sizes& sizes, const Bias& gradient, const Rows& window) {
    if (gradient.data == nullptr) return;
    batch = gradient.n == 0 ? 1 : sizes.batch;
    heads = gradient.h == 0 ? 1 : sizes.heads;
    slots = gradient.w == 0 ? 1 : window.left + window.right + 1;
    by_row = gradient.l != 0;
    rows = by_row ? kRowsOfUnit : most(kRowsOfUnit, ceil_div(sizes.query_length, kMostPieces));
    pieces = ceil_div(sizes.query_length, rows);
    units = batch * heads * pieces;
    if (by_row) return;
    finishing = batch * heads;
    scratch = units * slots * sizeof(double);
  }

  static constexpr int64_t kMostPieces = 64;
  int64_t batch = 0, heads = 0, slots = 0, rows = 0, pieces = 0;
  bool by_row = false;
  int64_t units = 0, finishing = 0;
  size_t scratch = 0;
};

// Adds the visible slots of row i to `sums`, or all of them to the first.
template <class T>
inline void add_row(const Band& call, int64_t n, int64_t h, int64_t i, const Place& place, int64_t slots, double* sums) {
  T numbers[kKeysAtOnce], bias[kKeysAtOnce];
  uint8_t seen[kKeysAtOnce] = {};
  for (int64_t key = place.first; key < place.last; key += kKeysAtOnce) {
    const int64_t count = least(kKeysAtOnce, place.last - key);
    read_weights<T>(call, n, h, i, place, key, count, bias, numbers, seen);
    if (slots == 1) {
      for (int64_t c = 0; c < count; ++c) sums[0] += numbers[c];
    } else {
      double* const to = sums + (key - place.origin);
      for (int64_t c = 0; c < count; ++c) to[c] += numbers[c];
    }
  }
}

// One unit; `partial` holds the sums of the pieces where rows are summed.
template <class T>
inline void sum_to_bias(const BiasGradient& cut, const Band& call, const Bias& gradient, double* partial, int64_t unit) {
  const int64_t piece = unit % cut.pieces, head = unit / cut.pieces % cut.heads, n = unit / cut.pieces / cut.heads;
  const int64_t begin = piece * cut.rows, end = least(begin + cut.rows, call.sizes.query_length);
  const int64_t first_n = cut.batch == 1 ? 0 : n, end_n = cut.batch == 1 ? call.sizes.batch : n + 1;
  const int64_t first_h = cut.heads == 1 ? 0 : head, end_h = cut.heads == 1 ? call.sizes.heads : head + 1;
  double* const sums = cut.by_row ? Scratch::begin().take<double>(cut.slots) : partial + unit * cut.slots;
  Place places[kRowsOfUnit];
  for (int64_t row = begin; row < end; row += cut.by_row ? 1 : kRowsOfUnit) {
    const int64_t count = cut.by_row ? 1 : least(kRowsOfUnit, end - row);
    if (cut.by_row || row == begin) memset(sums, 0, cut.slots * sizeof(double));
    for (int64_t each = first_n; each < end_n; ++each) {
      place_rows(call.sizes, *call.window, each, row, count, places);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t h = first_h; h < end_h; ++h) add_row<T>(call, each, h, row + i, places[i], cut.slots, sums);
      }
    }
    if (!cut.by_row) continue;
    const int64_t first = n * gradient.n + head * gradient.h + row * gradient.l;
    narrow_to(sums, 1.0, cut.slots, at(gradient.data, gradient.type, first), gradient.type, gradient.w);
  }
}

// One head: the sums of its pieces, in their order.
inline void finish_bias(const BiasGradient& cut, const Bias& gradient, double* partial, int64_t unit) {
  double* const sums = partial + unit * cut.pieces * cut.slots;
  for (int64_t piece = 1; piece < cut.pieces; ++piece) {
    for (int64_t c = 0; c < cut.slots; ++c) sums[c] += sums[piece * cut.slots + c];
  }
  const int64_t first = unit / cut.heads * gradient.n + unit % cut.heads * gradient.h;
  narrow_to(sums, 1.0, cut.slots, at(gradient.data, gradient.type, first), gradient.type, gradient.w);
}

}  // namespace
}  // namespace attnreg::cpu
