"""Dependency groups: which channels of a graph are kept or cut together."""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lats_optax.compaction.graph import DepthwiseConv, Elementwise, Function, Graph, Norm


def dependency_groups(graph: Graph) -> tuple[dict[str, np.ndarray], int]:
    """The number of the group of each node's channels, and how many groups there are."""
    starts, total = {}, 0
    for name, node in graph.nodes.items():
        starts[name] = total
        total += node.channels
    ties = [np.zeros((2, 0), int)]
    for name, node in graph.nodes.items():
        own = np.arange(node.channels)
        for source in node.sources:
            if isinstance(node, Norm | DepthwiseConv | Elementwise):
                ties.append(np.stack([starts[name] + own, starts[source] + own]))
            elif isinstance(node, Function) and not node.reindexable:
                made = node.channel_index >= 0
                other = starts[source] + node.channel_index[made]
                ties.append(np.stack([starts[name] + own[made], other]))
    ends = np.concatenate(ties, axis=1)
    matrix = coo_array((np.ones(ends.shape[1]), tuple(ends)), shape=(total, total))
    count, labels = connected_components(matrix, directed=False)
    found = {
        name: labels[start : start + graph.nodes[name].channels] for name, start in starts.items()
    }
    return found, count
