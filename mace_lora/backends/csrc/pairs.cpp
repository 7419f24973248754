// Which edges are i -> j and j -> i along the same line.

namespace {

template <typename T>
bool close(const T* x, const T* y, T sign, Index n) {
  for (Index i = 0; i < n; ++i)
    if (!(std::abs(x[i] - sign * y[i]) < T(1e-4))) return false;
  return true;
}

// mate[e]: the edge that goes back, or -1. Of several edges between the same atoms, through
// different faces of a crystal, it is the one with the opposite direction (`direction` has three
// components of each edge, in rows of `dim`) and equal features, which depend on the distance.
// Equal but for rounding: the other images of an atom are far away.
template <typename T>
void pairs(const Index* senders, const Index* receivers, const T* direction, const T* features,
           Index* mate, Index n_nodes, Index n_edges, Index dim, Index n_features) {
  const Groups groups(senders, n_edges, n_nodes);
  std::fill(mate, mate + n_edges, Index(-1));
  for (Index e = 0; e < n_edges; ++e) {
    if (mate[e] >= 0) continue;
    const T *d = direction + e * dim, *f = features + e * n_features;
    for (Index q = groups.ptr[receivers[e]]; q < groups.ptr[receivers[e] + 1]; ++q) {
      const Index b = groups.order[q];
      const T *back = direction + b * dim, *fb = features + b * n_features;
      if (receivers[b] != senders[e] || b == e || mate[b] >= 0) continue;
      if (!close(back, d, T(-1), 3) || !close(fb, f, T(1), n_features)) continue;
      mate[e] = b;
      mate[b] = e;
      break;
    }
  }
}

}  // namespace

#define EXPORT(SUFFIX, T)                                                                       \
  extern "C" void pairs_##SUFFIX(const Index* senders, const Index* receivers,                  \
                                 const T* direction, const T* features, Index* mate,            \
                                 Index n_nodes, Index n_edges, Index dim, Index n_features,     \
                                 int) {                                                         \
    pairs<T>(senders, receivers, direction, features, mate, n_nodes, n_edges, dim, n_features); \
  }
EXPORT(f64, double)
EXPORT(f32, float)
#undef EXPORT
