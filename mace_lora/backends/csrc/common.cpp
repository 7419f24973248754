// What the kernels share: indices, edges in groups, vectors of channels.
//
// The files of this folder are joined in the order of library.py and compiled once per machine.
// They are called through ctypes: plain C symbols, no torch headers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace {

using Index = int64_t;

// Edges (or atoms) sorted by a key: order[ptr[n]..ptr[n+1]] are those with key n.
struct Groups {
  std::vector<Index> ptr, order;
  Groups(const Index* key, Index n_edges, Index n_keys) : ptr(n_keys + 1, 0), order(n_edges) {
    for (Index e = 0; e < n_edges; ++e) ++ptr[key[e] + 1];
    for (Index n = 0; n < n_keys; ++n) ptr[n + 1] += ptr[n];
    std::vector<Index> next(ptr.begin(), ptr.end() - 1);
    for (Index e = 0; e < n_edges; ++e) order[next[key[e]]++] = e;
  }
};

// Some channels in a vector register, and how many rows of two of them are summed at a time
#ifdef __AVX512F__
constexpr Index VECTOR = 64, ROWS = 7;
#else
constexpr Index VECTOR = 32, ROWS = 3;
#endif
template <typename T, Index BYTES>
struct Vector {
  typedef T type __attribute__((vector_size(BYTES)));
};
template <typename T>
using Wide = typename Vector<T, VECTOR>::type;
template <typename T>
using One = typename Vector<T, sizeof(T)>::type;

template <typename V, typename T>
inline V load(const T* x) {
  V v;
  std::memcpy(&v, x, sizeof(V));
  return v;
}

template <typename V, typename T>
inline void store(const V& v, T* x) {
  std::memcpy(x, &v, sizeof(V));
}

// f(0) ... f(N - 1), written out: what they index stays in registers
template <int N, typename F>
__attribute__((always_inline)) inline void each(const F& f) {
  if constexpr (N > 0) {
    each<N - 1>(f);
    f(N - 1);
  }
}

template <typename T, typename V>
inline T sum(const V& v) {
  if constexpr (sizeof(V) == sizeof(T)) {
    return v[0];
  } else {
    using Half = typename Vector<T, sizeof(V) / 2>::type;
    Half halves[2];
    std::memcpy(halves, &v, sizeof(V));
    return sum<T, Half>(halves[0] + halves[1]);
  }
}

}  // namespace
