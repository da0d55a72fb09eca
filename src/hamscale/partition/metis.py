"""Partition by METIS (Karypis and Kumar, SIAM J. Sci. Comput. 20, 359 (1998)) through pymetis."""

import numpy as np
import pymetis


def metis(degrees: np.ndarray, sources: np.ndarray, parts: int) -> np.ndarray:
    """Assign an owner to every atom, (A,): k-way partition of the graph, with atoms weighted by their degrees.

    sources (E,): atom j of every edge, the edges sorted by destination. Several images of a pair are as many edges for
    METIS.
    """
    if parts == 1 or len(degrees) < 2:
        return np.zeros(len(degrees), np.int64)
    starts = np.concatenate([[0], np.cumsum(degrees)])
    # an atom without edges still counts in the balance
    weights = np.maximum(degrees, 1)
    adjacency = pymetis.CSRAdjacency(adj_starts=starts, adjacent=sources)
    _, owner = pymetis.part_graph(parts, adjacency, vweights=weights, recursive=False)
    return np.asarray(owner, np.int64)
