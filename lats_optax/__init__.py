"""Soft threshold pruning for optax: the public optimizer API (jax and optax alone)."""

from lats_optax import groups, prox
from lats_optax.analysis.macs import MacsReport, ParameterMacs, count_macs
from lats_optax.analysis.sparsity import LayerSparsity, SparsityReport, sparsity
from lats_optax.control.controllers import Controller
from lats_optax.control.laws import Law, constant_l1, sparsity_curve, threshold_curve
from lats_optax.control.schedules import ThresholdSchedule
from lats_optax.distributions import Distribution, erdos_renyi, per_layer, uniform
from lats_optax.files import load_sparse, read_metadata, save_sparse
from lats_optax.latent.pruned import PrunedUpdate, bounded
from lats_optax.masks import apply_support, prunable, select, support
from lats_optax.operators.protocol import Elementwise, GroupOperator, Operator
from lats_optax.pruning.finalize import finalize
from lats_optax.pruning.phases import freeze, prune_at_initialization
from lats_optax.target import TargetSparsity, TargetSparsityState, target_sparsity
from lats_optax.thresholds import (
    epoch_lats_threshold,
    l1_from_threshold,
    lats_threshold,
    pgh_threshold,
    s_lats_threshold,
    threshold_from_l1,
)
from lats_optax.transforms import (
    KeepSupportState,
    ProximalStepState,
    SoftThresholdState,
    keep_support,
    proximal_step,
    soft_threshold,
)

__version__ = "0.1.0"

__all__ = [
    "Controller",
    "Distribution",
    "Elementwise",
    "GroupOperator",
    "KeepSupportState",
    "Law",
    "LayerSparsity",
    "MacsReport",
    "Operator",
    "ParameterMacs",
    "ProximalStepState",
    "PrunedUpdate",
    "SoftThresholdState",
    "SparsityReport",
    "TargetSparsity",
    "TargetSparsityState",
    "ThresholdSchedule",
    "apply_support",
    "bounded",
    "constant_l1",
    "count_macs",
    "epoch_lats_threshold",
    "erdos_renyi",
    "finalize",
    "freeze",
    "groups",
    "keep_support",
    "l1_from_threshold",
    "lats_threshold",
    "load_sparse",
    "per_layer",
    "pgh_threshold",
    "prox",
    "proximal_step",
    "prunable",
    "prune_at_initialization",
    "read_metadata",
    "s_lats_threshold",
    "save_sparse",
    "select",
    "soft_threshold",
    "sparsity",
    "sparsity_curve",
    "support",
    "target_sparsity",
    "threshold_curve",
    "threshold_from_l1",
    "uniform",
]
