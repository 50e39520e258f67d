"""The config of pruning in a training run: `TrainConfig.prune`.

The command line is made from this class: the line under a field is its `--help` text.
"""

import dataclasses
from typing import Literal

from lats_optax.checks.options import check
from lats_optax.training.config_checks import check_float32


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """Soft threshold pruning; the run is dense while both of the first two fields are None."""

    target_sparsity: float | None = None
    """Fraction of the pruned weights that is zero at the end; the threshold follows from it."""
    final_threshold: float | None = None
    """Threshold at the end of training, instead of a sparsity."""
    schedule: Literal["lats", "s-lats", "epoch-lats", "pgh", "constant"] = "lats"
    """How the threshold rises to its end; `lats` is exact for the run's learning rate."""
    operator: Literal["annealed", "power", "soft", "hard"] | None = None
    """What the threshold does to the weights above it: `soft` shrinks all by as much, `hard` none,
    `power` is between them, `annealed` goes from soft to there, rescaled, during the run.
    None: soft with a final_threshold; with a target_sparsity annealed, and hard for
    output-channels, which a batch normalization behind them makes as large again as they were."""
    first_epoch: int = 0
    """Epochs before the threshold begins to rise: until then it is 0."""
    reach: float | None = None
    """Part of the steps, from first_epoch on, after which target_sparsity is reached, and held;
    None: a half, and all of them with operator soft, which is the published method."""
    beta: float | None = None
    """Base of the pgh schedule: the L1 penalty is proportional to beta**x, x from 0 to 1."""
    update_every: int | None = None
    """Steps between two selections of target_sparsity's quantile; None: the library's default."""
    include: tuple[str, ...] = ()
    """Regular expressions on parameter paths: what is pruned; none: all of 2 dimensions or more."""
    exclude: tuple[str, ...] = ()
    """Regular expressions on parameter paths: what stays dense."""
    weight_decay_on: Literal["latent", "weights"] = "latent"
    """Weights that weight decay acts on: the latent ones, as in the paper's code, or the pruned."""
    mode: Literal["during-training", "early", "at-initialization", "fine-tuning"] = (
        "during-training"
    )
    """When: to the end; early, then frozen; in a search before; or keep `init_from`'s zeros."""
    search_epochs: int | None = None
    """Epochs of the search: the first of the run if early, before its own if at-initialization."""
    distribution: Literal["global", "uniform", "er", "erk"] = "global"
    """Layers share target_sparsity freely, equally, or by Erdős–Rényi or Erdős–Rényi-kernel."""
    layer_sparsity: tuple[tuple[str, float], ...] = ()
    """With distribution uniform, EXPRESSION SPARSITY ...: layers with a target of their own."""
    granularity: Literal[
        "none", "output-channels", "input-channels", "filters", "blocks", "n-of-m"
    ] = "none"
    """What is zeroed as a whole, or in a pattern. Left out, unless `include` is given: with
    output-channels the classifier, with input-channels layers that have one, with filters all but
    convolutions, with n-of-m layers whose inputs M does not divide."""
    block: tuple[int, int] | None = None
    """With structure blocks, INPUTS OUTPUTS in a block of a layer's matrix, at each position."""
    pattern: tuple[int, int] | None = None
    """With structure n-of-m, N M: of M weights along the inputs N are left."""

    @property
    def enabled(self) -> bool:
        """Whether the run's weights have zeros that are meant to be there."""
        return self.has_threshold or self.mode == "fine-tuning"

    @property
    def chosen_operator(self) -> str:
        """`operator`, or what is best where it is None."""
        if self.operator is not None:
            return self.operator
        if self.target_sparsity is None:
            return "soft"
        if self.granularity == "n-of-m":  # what survives is not shrunk under any of them
            return "soft"
        # A shrunken channel has the same outputs behind a batch normalization, and gradients as
        # much larger as it is smaller.
        return "hard" if self.granularity == "output-channels" else "annealed"

    @property
    def horizon(self) -> float:
        """The part of the steps after which `target_sparsity` is reached."""
        if self.reach is not None:
            return self.reach
        return 1.0 if self.chosen_operator == "soft" and self.granularity != "n-of-m" else 0.5

    @property
    def has_threshold(self) -> bool:
        """Whether weights are pruned in the run."""
        return self.target_sparsity is not None or self.final_threshold is not None

    def __post_init__(self) -> None:
        target, final, beta, every = (
            self.target_sparsity,
            self.final_threshold,
            self.beta,
            self.update_every,
        )
        if target is not None and final is not None:
            raise ValueError(
                f"prune.target_sparsity is {target!r} and prune.final_threshold is {final!r}; "
                "allowed: one of the two, with the other None."
            )
        if target is not None:
            check(0 <= target < 1, "prune.target_sparsity", target, "0 <= target_sparsity < 1")
            rises = self.schedule != "constant"
            with_target = "with a target_sparsity, all but 'constant'"
            check(rises, "prune.schedule", self.schedule, with_target)
        if final is not None:
            check_float32("prune.final_threshold", final)
        if self.has_threshold and self.schedule == "pgh":
            check(beta is not None, "prune.beta", beta, "with schedule pgh, a number above 0")
            assert beta is not None
            check_float32("prune.beta", beta, positive=True)
        else:
            check(beta is None, "prune.beta", beta, "None, but for schedule pgh of a sparse run")
        if target is None:
            check(every is None, "prune.update_every", every, "None without a target_sparsity")
        else:
            check(every is None or every >= 1, "prune.update_every", every, "None, or 1 or more")
        if not self.enabled:
            dense = "none without prune.target_sparsity, prune.final_threshold or mode fine-tuning"
            check(not self.include, "prune.include", self.include, dense)
            check(not self.exclude, "prune.exclude", self.exclude, dense)
        if not self.has_threshold:
            check(self.operator is None, "prune.operator", self.operator, "None in a dense run")
            for field in ("schedule", "weight_decay_on", "first_epoch"):
                value, default = getattr(self, field), getattr(type(self), field)
                without = f"{default!r} without prune.target_sparsity or prune.final_threshold"
                check(value == default, f"prune.{field}", value, without)
        check(self.first_epoch >= 0, "prune.first_epoch", self.first_epoch, "0 or more")
        anneals = self.operator != "annealed" or target is not None
        check(anneals, "prune.operator", self.operator, "another one without target_sparsity")
        reach = self.reach
        if target is None:
            check(reach is None, "prune.reach", reach, "None without a target_sparsity")
        else:
            check(reach is None or 0 < reach <= 1, "prune.reach", reach, "0 < reach <= 1")
        self._check_search()
        self._check_layers()
        self._check_granularity()

    def _check_search(self) -> None:
        mode, epochs = self.mode, self.search_epochs
        if mode in ("during-training", "fine-tuning"):
            allowed = "None, but for the modes early and at-initialization"
            check(epochs is None, "prune.search_epochs", epochs, allowed)
            for field in ("target_sparsity", "final_threshold"):
                none = getattr(self, field) is None or mode != "fine-tuning"
                check(none, f"prune.{field}", getattr(self, field), f"None with mode {mode}")
            return
        allowed = (
            "during-training, or fine-tuning, without prune.target_sparsity or "
            "prune.final_threshold"
        )
        check(self.has_threshold, "prune.mode", mode, allowed)
        enough = epochs is not None and epochs >= 1
        check(enough, "prune.search_epochs", epochs, f"with mode {mode}, 1 or more")

    def _check_layers(self) -> None:
        if self.target_sparsity is None:
            allowed = "global without prune.target_sparsity"
            check(self.distribution == "global", "prune.distribution", self.distribution, allowed)
        layers = self.layer_sparsity
        if self.distribution != "uniform":
            check(not layers, "prune.layer_sparsity", layers, "none without distribution uniform")
        for expression, value in layers:
            named = f"prune.layer_sparsity {expression!r}"
            check(0 <= value < 1, named, value, "0 <= sparsity < 1")

    def _check_granularity(self) -> None:
        granularity, block = self.granularity, self.block
        if not self.has_threshold:
            allowed = "none without prune.target_sparsity or prune.final_threshold"
            check(granularity == "none", "prune.granularity", granularity, allowed)
        if granularity == "blocks":
            sides = block is not None and len(block) == 2 and min(block) >= 1
            check(sides, "prune.block", block, "with granularity blocks, two numbers of 1 or more")
        else:
            check(block is None, "prune.block", block, "None, but for granularity blocks")
        pattern = self.pattern
        if granularity != "n-of-m":
            check(pattern is None, "prune.pattern", pattern, "None, but for granularity n-of-m")
            return
        known = pattern is not None and len(pattern) == 2 and 1 <= pattern[0] < pattern[1]
        check(known, "prune.pattern", pattern, "with granularity n-of-m, N M with 1 <= N < M")
        assert pattern is not None
        most = 1 - pattern[0] / pattern[1]
        within = self.target_sparsity is None or self.target_sparsity <= most
        allowed = f"up to {most:g} with pattern {pattern[0]} {pattern[1]}"
        check(within, "prune.target_sparsity", self.target_sparsity, allowed)
        single = self.operator != "annealed"
        check(single, "prune.operator", self.operator, "another one with granularity n-of-m")
