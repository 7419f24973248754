"""Edges i -> j and j -> i, which are as long: what depends on the distance is computed once."""

from __future__ import annotations

import torch
from torch import Tensor

from mace_lora.backends.kernels import call


def there_and_back(
    edge_index: Tensor, harmonics: Tensor, features: Tensor
) -> tuple[Tensor, Tensor] | None:
    """(pairs,) of edges, and as many that go back; None where an edge has none.

    Args:
        edge_index: (2, edges), sender and receiver.
        harmonics: (edges, components), spherical ones from l = 0 on, which tell the direction: in a
            crystal some edges may join the same atoms.
        features: (edges, ...), functions of the distance, the same for both of a pair.
    """
    n_edges, dim = harmonics.shape
    if dim < 4:
        return None
    senders, receivers = edge_index.contiguous()
    mate = torch.empty(n_edges, dtype=torch.int64)
    n_nodes = int(edge_index.max()) + 1 if n_edges else 0
    direction = harmonics.detach().contiguous().view(-1)[1:]
    features = features.detach().contiguous()
    sizes = (n_nodes, n_edges, dim, features.shape[1])
    call("pairs", features.dtype, senders, receivers, direction, features, mate, *sizes)
    if (mate < 0).any():
        return None
    first = (mate > torch.arange(n_edges)).nonzero().squeeze(1)
    return first, mate[first]
