"""One-shot magnitude pruning: train, prune once, fine-tune.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015,
arXiv 1506.02626; here in one round, with magnitudes compared over all layers, and within the steps
and the learning-rate schedule of one run.

    t < dense * steps: all weights train;   then w = top-k(w), and the survivors train on
"""

import optax

from benchmarks.quality.peers.alternating import alternate
from benchmarks.quality.peers.base import Setting
from lats_optax.checks.numbers import check_fraction


def make(
    optimizer: optax.GradientTransformation, setting: Setting, *, dense: float = 0.5
) -> optax.GradientTransformationExtraArgs:
    """One-shot magnitude pruning around an optimizer.

    Args:
      optimizer: any optax optimizer.
      setting: the run.
      dense: the part of the run after which the weights are pruned.
    """
    return alternate(optimizer, setting, [round(check_fraction("dense", dense) * setting.steps)])
