// Derivatives of silu(x) = x s, with s = 1 / (1 + exp(-x)) given, in one pass each.

#include <cstdint>

namespace {

// g silu'(x)
template <typename T>
void silu_by_x(const T* x, const T* s, const T* g, T* out, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 1 << 15)
  for (int64_t i = 0; i < n; ++i) out[i] = g[i] * s[i] * (1 + x[i] * (1 - s[i]));
}

// the derivatives of a g silu'(x) by g and by x
template <typename T>
void silu_twice(const T* x, const T* s, const T* g, const T* a, T* by_g, T* by_x, int64_t n,
                int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 1 << 15)
  for (int64_t i = 0; i < n; ++i) {
    const T rest = 1 - s[i];
    by_g[i] = a[i] * s[i] * (1 + x[i] * rest);
    by_x[i] = a[i] * g[i] * s[i] * rest * (2 + x[i] * (1 - 2 * s[i]));
  }
}

}  // namespace

#define EXPORT_SILU(SUFFIX, TYPE)                                                               \
  extern "C" void silu_by_x_##SUFFIX(const TYPE* x, const TYPE* s, const TYPE* g, TYPE* out,    \
                                     int64_t n, int threads) {                                  \
    silu_by_x<TYPE>(x, s, g, out, n, threads);                                                  \
  }                                                                                             \
  extern "C" void silu_twice_##SUFFIX(const TYPE* x, const TYPE* s, const TYPE* g,              \
                                      const TYPE* a, TYPE* by_g, TYPE* by_x, int64_t n,         \
                                      int threads) {                                            \
    silu_twice<TYPE>(x, s, g, a, by_g, by_x, n, threads);                                       \
  }

EXPORT_SILU(f64, double)
EXPORT_SILU(f32, float)
