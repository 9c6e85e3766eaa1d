// exp and tanh of vectors.
//
// Range reduction and polynomials as in Cody and Waite, "Software Manual for the Elementary Functions", 1980; coefficients for
// float those of minimax approximations that are in wide use.
#pragma once

#include "vector.h"

namespace attnreg::cpu {
namespace {

template <class T>
struct Exponential;

template <>
struct Exponential<float> {
  // Below it exp is no normal number, and taken as 0; above it, infinite.
  static constexpr float kLeast = -87.3f, kMost = 88.7f;
  static constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: a number added to it is rounded to an integer
  static constexpr float kHigh = 0.693359375f, kLow = -2.12194440e-4f;
  static constexpr int kMantissa = 23;
  static constexpr int kTerms = 6;
  static constexpr float kCoefficients[kTerms] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                                  4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};

template <>
struct Exponential<double> {
  static constexpr double kLeast = -708.3, kMost = 709.7;
  static constexpr double kShift = 6755399441055744.0;
  static constexpr double kHigh = 6.93145751953125e-1, kLow = 1.42860682030941723212e-6;
  static constexpr int kMantissa = 52;
  static constexpr int kTerms = 12;
  static constexpr double kCoefficients[kTerms] = {
      1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
      1.0 / 5040.0,       1.0 / 720.0,       1.0 / 120.0,      1.0 / 24.0,      1.0 / 6.0,      0.5};
};

// exp(x); 0 at -inf, NaN at NaN.
template <class T>
ATTNREG_INLINE Vector<T> exponential(Vector<T> x) {
  using E = Exponential<T>;
  typedef typename VectorOf<Integer<T>>::Type Bits;
  // Selections that keep a NaN.
  Vector<T> within = x < E::kLeast ? all(E::kLeast) : x;
  within = within > E::kMost ? all(E::kMost) : within;
  const Vector<T> shifted = multiply_add(within, all(static_cast<T>(1.4426950408889634)), all(E::kShift));
  const Vector<T> n = shifted - E::kShift;
  const Vector<T> rest = multiply_add(n, all(-E::kLow), multiply_add(n, all(-E::kHigh), within));
  Vector<T> sum = all(E::kCoefficients[0]);
#pragma GCC unroll 16
  for (int i = 1; i < E::kTerms; ++i) sum = multiply_add(sum, rest, all(E::kCoefficients[i]));
  sum = multiply_add(sum, rest * rest, rest) + T(1);
  // n times the exponent's lowest bit; the shift itself leaves nothing there.
  const Vector<T> scaled = reinterpret_cast<Vector<T>>(reinterpret_cast<Bits>(sum) +
                                                       (reinterpret_cast<Bits>(shifted) << E::kMantissa));
  const Vector<T> result = x < E::kLeast ? Vector<T>{} : scaled;
  return x > E::kMost ? all(Limits<T>::kInfinity) : result;
}

template <class T>
ATTNREG_INLINE Vector<T> absolute(Vector<T> x) {
  return x < T(0) ? -x : x;
}

// tanh near 0, where it is x and little else.
ATTNREG_INLINE Vector<float> small_tanh(Vector<float> x) {
  const Vector<float> z = x * x;
  Vector<float> sum = all(-5.70498872745e-3f);
  sum = multiply_add(sum, z, all(2.06390887954e-2f));
  sum = multiply_add(sum, z, all(-5.37397155531e-2f));
  sum = multiply_add(sum, z, all(1.33314422036e-1f));
  sum = multiply_add(sum, z, all(-3.33332819422e-1f));
  return multiply_add(sum * z, x, x);
}

ATTNREG_INLINE Vector<double> small_tanh(Vector<double> x) {
  const Vector<double> z = x * x;
  Vector<double> above = all(-9.64399179425052238628e-1);
  above = multiply_add(above, z, all(-9.92877231001918586564e1));
  above = multiply_add(above, z, all(-1.61468768441708447952e3));
  Vector<double> below = z + 1.12811678491632931402e2;
  below = multiply_add(below, z, all(2.23548839060100448583e3));
  below = multiply_add(below, z, all(4.84406305325125486048e3));
  return multiply_add(z * above / below, x, x);
}

template <class T>
ATTNREG_INLINE Vector<T> hyperbolic_tangent(Vector<T> x) {
  const Vector<T> size = absolute<T>(x);
  const Vector<T> bounded = size > T(30) ? all(T(30)) : size;
  const Vector<T> large = T(1) - T(2) / (exponential<T>(bounded + bounded) + T(1));
  const Vector<T> small = small_tanh(x);
  return size < T(0.625) ? small : x < T(0) ? -large : large;
}

}  // namespace
}  // namespace attnreg::cpu
