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
        if not (isinstance(node, Linear) or (isinstance(node, Function) and node.movable)):
            continue
        lost = plan.lost(node)
        if not lost.any():
            continue
        stand_in = plan.stand_in(node)
        if stand_in is not None and isinstance(node, Linear):
            value = plan.values[node.sources[0]][stand_in]
            kernel = np.asarray(arrays[f"params/{node.name}/kernel"], np.float64)
            amount = np.zeros_like(kernel)
            amount[..., stand_in, :] = np.tensordot(kernel, lost / value, axes=(-2, 0))
            change(f"params/{node.name}/kernel", amount)
            continue
        absorber = plan.absorber(node)
        if absorber is not None and not (isinstance(node, Linear) and node.padded):
            path, sign = absorber
            if isinstance(node, Linear):
                shift = lost @ node.kernel(arrays).sum(axis=0)
            else:
                assert isinstance(node, Function)
                shift = np.append(lost, 0.0)[node.places]
            change(path, sign * shift)
    return folded
