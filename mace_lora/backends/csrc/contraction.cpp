// The symmetric contraction of MACE and its derivatives.

namespace {

// The polynomial of a symmetric contraction: for each atom b of element e and each channel c,
//   f[k] = sum_t [k(t) = k] P[e, t, c] x[i(t)] x[j(t)] x[l(t)],
// where x has a last component that is 1, so that terms of lower order are terms too.
struct Term {
  Index k, i, j, l;
};

constexpr Index BLOCK = 32;  // channels at a time
constexpr Index MAX_X = 129, MAX_K = 64;

template <typename T>
void gather(const T* x, Index n, Index from, Index count, T (*out)[BLOCK]) {
  for (Index i = 0; i < n; ++i) {
    for (Index c = 0; c < count; ++c) out[i][c] = x[(from + c) * n + i];
    for (Index c = count; c < BLOCK; ++c) out[i][c] = 0;
  }
}

template <typename T>
void scatter(T (*in)[BLOCK], T* x, Index n, Index from, Index count) {
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
    gather(x + b * n_channels * n_x, n_x, from, count, xs);
    for (Index c = 0; c < BLOCK; ++c) xs[n_x][c] = 1;
    if (MODE != 1) std::memset(f, 0, sizeof(f[0]) * n_k);
    if (MODE >= 1) {
      gather(g + b * n_channels * n_k, n_k, from, count, gs);
      std::memset(dx, 0, sizeof(dx[0]) * (n_x + 1));
    }
    if (MODE == 2) {
      gather(a + b * n_channels * n_x, n_x, from, count, as);
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
    if (MODE != 1) scatter(f, out_f + b * n_channels * n_k, n_k, from, count);
    if (MODE >= 1) scatter(dx, out_x + b * n_channels * n_x, n_x, from, count);
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
      gather(x + b * n_channels * n_x, n_x, from, count, xs);
      gather(g + b * n_channels * n_k, n_k, from, count, gs);
      for (Index c = 0; c < BLOCK; ++c) xs[n_x][c] = 1;
      if (a) {
        gather(a + b * n_channels * n_x, n_x, from, count, as);
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

#define EXPORT(SUFFIX, T)                                                                       \
  extern "C" void contract_##SUFFIX(Index mode, const T* x, const T* p, const Index* z,   \
                                    const T* g, const T* a, T* out_f, T* out_x,     \
                                    Index n, Index ch, Index n_x, Index n_k, const Term* terms, \
                                    Index n_terms, int threads) {                               \
    if (mode == 0)                                                                              \
      contract<T, 0>(x, p, z, g, a, out_f, out_x, n, ch, n_x, n_k, terms, n_terms, threads); \
    if (mode == 1)                                                                              \
      contract<T, 1>(x, p, z, g, a, out_f, out_x, n, ch, n_x, n_k, terms, n_terms, threads); \
    if (mode == 2)                                                                              \
      contract<T, 2>(x, p, z, g, a, out_f, out_x, n, ch, n_x, n_k, terms, n_terms, threads); \
  }                                                                                             \
  extern "C" void contract_weights_##SUFFIX(const T* x, const Index* z, const T* g,       \
                                            const T* a, T* out_p, Index n_z, Index n,     \
                                            Index ch, Index n_x, Index n_k, const Term* terms,  \
                                            Index n_terms, int threads) {                       \
    contract_weights<T>(x, z, g, a, out_p, n_z, n, ch, n_x, n_k, terms, n_terms, threads);   \
  }
EXPORT(f64, double)
EXPORT(f32, float)
#undef EXPORT
