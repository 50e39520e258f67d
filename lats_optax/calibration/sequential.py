"""Pruning block after block, each on what comes out of the pruned blocks before it.

Here belongs the loop over blocks; one block is what `batches.py` and `prune.py` do.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from lats_optax import masks
from lats_optax.calibration.batches import LARGEST, calibrate
from lats_optax.calibration.prune import Pruned, PruneReport, prune_with
from lats_optax.masks import MaskOrFunction

Block = Callable[[Any, Any], Any]


def sequential(
    blocks: Block | Sequence[Block],
    params: Sequence[Any],
    batches: Iterable[Any],
    sparsity: Any = None,
    *,
    stages: Sequence[MaskOrFunction] = (masks.prunable,),
    largest: int = LARGEST,
    **options: Any,
) -> Pruned:
    """Prune a chain of blocks in order, on the hidden states that the pruned ones before it give.

    Each block is calibrated and pruned; then the hidden states go through the pruned block. A block
    costs two forward passes, one more for each further stage.

    Args:
      blocks: functions ``(params_i, hidden) -> hidden``, one for each block, or one for all of
        them, which is then compiled once.
      params: a pytree for each block.
      batches: hidden states that go into the first block, pytrees; all are held in memory.
      sparsity: as for :func:`prune_with`.
      stages: masks; within a block, what each selects is calibrated and pruned in turn, so that
        later products see the earlier ones pruned. Default: the whole block at once.
      largest: as for :func:`calibrate`.
      **options: ``pattern``, ``method`` and ``budget`` of :func:`prune_with`.

    Returns:
      :class:`Pruned`: a list of the blocks' parameters, and one report, in which the number of the
      block stands before each path.

    Raises:
      ValueError: there are no blocks, or not as many functions as parameters; what ``calibrate``
        and ``prune_with`` refuse.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> block = lambda params, x: jnp.tanh(x @ params["kernel"])
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = [{"kernel": jax.random.normal(key, (8, 8))} for key in keys[:2]]
      >>> pruned, report = sequential(block, params, [jax.random.normal(keys[2], (32, 8))], 0.5)
      >>> [(layer.path, layer.zeros) for layer in report.layers]
      [('0/kernel', 32), ('1/kernel', 32)]
    """
    functions = [blocks] * len(params) if callable(blocks) else list(blocks)
    if not params or len(functions) != len(params):
        raise ValueError(
            f"blocks: {len(functions)} functions for {len(params)} blocks' parameters; allowed are "
            "as many of each, one or more"
        )
    hidden = list(batches)
    after, layers = [], []
    for number, (block, its) in enumerate(zip(functions, params)):
        for stage in stages:
            grams = calibrate(block, its, hidden, mask=stage, largest=largest)
            its, report = prune_with(grams, its, sparsity, **options)
            layers += [
                dataclasses.replace(layer, path=f"{number}/{layer.path}") for layer in report.layers
            ]
        after.append(its)
        if number + 1 < len(functions):
            through = jax.jit(block)
            hidden = [through(its, batch) for batch in hidden]
    return Pruned(after, PruneReport(tuple(layers)))
