// The convolution of MACE and its derivatives. It is a multilinear form whose coefficients
// (Clebsch-Gordan) are mostly zero:
//
//   Q = sum_e sum_p sum_u sum_ijk C_ijk x[s(e), u, i] y[e, j] w[row(e), p, u] g[r(e), u, k],
//
// and each function gives the derivative of Q by the argument that it lacks. Of each edge and path
// a matrix a[i, k] = sum_j C_ijk y[j] is made once, for all channels; these are the vector
// direction. Results are summed in registers over some edges of an atom at a time, whose weights
// are read one after the other as they lie in memory: there are more of them than of all else.
//
// Either each edge has a row of weights, or edges i -> j and j -> i, which are as long, have one:
// the second half of the edges those of the first.

namespace {

// One path: irrep block of x times irrep block of y gives a block of the message.
// Offsets are components (not channels); coefficients are (i, j, k, value) from `first` to `last`.
struct Path {
  Index x, nx, y, ny, out, nout, first, last;
};

// A Clebsch-Gordan coefficient: x component i, y component j, message component k
struct Entry {
  Index i, j, k;
};

// Features of atoms, x or g: components in all, and (first component, components) of each irrep
struct Side {
  Index dim;
  const Index* blocks;
  Index n_blocks;
};

// What is the same for all derivatives
template <typename T>
struct Form {
  Index n_nodes, n_edges, n_rows, u, y_dim;
  Side x, g;
  const Index *senders, *receivers;
  const Path* paths;
  Index n_paths;
  const Entry* entries;
  const T* values;
  int threads;
  Index row(Index edge) const { return edge < n_rows ? edge : edge - n_rows; }
  // components of the largest matrix of a path
  Index largest() const {
    Index size = 0;
    for (Index i = 0; i < n_paths; ++i) size = std::max(size, paths[i].nx * paths[i].nout);
    return size;
  }
};

// (channels, components of one irrep) blocks of e3nn -> component-major (components, channels)
template <typename T>
void to_components(const T* row, T* out, const Side& side, Index u) {
  for (Index b = 0; b < side.n_blocks; ++b) {
    const Index start = side.blocks[2 * b], d = side.blocks[2 * b + 1];
    const T* in = row + start * u;
    for (Index k = 0; k < d; ++k) {
      T* o = out + (start + k) * u;
      for (Index c = 0; c < u; ++c) o[c] = in[c * d + k];
    }
  }
}

// and back
template <typename T>
void from_components(const T* in, T* row, const Side& side, Index u) {
  for (Index b = 0; b < side.n_blocks; ++b) {
    const Index start = side.blocks[2 * b], d = side.blocks[2 * b + 1];
    T* o = row + start * u;
    for (Index k = 0; k < d; ++k) {
      const T* i = in + (start + k) * u;
      for (Index c = 0; c < u; ++c) o[c * d + k] = i[c];
    }
  }
}

// of all atoms
template <typename T>
std::unique_ptr<T[]> components(const Form<T>& f, const Side& side, const T* nodes) {
  const Index size = side.dim * f.u;
  std::unique_ptr<T[]> out(new T[f.n_nodes * size]);
#pragma omp parallel for num_threads(f.threads) schedule(static)
  for (Index i = 0; i < f.n_nodes; ++i)
    to_components(nodes + i * size, out.get() + i * size, side, f.u);
  return out;
}

// a[i][k], or a[k][i]: what one path does to x, for one edge
template <typename T, bool BY_K>
void path_matrix(const Path& p, const Entry* entries, const T* values, const T* y, T* a) {
  std::memset(a, 0, sizeof(T) * p.nx * p.nout);
  for (Index t = p.first; t < p.last; ++t) {
    const Entry& m = entries[t];
    a[BY_K ? m.k * p.nx + m.i : m.i * p.nout + m.k] += values[t] * y[p.y + m.j];
  }
}

constexpr Index TOGETHER = 16;  // edges of an atom that are summed in registers
constexpr Index AHEAD = 512;    // how far weights, paths x channels, are fetched in advance

// What a sum over edges reads of each: rows of channels, weights or other rows, a matrix
template <typename T>
struct Edge {
  const T *in, *w, *a;
};

// A function of R rows and N vectors of channels, for all channels
template <typename T, template <typename, typename, int, int> class Part, int R, typename... Args>
void for_channels(Index u, const Args&... args) {
  constexpr Index lanes = VECTOR / sizeof(T);
  Index c = 0;
  for (; c + 2 * lanes <= u; c += 2 * lanes) Part<T, Wide<T>, 2, R>::run(u, c, args...);
  for (; c + lanes <= u; c += lanes) Part<T, Wide<T>, 1, R>::run(u, c, args...);
  for (; c < u; ++c) Part<T, One<T>, 1, R>::run(u, c, args...);
}

// The same for some of `rows` rows, 1, 3, ... up to ROWS, as irreps have; returns how many
template <typename T, template <typename, typename, int, int> class Part, int R = ROWS,
          typename... Args>
Index for_rows(Index rows, Index u, const Args&... args) {
  if constexpr (R > 1) {
    if (rows < R) return for_rows<T, Part, R - 2>(rows, u, args...);
  }
  for_channels<T, Part, R>(u, args...);
  return R;
}

// out[r][c] += sum over edges: w[c] sum_i a[i][r] in[i][c]
template <typename T, typename V, int N, int R>
struct AddRows {
  static void run(Index u, Index c, const Edge<T>* edges, Index n_edges, Index n_in, Index n_out,
                  Index first, T* out) {
    constexpr Index lanes = sizeof(V) / sizeof(T);
    V s[R * N], w[N], x[N];
    each<R * N>([&](int m) { s[m] = load<V>(out + (first + m / N) * u + c + m % N * lanes); });
    for (Index e = 0; e < n_edges; ++e) {
      const T *in = edges[e].in + c, *a = edges[e].a + first;
      each<N>([&](int n) {
        w[n] = load<V>(edges[e].w + c + n * lanes);
        __builtin_prefetch(edges[e].w + c + n * lanes + AHEAD);
      });
      for (Index i = 0; i < n_in; ++i, in += u, a += n_out) {
        each<N>([&](int n) { x[n] = w[n] * load<V>(in + n * lanes); });
        each<R * N>([&](int m) { s[m] += a[m / N] * x[m % N]; });
      }
    }
    each<R * N>([&](int m) { store(s[m], out + (first + m / N) * u + c + m % N * lanes); });
  }
};

// out[c] = sum over edges and r: w[r][c] sum_k a[k][r] in[k][c]; it is added to that of the rows
// before the first
template <typename T, typename V, int N, int R>
struct AddProducts {
  static void run(Index u, Index c, const Edge<T>* edges, Index n_edges, Index n_in, Index n_out,
                  Index first, T* out) {
    constexpr Index lanes = sizeof(V) / sizeof(T);
    V total[N], s[R * N], x[N];
    each<N>([&](int n) { total[n] = first ? load<V>(out + c + n * lanes) : V{}; });
    for (Index e = 0; e < n_edges; ++e) {
      const T *in = edges[e].in + c, *a = edges[e].a + first, *w = edges[e].w + first * u + c;
      each<R * N>([&](int m) { s[m] = V{}; });
      for (Index k = 0; k < n_in; ++k, in += u, a += n_out) {
        each<N>([&](int n) { x[n] = load<V>(in + n * lanes); });
        each<R * N>([&](int m) { s[m] += a[m / N] * x[m % N]; });
      }
      each<R * N>([&](int m) { total[m % N] += load<V>(w + m / N * u + m % N * lanes) * s[m]; });
    }
    each<N>([&](int n) { store(total[n], out + c + n * lanes); });
  }
};

// b[r] += sum_c w[c] x[c] g[r][c]
template <typename T, typename V, int R>
inline void dots_of(Index from, Index to, Index u, const T* w, const T* x, const T* g, T* b) {
  constexpr Index lanes = sizeof(V) / sizeof(T);
  V s[R];
  each<R>([&](int r) { s[r] = V{}; });
  for (Index c = from; c < to; c += lanes) {
    __builtin_prefetch(w + c + AHEAD);
    const V v = load<V>(w + c) * load<V>(x + c);
    each<R>([&](int r) { s[r] += v * load<V>(g + r * u + c); });
  }
  each<R>([&](int r) { b[r] += sum<T>(s[r]); });
}

template <typename T, int R = ROWS>
Index dots(Index rows, Index u, const T* w, const T* x, const T* g, T* b) {
  if constexpr (R > 1) {
    if (rows < R) return dots<T, R - 2>(rows, u, w, x, g, b);
  }
  const Index wide = u - u % (VECTOR / sizeof(T));
  dots_of<T, Wide<T>, R>(0, wide, u, w, x, g, b);
  dots_of<T, One<T>, R>(wide, u, u, w, x, g, b);
  return R;
}

// by g: the message, or by x: its transpose. `to` owns the result and `from` is read.
template <typename T, bool BY_G>
void by_node(const Form<T>& f, const T* nodes, const T* y, const T* w, T* out) {
  const Side &in = BY_G ? f.x : f.g, &result = BY_G ? f.g : f.x;
  const Index u = f.u, *from = BY_G ? f.senders : f.receivers,
              *to = BY_G ? f.receivers : f.senders;
  const auto packed = components(f, in, nodes);
  const Groups groups(to, f.n_edges, f.n_nodes);
#pragma omp parallel num_threads(f.threads)
  {
    std::vector<T> sums(result.dim * u), a(TOGETHER * f.largest());
    Edge<T> edges[TOGETHER];
#pragma omp for schedule(dynamic, 4)
    for (Index node = 0; node < f.n_nodes; ++node) {
      std::memset(sums.data(), 0, sizeof(T) * result.dim * u);
      for (Index q = groups.ptr[node]; q < groups.ptr[node + 1]; q += TOGETHER) {
        const Index n_edges = std::min(TOGETHER, groups.ptr[node + 1] - q);
        for (Index ip = 0; ip < f.n_paths; ++ip) {
          const Path& p = f.paths[ip];
          const Index n_in = BY_G ? p.nx : p.nout, n_out = BY_G ? p.nout : p.nx;
          for (Index t = 0; t < n_edges; ++t) {
            const Index e = groups.order[q + t];
            T* matrix = &a[t * n_in * n_out];
            path_matrix<T, !BY_G>(p, f.entries, f.values, y + e * f.y_dim, matrix);
            edges[t] = {&packed[(from[e] * in.dim + (BY_G ? p.x : p.out)) * u],
                        w + (f.row(e) * f.n_paths + ip) * u, matrix};
          }
          for (Index r = 0; r < n_out;)
            r += for_rows<T, AddRows>(n_out - r, u, edges, n_edges, n_in, n_out, r,
                                      &sums[(BY_G ? p.out : p.x) * u]);
        }
      }
      from_components(sums.data(), out + node * result.dim * u, result, u);
    }
  }
}

template <typename T>
void by_w(const Form<T>& f, const T* x, const T* y, const T* g, T* out) {
  const Index u = f.u;
  const auto xs = components(f, f.x, x), gs = components(f, f.g, g);
#pragma omp parallel num_threads(f.threads)
  {
    std::vector<T> a(2 * f.largest());
    Edge<T> edges[2];
#pragma omp for schedule(static)
    for (Index row = 0; row < f.n_rows; ++row) {
      for (Index ip = 0; ip < f.n_paths; ++ip) {
        const Path& p = f.paths[ip];
        Index n_edges = 0;
        for (Index e = row; e < f.n_edges; e += f.n_rows) {
          T* matrix = &a[n_edges * p.nx * p.nout];
          path_matrix<T, true>(p, f.entries, f.values, y + e * f.y_dim, matrix);
          edges[n_edges++] = {&gs[(f.receivers[e] * f.g.dim + p.out) * u],
                              &xs[(f.senders[e] * f.x.dim + p.x) * u], matrix};
        }
        for (Index r = 0; r < p.nx;)
          r += for_rows<T, AddProducts>(p.nx - r, u, edges, n_edges, p.nout, p.nx, r,
                                        out + (row * f.n_paths + ip) * u);
      }
    }
  }
}

template <typename T>
void by_y(const Form<T>& f, const T* x, const T* w, const T* g, T* out) {
  const Index u = f.u;
  const auto xs = components(f, f.x, x), gs = components(f, f.g, g);
#pragma omp parallel num_threads(f.threads)
  {
    std::vector<T> b(f.largest());
#pragma omp for schedule(static)
    for (Index e = 0; e < f.n_edges; ++e) {
      T* oy = out + e * f.y_dim;
      std::memset(oy, 0, sizeof(T) * f.y_dim);
      for (Index ip = 0; ip < f.n_paths; ++ip) {
        const Path& p = f.paths[ip];
        const T* xe = &xs[(f.senders[e] * f.x.dim + p.x) * u];
        const T* ge = &gs[(f.receivers[e] * f.g.dim + p.out) * u];
        const T* we = w + (f.row(e) * f.n_paths + ip) * u;
        std::memset(b.data(), 0, sizeof(T) * p.nx * p.nout);
        for (Index i = 0; i < p.nx; ++i)
          for (Index k = 0; k < p.nout;)
            k += dots(p.nout - k, u, we, xe + i * u, ge + k * u, &b[i * p.nout + k]);
        for (Index m = p.first; m < p.last; ++m)
          oy[p.y + f.entries[m].j] += f.values[m] * b[f.entries[m].i * p.nout + f.entries[m].k];
      }
    }
  }
}

}  // namespace

#define FORM(T)                                                                                 \
  const Index *senders, const Index *receivers, Index n_nodes, Index n_edges, Index n_rows,     \
      Index u, Index x_dim, Index y_dim, Index out_dim, const Path *paths, Index n_paths,       \
      const Entry *entries, const T *values, const Index *x_blocks, Index n_x_blocks,           \
      const Index *out_blocks, Index n_out_blocks, int threads
#define PASS                                                                                    \
  {n_nodes, n_edges, n_rows, u, y_dim, {x_dim, x_blocks, n_x_blocks},                           \
   {out_dim, out_blocks, n_out_blocks}, senders, receivers, paths, n_paths, entries, values,    \
   threads}

#define EXPORT(SUFFIX, T)                                                                       \
  extern "C" void conv_by_g_##SUFFIX(const T* x, const T* y, const T* w, T* out, FORM(T)) {     \
    by_node<T, true>(Form<T> PASS, x, y, w, out);                                               \
  }                                                                                             \
  extern "C" void conv_by_x_##SUFFIX(const T* y, const T* w, const T* g, T* out, FORM(T)) {     \
    by_node<T, false>(Form<T> PASS, g, y, w, out);                                              \
  }                                                                                             \
  extern "C" void conv_by_w_##SUFFIX(const T* x, const T* y, const T* g, T* out, FORM(T)) {     \
    by_w<T>(Form<T> PASS, x, y, g, out);                                                        \
  }                                                                                             \
  extern "C" void conv_by_y_##SUFFIX(const T* x, const T* w, const T* g, T* out, FORM(T)) {     \
    by_y<T>(Form<T> PASS, x, w, g, out);                                                        \
  }
EXPORT(f64, double)
EXPORT(f32, float)
#undef EXPORT
