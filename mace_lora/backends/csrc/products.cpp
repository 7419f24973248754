// The two products of a MACE model, and their derivatives, for the CPU.
//
// Both are multilinear forms whose coefficients (Clebsch-Gordan) are mostly zero. Written as tensor
// operations they fill memory with intermediates of edges x channels x components; here each edge
// (or atom) stays in registers and first-level cache, with the channels as the vector direction.
//
// Compiled once per machine by library.py, called through ctypes: plain C symbols, no torch headers.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using Index = int64_t;

// One path of a convolution: irrep block of x times irrep block of y gives a block of the message.
// Offsets are components (not channels); coefficients are (i, j, k, value) from `first` to `last`.
struct Path {
  Index x, nx, y, ny, out, nout, first, last;
};

// A Clebsch-Gordan coefficient: x component i, y component j, message component k
struct Entry {
  Index i, j, k;
};

// (channels, components of one irrep) blocks of e3nn -> component-major (components, channels), and
// back. `blocks` holds (first component, components) of each irrep; all have `u` channels.
template <typename T>
void to_components(const T* row, T* out, const Index* blocks, Index n_blocks, Index u) {
  for (Index b = 0; b < n_blocks; ++b) {
    const Index start = blocks[2 * b], d = blocks[2 * b + 1];
    const T* in = row + start * u;
    for (Index k = 0; k < d; ++k) {
      T* o = out + (start + k) * u;
      for (Index c = 0; c < u; ++c) o[c] = in[c * d + k];
    }
  }
}

template <typename T>
void from_components(const T* in, T* row, const Index* blocks, Index n_blocks, Index u) {
  for (Index b = 0; b < n_blocks; ++b) {
    const Index start = blocks[2 * b], d = blocks[2 * b + 1];
    T* o = row + start * u;
    for (Index k = 0; k < d; ++k) {
      const T* i = in + (start + k) * u;
      for (Index c = 0; c < u; ++c) o[c * d + k] = i[c];
    }
  }
}

// Edges sorted by a key (their sender or receiver): order[ptr[n]..ptr[n+1]] are those of node n.
struct Groups {
  std::vector<Index> ptr, order;
  Groups(const Index* key, Index n_edges, Index n_nodes) : ptr(n_nodes + 1, 0), order(n_edges) {
    for (Index e = 0; e < n_edges; ++e) ++ptr[key[e] + 1];
    for (Index n = 0; n < n_nodes; ++n) ptr[n + 1] += ptr[n];
    std::vector<Index> next(ptr.begin(), ptr.end() - 1);
    for (Index e = 0; e < n_edges; ++e) order[next[key[e]]++] = e;
  }
};

// a[i][k] = sum_j coefficient(i, j, k) y[j]: what one path does to x, for one edge; or a[k][i]
template <typename T, bool BY_K>
void path_matrix(const Path& p, const Entry* entries, const T* values, const T* y, T* a) {
  std::memset(a, 0, sizeof(T) * p.nx * p.nout);
  for (Index t = p.first; t < p.last; ++t) {
    const Entry& m = entries[t];
    a[BY_K ? m.k * p.nx + m.i : m.i * p.nout + m.k] += values[t] * y[p.y + m.j];
  }
}

constexpr Index MAX_MATRIX = 32 * 32;  // (2 l + 1)^2 up to l = 15

// Some channels in a vector register, of AVX or, where there is none, of whatever there is
constexpr Index VECTOR = 32, REGISTERS = 4;  // bytes; vectors that are summed beside each other
template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(VECTOR)));
  static constexpr Index lanes = VECTOR / sizeof(T), channels = lanes * REGISTERS;
};

template <typename T>
inline typename Vector<T>::type load_vector(const T* x) {
  typename Vector<T>::type v;
  std::memcpy(&v, x, VECTOR);
  return v;
}

// out[c] += w[c] sum_k f[k] x[k][c]: a row of a path's matrix times rows of channels, for all `u`
template <typename T>
inline void add_rows(const T* __restrict__ f, Index n, const T* __restrict__ x,
                     const T* __restrict__ w, T* __restrict__ out, Index u) {
  using V = typename Vector<T>::type;
  constexpr Index lanes = Vector<T>::lanes, channels = Vector<T>::channels;
  Index c = 0;
  for (; c + channels <= u; c += channels) {
    V s0 = {}, s1 = {}, s2 = {}, s3 = {};
    for (Index k = 0; k < n; ++k) {
      if (f[k] == T(0)) continue;
      const T* xk = x + k * u + c;
      s0 += f[k] * load_vector(xk);
      s1 += f[k] * load_vector(xk + lanes);
      s2 += f[k] * load_vector(xk + 2 * lanes);
      s3 += f[k] * load_vector(xk + 3 * lanes);
    }
    const V sums[REGISTERS] = {s0, s1, s2, s3};
    for (Index r = 0; r < REGISTERS; ++r) {
      const V o = load_vector(out + c + r * lanes) + load_vector(w + c + r * lanes) * sums[r];
      std::memcpy(out + c + r * lanes, &o, VECTOR);
    }
  }
  for (; c < u; ++c) {
    T s = 0;
    for (Index k = 0; k < n; ++k) s += f[k] * x[k * u + c];
    out[c] += w[c] * s;
  }
}

template <typename T>
inline T dot(const T* __restrict__ x, const T* __restrict__ y, Index n) {
  using V = typename Vector<T>::type;
  constexpr Index lanes = Vector<T>::lanes;
  V s0 = {}, s1 = {};
  Index c = 0;
  for (; c + 2 * lanes <= n; c += 2 * lanes) {
    s0 += load_vector(x + c) * load_vector(y + c);
    s1 += load_vector(x + c + lanes) * load_vector(y + c + lanes);
  }
  s0 += s1;
  T total = 0;
  for (Index l = 0; l < lanes; ++l) total += s0[l];
  for (; c < n; ++c) total += x[c] * y[c];
  return total;
}

template <typename T>
void transpose_nodes(const T* nodes, std::vector<T>& out, Index n, Index dim, const Index* blocks,
                     Index n_blocks, Index u, int threads) {
  out.resize(n * dim);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index i = 0; i < n; ++i)
    to_components(nodes + i * dim, out.data() + i * dim, blocks, n_blocks, u);
}

// The form  Q = sum_e sum_p sum_u sum_ijk C_ijk x[s(e), u, i] y[e, j] w[e, p, u] g[r(e), u, k];
// each function gives the derivative of Q by the argument that it lacks.

// by g: the message, or by x: its transpose. `to` owns the result and `from` is read.
template <typename T, bool BY_G>
void conv_node(const T* nodes, const T* y, const T* w, const Index* from, const Index* to, T* out,
               Index n_nodes, Index n_edges, Index u, Index x_dim, Index y_dim, Index out_dim,
               const Path* paths, Index n_paths, const Entry* entries, const T* values,
               const Index* x_blocks, Index n_x_blocks, const Index* out_blocks,
               Index n_out_blocks, int threads) {
  const Index in_dim = (BY_G ? x_dim : out_dim) * u, res_dim = (BY_G ? out_dim : x_dim) * u;
  const Index* in_blocks = BY_G ? x_blocks : out_blocks;
  const Index n_in_blocks = BY_G ? n_x_blocks : n_out_blocks;
  const Index* res_blocks = BY_G ? out_blocks : x_blocks;
  const Index n_res_blocks = BY_G ? n_out_blocks : n_x_blocks;
  std::vector<T> packed;
  transpose_nodes(nodes, packed, n_nodes, in_dim, in_blocks, n_in_blocks, u, threads);
  const Groups groups(to, n_edges, n_nodes);
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> sum(res_dim);
    T a[MAX_MATRIX];
#pragma omp for schedule(dynamic, 4)
    for (Index n = 0; n < n_nodes; ++n) {
      std::memset(sum.data(), 0, sizeof(T) * res_dim);
      for (Index q = groups.ptr[n]; q < groups.ptr[n + 1]; ++q) {
        const Index e = groups.order[q];
        const T* in = packed.data() + from[e] * in_dim;
        for (Index ip = 0; ip < n_paths; ++ip) {
          const Path& p = paths[ip];
          // rows are components of the result, so that each is summed in registers
          path_matrix<T, BY_G>(p, entries, values, y + e * y_dim, a);
          const Index n_in = BY_G ? p.nx : p.nout, n_res = BY_G ? p.nout : p.nx;
          const T* we = w + (e * n_paths + ip) * u;
          const T* rows = in + (BY_G ? p.x : p.out) * u;
          T* res = sum.data() + (BY_G ? p.out : p.x) * u;
          for (Index r = 0; r < n_res; ++r) add_rows(a + r * n_in, n_in, rows, we, res + r * u, u);
        }
      }
      from_components(sum.data(), out + n * res_dim, res_blocks, n_res_blocks, u);
    }
  }
}

// by w and by y, where asked for (a null pointer: not)
template <typename T>
void conv_edge(const T* x, const T* y, const T* w, const T* g, const Index* senders,
               const Index* receivers, T* out_w, T* out_y, Index n_nodes, Index n_edges, Index u,
               Index x_dim, Index y_dim, Index out_dim, const Path* paths, Index n_paths,
               const Entry* entries, const T* values, const Index* x_blocks, Index n_x_blocks,
               const Index* out_blocks, Index n_out_blocks, int threads) {
  std::vector<T> xs, gs;
  transpose_nodes(x, xs, n_nodes, x_dim * u, x_blocks, n_x_blocks, u, threads);
  transpose_nodes(g, gs, n_nodes, out_dim * u, out_blocks, n_out_blocks, u, threads);
#pragma omp parallel num_threads(threads)
  {
    T a[MAX_MATRIX], b[MAX_MATRIX];
    std::vector<T> wx(u);
#pragma omp for schedule(static)
    for (Index e = 0; e < n_edges; ++e) {
      const T* xe = xs.data() + senders[e] * x_dim * u;
      const T* ge = gs.data() + receivers[e] * out_dim * u;
      T* oy = out_y ? out_y + e * y_dim : nullptr;
      if (oy) std::memset(oy, 0, sizeof(T) * y_dim);
      for (Index ip = 0; ip < n_paths; ++ip) {
        const Path& p = paths[ip];
        if (out_w) {
          path_matrix<T, false>(p, entries, values, y + e * y_dim, a);
          T* ow = out_w + (e * n_paths + ip) * u;
          std::memset(ow, 0, sizeof(T) * u);
          for (Index i = 0; i < p.nx; ++i)
            add_rows(a + i * p.nout, p.nout, ge + p.out * u, xe + (p.x + i) * u, ow, u);
        }
        if (oy) {
          const T* __restrict__ we = w + (e * n_paths + ip) * u;
          for (Index i = 0; i < p.nx; ++i) {
            const T* __restrict__ xi = xe + (p.x + i) * u;
            T* __restrict__ v = wx.data();
            for (Index c = 0; c < u; ++c) v[c] = we[c] * xi[c];
            for (Index k = 0; k < p.nout; ++k)
              b[i * p.nout + k] = dot(v, ge + (p.out + k) * u, u);
          }
          for (Index t = p.first; t < p.last; ++t)
            oy[p.y + entries[t].j] += values[t] * b[entries[t].i * p.nout + entries[t].k];
        }
      }
    }
  }
}

// The polynomial of a symmetric contraction: for each atom b of element e and each channel c,
//   f[k] = sum_t [k(t) = k] P[e, t, c] x[i(t)] x[j(t)] x[l(t)],
// where x has a last component that is 1, so that terms of lower order are terms too.
struct Term {
  Index k, i, j, l;
};

constexpr Index BLOCK = 32;  // channels at a time
constexpr Index MAX_X = 129, MAX_K = 64;

template <typename T>
void load(const T* x, Index n, Index n_channels, Index from, Index count, T (*out)[BLOCK]) {
  for (Index i = 0; i < n; ++i) {
    for (Index c = 0; c < count; ++c) out[i][c] = x[(from + c) * n + i];
    for (Index c = count; c < BLOCK; ++c) out[i][c] = 0;
  }
  (void)n_channels;
}

template <typename T>
void store(T (*in)[BLOCK], T* x, Index n, Index from, Index count) {
  for (Index i = 0; i < n; ++i)
    for (Index c = 0; c < count; ++c) x[(from + c) * n + i] = in[i][c];
}

// mode 0: f from x.  mode 1: by x, from g.  mode 2: the derivative of mode 1 by x and g along a.
template <typename T, int MODE>
void contract(const T* x, const T* p, const Index* element, const T* g, const T* a, T* out_f,
              T* out_x, Index n_atoms, Index n_channels, Index n_x, Index n_k, const Term* terms,
              Index n_terms, int threads) {
  const Index n_blocks = (n_channels + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
  for (Index job = 0; job < n_atoms * n_blocks; ++job) {
    const Index b = job / n_blocks, from = (job % n_blocks) * BLOCK;
    const Index count = n_channels - from < BLOCK ? n_channels - from : BLOCK;
    alignas(64) T xs[MAX_X][BLOCK], as[MAX_X][BLOCK], dx[MAX_X][BLOCK];
    alignas(64) T gs[MAX_K][BLOCK], f[MAX_K][BLOCK];
    load(x + b * n_channels * n_x, n_x, n_channels, from, count, xs);
    for (Index c = 0; c < BLOCK; ++c) xs[n_x][c] = 1;
    if (MODE != 1) std::memset(f, 0, sizeof(f[0]) * n_k);
    if (MODE >= 1) {
      load(g + b * n_channels * n_k, n_k, n_channels, from, count, gs);
      std::memset(dx, 0, sizeof(dx[0]) * (n_x + 1));
    }
    if (MODE == 2) {
      load(a + b * n_channels * n_x, n_x, n_channels, from, count, as);
      std::memset(as[n_x], 0, sizeof(as[0]));
    }
    const T* pe = p + element[b] * n_terms * n_channels + from;
    for (Index t = 0; t < n_terms; ++t) {
      const Term& m = terms[t];
      alignas(64) T pt[BLOCK];
      if (count == BLOCK) {
        std::memcpy(pt, pe + t * n_channels, sizeof(pt));
      } else {
        for (Index c = 0; c < BLOCK; ++c) pt[c] = c < count ? pe[t * n_channels + c] : T(0);
      }
      const T *xi = xs[m.i], *xj = xs[m.j], *xl = xs[m.l];
      if (MODE == 0) {
        T* o = f[m.k];
        for (Index c = 0; c < BLOCK; ++c) o[c] += pt[c] * xi[c] * xj[c] * xl[c];
      }
      if (MODE == 1) {
        const T* gk = gs[m.k];
        T *di = dx[m.i], *dj = dx[m.j], *dl = dx[m.l];
        for (Index c = 0; c < BLOCK; ++c) pt[c] *= gk[c];
        for (Index c = 0; c < BLOCK; ++c) di[c] += pt[c] * xj[c] * xl[c];
        for (Index c = 0; c < BLOCK; ++c) dj[c] += pt[c] * xi[c] * xl[c];
        for (Index c = 0; c < BLOCK; ++c) dl[c] += pt[c] * xi[c] * xj[c];
      }
      if (MODE == 2) {
        const T *gk = gs[m.k], *ai = as[m.i], *aj = as[m.j], *al = as[m.l];
        T *o = f[m.k], *di = dx[m.i], *dj = dx[m.j], *dl = dx[m.l];
        alignas(64) T v[BLOCK], ij[BLOCK], il[BLOCK], jl[BLOCK];
        for (Index c = 0; c < BLOCK; ++c) {
          v[c] = pt[c] * gk[c];
          ij[c] = ai[c] * xj[c] + xi[c] * aj[c];
          il[c] = ai[c] * xl[c] + xi[c] * al[c];
          jl[c] = aj[c] * xl[c] + xj[c] * al[c];
          o[c] += pt[c] * (ij[c] * xl[c] + xi[c] * xj[c] * al[c]);
        }
        for (Index c = 0; c < BLOCK; ++c) di[c] += v[c] * jl[c];
        for (Index c = 0; c < BLOCK; ++c) dj[c] += v[c] * il[c];
        for (Index c = 0; c < BLOCK; ++c) dl[c] += v[c] * ij[c];
      }
    }
    if (MODE != 1) store(f, out_f + b * n_channels * n_k, n_k, from, count);
    if (MODE >= 1) store(dx, out_x + b * n_channels * n_x, n_x, from, count);
  }
}

// by P: sum over the atoms of each element. Without a: of mode 0; with a: of mode 1.
template <typename T>
void contract_weights(const T* x, const Index* element, const T* g, const T* a, T* out_p,
                      Index n_elements, Index n_atoms, Index n_channels, Index n_x, Index n_k,
                      const Term* terms, Index n_terms, int threads) {
  const Index n_blocks = (n_channels + BLOCK - 1) / BLOCK;
  std::memset(out_p, 0, sizeof(T) * n_elements * n_terms * n_channels);
  const Groups groups(element, n_atoms, n_elements);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (Index job = 0; job < n_elements * n_blocks; ++job) {
    const Index z = job / n_blocks, from = (job % n_blocks) * BLOCK;
    const Index count = n_channels - from < BLOCK ? n_channels - from : BLOCK;
    alignas(64) T xs[MAX_X][BLOCK], as[MAX_X][BLOCK], gs[MAX_K][BLOCK];
    T* pz = out_p + z * n_terms * n_channels + from;
    for (Index q = groups.ptr[z]; q < groups.ptr[z + 1]; ++q) {
      const Index b = groups.order[q];
      load(x + b * n_channels * n_x, n_x, n_channels, from, count, xs);
      load(g + b * n_channels * n_k, n_k, n_channels, from, count, gs);
      for (Index c = 0; c < BLOCK; ++c) xs[n_x][c] = 1;
      if (a) {
        load(a + b * n_channels * n_x, n_x, n_channels, from, count, as);
        std::memset(as[n_x], 0, sizeof(as[0]));
      }
      for (Index t = 0; t < n_terms; ++t) {
        const Term& m = terms[t];
        const T *gk = gs[m.k], *xi = xs[m.i], *xj = xs[m.j], *xl = xs[m.l];
        T* o = pz + t * n_channels;
        if (!a) {
          for (Index c = 0; c < count; ++c) o[c] += gk[c] * xi[c] * xj[c] * xl[c];
        } else {
          const T *ai = as[m.i], *aj = as[m.j], *al = as[m.l];
          for (Index c = 0; c < count; ++c)
            o[c] += gk[c] * (ai[c] * xj[c] * xl[c] + xi[c] * aj[c] * xl[c] +
                             xi[c] * xj[c] * al[c]);
        }
      }
    }
  }
}

}  // namespace

#define CONV_ARGS                                                                               \
  Index n_nodes, Index n_edges, Index u, Index x_dim, Index y_dim, Index out_dim,               \
      const Path *paths, Index n_paths, const Entry *entries, const T *values,                  \
      const Index *x_blocks, Index n_x_blocks, const Index *out_blocks, Index n_out_blocks,     \
      int threads
#define CONV_PASS                                                                               \
  n_nodes, n_edges, u, x_dim, y_dim, out_dim, paths, n_paths, entries, values, x_blocks,        \
      n_x_blocks, out_blocks, n_out_blocks, threads

#define EXPORT(SUFFIX, TYPE)                                                                    \
  extern "C" void conv_by_g_##SUFFIX(const TYPE* x, const TYPE* y, const TYPE* w,               \
                                     const Index* s, const Index* r, TYPE* out, CONV_ARGS) {    \
    conv_node<TYPE, true>(x, y, w, s, r, out, CONV_PASS);                                       \
  }                                                                                             \
  extern "C" void conv_by_x_##SUFFIX(const TYPE* g, const TYPE* y, const TYPE* w,               \
                                     const Index* s, const Index* r, TYPE* out, CONV_ARGS) {    \
    conv_node<TYPE, false>(g, y, w, r, s, out, CONV_PASS);                                      \
  }                                                                                             \
  extern "C" void conv_by_edge_##SUFFIX(const TYPE* x, const TYPE* y, const TYPE* w,            \
                                        const TYPE* g, const Index* s, const Index* r,          \
                                        TYPE* out_w, TYPE* out_y, CONV_ARGS) {                  \
    conv_edge<TYPE>(x, y, w, g, s, r, out_w, out_y, CONV_PASS);                                 \
  }                                                                                             \
  extern "C" void contract_##SUFFIX(Index mode, const TYPE* x, const TYPE* p, const Index* z,   \
                                    const TYPE* g, const TYPE* a, TYPE* out_f, TYPE* out_x,     \
                                    Index n, Index ch, Index n_x, Index n_k, const Term* terms, \
                                    Index n_terms, int threads) {                               \
    if (mode == 0)                                                                              \
      contract<TYPE, 0>(x, p, z, g, a, out_f, out_x, n, ch, n_x, n_k, terms, n_terms, threads); \
    if (mode == 1)                                                                              \
      contract<TYPE, 1>(x, p, z, g, a, out_f, out_x, n, ch, n_x, n_k, terms, n_terms, threads); \
    if (mode == 2)                                                                              \
      contract<TYPE, 2>(x, p, z, g, a, out_f, out_x, n, ch, n_x, n_k, terms, n_terms, threads); \
  }                                                                                             \
  extern "C" void contract_weights_##SUFFIX(const TYPE* x, const Index* z, const TYPE* g,       \
                                            const TYPE* a, TYPE* out_p, Index n_z, Index n,     \
                                            Index ch, Index n_x, Index n_k, const Term* terms,  \
                                            Index n_terms, int threads) {                       \
    contract_weights<TYPE>(x, z, g, a, out_p, n_z, n, ch, n_x, n_k, terms, n_terms, threads);   \
  }

#define T double
EXPORT(f64, double)
#undef T
#define T float
EXPORT(f32, float)
#undef T
