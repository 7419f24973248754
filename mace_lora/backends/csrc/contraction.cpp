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

// Terms of one f[k] that begin alike, with x[i] x[j], from `first` to `last`: sorted terms do. What
// they have in common is computed once.
struct Run {
  Index k, i, j, first, last;
};

std::vector<Run> runs_of(const Term* terms, Index n_terms) {
  std::vector<Run> runs;
  for (Index t = 0; t < n_terms; ++t) {
    const Term& m = terms[t];
    const bool more = t && m.k == runs.back().k && m.i == runs.back().i && m.j == runs.back().j;
    if (!more) runs.push_back({m.k, m.i, m.j, t, t});
    runs.back().last = t + 1;
  }
  return runs;
}

// Two vectors of channels of a block
template <typename T>
struct Part {
  using V = Wide<T>;
  static constexpr Index lanes = VECTOR / sizeof(T), size = 2 * lanes;
  V v[2];
  static Part of(const T* x) { return {{load<V>(x), load<V>(x + lanes)}}; }
  void to(T* x) const { store(v[0], x), store(v[1], x + lanes); }
  void add_to(T* x) const { (of(x) + *this).to(x); }
  Part operator+(const Part& b) const { return {{v[0] + b.v[0], v[1] + b.v[1]}}; }
  Part operator*(const Part& b) const { return {{v[0] * b.v[0], v[1] * b.v[1]}}; }
};

// Of one atom, for BLOCK channels: x, g, what x is changed by (a), and sums of f and by x
template <typename T>
struct Rows {
  alignas(64) T x[MAX_X][BLOCK], a[MAX_X][BLOCK], by_x[MAX_X][BLOCK];
  alignas(64) T g[MAX_K][BLOCK], f[MAX_K][BLOCK];

  // x, g and a of atom b, `count` channels from `from`; g and a where they are given
  void read(const T* xs, const T* gs, const T* as, Index b, Index n_channels, Index n_x, Index n_k,
            Index from, Index count) {
    gather(xs + b * n_channels * n_x, n_x, from, count, x);
    std::fill(x[n_x], x[n_x] + BLOCK, T(1));
    if (gs) gather(gs + b * n_channels * n_k, n_k, from, count, g);
    if (!as) return;
    gather(as + b * n_channels * n_x, n_x, from, count, a);
    std::fill(a[n_x], a[n_x] + BLOCK, T(0));
  }
};

// mode 0: f from x.  mode 1: by x, from g.  mode 2: the derivative of mode 1 by x and g along a.
template <typename T, int MODE>
void add_run(Rows<T>& r, const Run& run, const Term* terms, const T* p, Index stride, Index c) {
  using P = Part<T>;
  const P xi = P::of(r.x[run.i] + c), xj = P::of(r.x[run.j] + c), xij = xi * xj;
  P g{}, ai{}, aj{}, aij{}, top{}, along_x{}, along_a{};
  if (MODE >= 1) g = P::of(r.g[run.k] + c);
  if (MODE == 1) top = g * xij;
  if (MODE == 2) {
    ai = P::of(r.a[run.i] + c), aj = P::of(r.a[run.j] + c);
    aij = ai * xj + xi * aj;
    top = g * aij;
  }
  for (Index t = run.first; t < run.last; ++t) {
    const Index l = terms[t].l;
    const P pt = P::of(p + t * stride + c);
    along_x = along_x + pt * P::of(r.x[l] + c);
    if (MODE == 2) along_a = along_a + pt * P::of(r.a[l] + c);
    if (MODE >= 1) (pt * top).add_to(r.by_x[l] + c);
  }
  if (MODE == 0) (xij * along_x).add_to(r.f[run.k] + c);
  if (MODE == 1) {
    (g * xj * along_x).add_to(r.by_x[run.i] + c);
    (g * xi * along_x).add_to(r.by_x[run.j] + c);
  }
  if (MODE == 2) {
    (aij * along_x + xij * along_a).add_to(r.f[run.k] + c);
    (g * (aj * along_x + xj * along_a)).add_to(r.by_x[run.i] + c);
    (g * (ai * along_x + xi * along_a)).add_to(r.by_x[run.j] + c);
  }
}

template <typename T, int MODE>
void contract(const T* x, const T* p, const Index* element, const T* g, const T* a, T* out_f,
              T* out_x, Index n_atoms, Index n_channels, Index n_x, Index n_k, const Term* terms,
              Index n_terms, int threads) {
  const Index n_blocks = (n_channels + BLOCK - 1) / BLOCK;
  const std::vector<Run> runs = runs_of(terms, n_terms);
#pragma omp parallel num_threads(threads)
  {
    Rows<T> r;
    std::vector<T> padded;  // coefficients of a block that isn't full
#pragma omp for schedule(dynamic, 4)
    for (Index job = 0; job < n_atoms * n_blocks; ++job) {
      const Index b = job / n_blocks, from = (job % n_blocks) * BLOCK;
      const Index count = std::min(n_channels - from, BLOCK);
      r.read(x, g, a, b, n_channels, n_x, n_k, from, count);
      if (MODE != 1) std::memset(r.f, 0, sizeof(r.f[0]) * n_k);
      if (MODE >= 1) std::memset(r.by_x, 0, sizeof(r.by_x[0]) * (n_x + 1));
      const T* pe = p + element[b] * n_terms * n_channels + from;
      Index stride = n_channels;
      if (count < BLOCK) {
        padded.assign(n_terms * BLOCK, 0);
        for (Index t = 0; t < n_terms; ++t)
          std::copy(pe + t * stride, pe + t * stride + count, padded.data() + t * BLOCK);
        pe = padded.data(), stride = BLOCK;
      }
      for (const Run& run : runs)
        for (Index c = 0; c < BLOCK; c += Part<T>::size)
          add_run<T, MODE>(r, run, terms, pe, stride, c);
      if (MODE != 1) scatter(r.f, out_f + b * n_channels * n_k, n_k, from, count);
      if (MODE >= 1) scatter(r.by_x, out_x + b * n_channels * n_x, n_x, from, count);
    }
  }
}

// by P: sum over the atoms of each element. Without a: of mode 0; with a: of mode 1.
template <typename T>
void contract_weights(const T* x, const Index* element, const T* g, const T* a, T* out_p,
                      Index n_elements, Index n_atoms, Index n_channels, Index n_x, Index n_k,
                      const Term* terms, Index n_terms, int threads) {
  using P = Part<T>;
  const Index n_blocks = (n_channels + BLOCK - 1) / BLOCK;
  const Groups groups(element, n_atoms, n_elements);
  const std::vector<Run> runs = runs_of(terms, n_terms);
#pragma omp parallel num_threads(threads)
  {
    Rows<T> r;
    std::vector<T> sums(n_terms * BLOCK);
#pragma omp for schedule(dynamic, 1)
    for (Index job = 0; job < n_elements * n_blocks; ++job) {
      const Index z = job / n_blocks, from = (job % n_blocks) * BLOCK;
      const Index count = std::min(n_channels - from, BLOCK);
      std::fill(sums.begin(), sums.end(), T(0));
      for (Index q = groups.ptr[z]; q < groups.ptr[z + 1]; ++q) {
        r.read(x, g, a, groups.order[q], n_channels, n_x, n_k, from, count);
        for (const Run& run : runs) {
          for (Index c = 0; c < BLOCK; c += P::size) {
            const P xi = P::of(r.x[run.i] + c), xj = P::of(r.x[run.j] + c);
            const P gk = P::of(r.g[run.k] + c), gx = gk * xi * xj;
            P ga{};
            if (a) ga = gk * (P::of(r.a[run.i] + c) * xj + xi * P::of(r.a[run.j] + c));
            for (Index t = run.first; t < run.last; ++t) {
              const T *xl = r.x[terms[t].l] + c, *al = r.a[terms[t].l] + c;
              const P found = a ? ga * P::of(xl) + gx * P::of(al) : gx * P::of(xl);
              found.add_to(sums.data() + t * BLOCK + c);
            }
          }
        }
      }
      for (Index t = 0; t < n_terms; ++t)
        std::copy(sums.data() + t * BLOCK, sums.data() + t * BLOCK + count,
                  out_p + (z * n_terms + t) * n_channels + from);
    }
  }
}

}  // namespace

#define EXPORT(SUFFIX, T)                                                                       \
  extern "C" void contract_##SUFFIX(Index mode, const T* x, const T* p, const Index* z,         \
                                    const T* g, const T* a, T* out_f, T* out_x,                 \
                                    Index n, Index ch, Index n_x, Index n_k, const Term* terms, \
                                    Index n_terms, int threads) {                               \
    if (mode == 0)                                                                              \
      contract<T, 0>(x, p, z, g, a, out_f, out_x, n, ch, n_x, n_k, terms, n_terms, threads);    \
    if (mode == 1)                                                                              \
      contract<T, 1>(x, p, z, g, a, out_f, out_x, n, ch, n_x, n_k, terms, n_terms, threads);    \
    if (mode == 2)                                                                              \
      contract<T, 2>(x, p, z, g, a, out_f, out_x, n, ch, n_x, n_k, terms, n_terms, threads);    \
  }                                                                                             \
  extern "C" void contract_weights_##SUFFIX(const T* x, const Index* z, const T* g,             \
                                            const T* a, T* out_p, Index n_z, Index n,           \
                                            Index ch, Index n_x, Index n_k, const Term* terms,  \
                                            Index n_terms, int threads) {                       \
    contract_weights<T>(x, z, g, a, out_p, n_z, n, ch, n_x, n_k, terms, n_terms, threads);      \
  }
EXPORT(f64, double)
EXPORT(f32, float)
#undef EXPORT
