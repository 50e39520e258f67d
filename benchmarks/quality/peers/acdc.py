"""AC/DC: alternating compressed and decompressed training.

Peste et al., "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks",
NeurIPS 2021, arXiv 2106.12379.

    dense warm-up, compressed, dense, compressed, …, long dense, long compressed

:mod:`benchmarks.quality.peers.alternating` says what happens in a phase and between two.
"""

import numpy as np
import optax

from benchmarks.quality.peers.alternating import alternate
from benchmarks.quality.peers.base import Setting
from lats_optax.checks.numbers import check_fraction


def make(
    optimizer: optax.GradientTransformation,
    setting: Setting,
    *,
    warmup: float = 0.1,
    phase: float = 0.05,
    last_dense: float = 0.1,
    last_compressed: float = 0.15,
) -> optax.GradientTransformationExtraArgs:
    """AC/DC around an optimizer.

    The defaults are the schedule of the paper for 100 epochs of ImageNet: 10 epochs of warm-up,
    phases of 5 epochs, a last dense phase of 10 and a last compressed one of 15.

    Args:
      optimizer: any optax optimizer.
      setting: the run.
      warmup: the dense part of the run at its beginning.
      phase: the part of the run that a phase takes between the warm-up and the last dense one;
        stretched or shortened so that a whole, odd number of phases fits.
      last_dense: the part of the run that the last dense phase takes.
      last_compressed: the part of the run that the last compressed phase takes.
    """
    return alternate(
        optimizer,
        setting,
        boundaries(setting.steps, warmup, phase, last_dense, last_compressed),
    )


def boundaries(
    steps: int, warmup: float, phase: float, last_dense: float, last_compressed: float
) -> list[int]:
    """The steps at which compressed and dense phases begin, in turn.

    >>> boundaries(100, 0.1, 0.05, 0.1, 0.15)
    [10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 85]
    """
    parts = {"warmup": warmup, "phase": phase}
    parts |= {"last_dense": last_dense, "last_compressed": last_compressed}
    for name, part in parts.items():
        check_fraction(name, part)
    end = 1 - last_dense - last_compressed
    if end <= warmup:
        raise ValueError(f"warmup: {warmup!r} and the last phases leave nothing between them")
    # Compressed first and last, so their number is odd.
    phases = 2 * max(round(((end - warmup) / phase - 1) / 2), 0) + 1
    inner = np.linspace(warmup, end, phases + 1)
    return [round(x * steps) for x in (*inner, 1 - last_compressed)]
