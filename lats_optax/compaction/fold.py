"""Where constants go: into the bias, the mean or the kernel of what read a channel that is cut."""

import numpy as np

from lats_optax.compaction.graph import Arrays, Function, Linear
from lats_optax.compaction.plan import Plan


def fold(plan: Plan, arrays: Arrays) -> dict[str, np.ndarray]:
    """The arrays, of full size, with what the constants contributed that are cut."""
    folded = dict(arrays)

    def change(path: str, amount: np.ndarray) -> None:
        wide = np.asarray(folded[path], np.float64) + amount
        folded[path] = wide.astype(arrays[path].dtype)

    for node in plan.graph.nodes.values():
        if not (isinstance(node, Linear) or (isinstance(node, Function) and node.reindexable)):
            continue
        lost = plan.lost(node)
        if not lost.any():
            continue
        representative = plan.representative(node)
        if representative is not None and isinstance(node, Linear):
            value = plan.values[node.sources[0]][representative]
            kernel = np.asarray(arrays[f"params/{node.name}/kernel"], np.float64)
            amount = np.zeros_like(kernel)
            amount[..., representative, :] = np.tensordot(kernel, lost / value, axes=(-2, 0))
            change(f"params/{node.name}/kernel", amount)
            continue
        bias = plan.folding_bias(node)
        if bias is not None and not (isinstance(node, Linear) and node.padded):
            path, sign = bias
            if isinstance(node, Linear):
                shift = lost @ node.kernel(arrays).sum(axis=0)
            else:
                assert isinstance(node, Function)
                shift = np.append(lost, 0.0)[node.channel_index]
            change(path, sign * shift)
    return folded
