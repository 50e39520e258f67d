"""The table of cases that every property of a transform is checked on, and its oracle.

Here belong the cases, the little problem that they run on, and the oracle: the algorithm of each
transform as loops over plain NumPy float64, from the formulas alone. Nothing here is a test.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lats_optax
from lats_optax import prox

RATE, MOMENTUM, DECAY = 0.125, 0.5, 0.25
STEPS, FINAL, TARGET = 6, 0.3, 0.7
# The law of LATS with its final threshold found on the way.
TO_THE_END: dict[str, Any] = {"law": lats_optax.constant_l1(), "reach": 1.0}

OPERATORS = {
    "l1": prox.prox_l1,
    "non_negative": prox.prox_non_negative_l1,
    "elastic_net": prox.ElasticNet(0.5),
    "group": prox.Axes(),
    "rows": prox.Axes(axes=-1),
    # Of which no side of a kernel is a multiple.
    "blocks": lats_optax.groups.blocks(4, 3),
    "l0": prox.prox_l0,
    "power": prox.prox_power(3),
    "annealed": prox.prox_annealed(STEPS),
    "rescaled": prox.Rescaled(prox.prox_annealed(STEPS)),
}


def cosine(count: Any) -> Any:
    """The learning rate of the threshold schedules; it ends above zero."""
    return RATE * (1 + jnp.cos(jnp.pi * count / (STEPS + 1))) / 2


@dataclass(frozen=True)
class Case:
    """One row: which transform, with which arguments, on parameters of which type."""

    kind: str = "soft_threshold"
    threshold: str = "float"
    operator: str = "l1"
    inner: bool = False
    dtype: Any = jnp.float32
    latent_dtype: Any = None
    freeze_after: int | None = None
    update_every: int = 1
    pruned_scale: float | None = None

    def __str__(self) -> str:
        """Name the arguments that are not the defaults."""
        parts = [self.kind, self.threshold]
        parts += [self.operator] * (self.operator != "l1") + ["inner"] * self.inner
        parts += [jnp.dtype(self.dtype).name] * (self.dtype != jnp.float32)
        parts += ["over_float32"] * (self.latent_dtype is not None)
        parts += ["freeze"] * (self.freeze_after is not None)
        parts += [f"every_{self.update_every}"] * (self.update_every != 1)
        parts += [f"scale_{self.pruned_scale}"] * (self.pruned_scale is not None)
        return "-".join(parts)

    @property
    def narrow(self) -> bool:
        """Whether parameters have sixteen bits, where the optimizer must not round either."""
        return jnp.dtype(self.dtype).itemsize == 2

    def optimizer(self) -> optax.GradientTransformation:
        """What the gradients pass through: with memory and decay unless that would round."""
        if self.narrow:
            return optax.sgd(RATE)
        return optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=MOMENTUM))

    @property
    def steps(self) -> int:
        """When the threshold is at its end: a target is reached where the support is frozen."""
        aimed = self.threshold in ("target", "layers")
        return self.freeze_after if aimed and self.freeze_after is not None else STEPS

    @property
    def final(self) -> float:
        """The last threshold; a proximal step applies its strength at every step again."""
        return 4 * FINAL * RATE if self.kind == "proximal_step" else FINAL

    def strength(self) -> Any:
        """The threshold or strength argument."""
        return {
            "float": self.final,
            "schedule": optax.linear_schedule(0.0, self.final, STEPS - 1),
            "lats": lats_optax.lats_threshold(cosine, STEPS, self.final),
            "target": lats_optax.target_sparsity(
                TARGET, cosine, self.steps, update_every=self.update_every, **TO_THE_END
            ),
            "layers": lats_optax.target_sparsity(
                lats_optax.per_layer({"kernel": TARGET, "": 0.5}), cosine, self.steps, **TO_THE_END
            ),
            "held": lats_optax.target_sparsity(
                TARGET, cosine, STEPS, law=lats_optax.threshold_curve(), update_every=2
            ),
            "curve": lats_optax.target_sparsity(
                TARGET, cosine, STEPS, law=lats_optax.sparsity_curve(), update_every=2
            ),
        }[self.threshold]

    def bare(self, inner: Any = None, params: Any = None) -> Any:
        """The transform alone; the support that is kept is that of the parameters."""
        if self.kind == "keep_support":
            return lats_optax.keep_support(
                lats_optax.support(self.start() if params is None else params)
            )
        operator = OPERATORS[self.operator]
        if self.kind == "proximal_step":
            return lats_optax.proximal_step(self.strength(), operator=operator)
        return lats_optax.soft_threshold(
            self.strength(),
            inner=inner,
            operator=operator,
            latent_dtype=self.latent_dtype,
            pruned_scale=self.pruned_scale,
            freeze_after=self.freeze_after,
        )

    def make(self, params: Any = None) -> optax.GradientTransformationExtraArgs:
        """The transform behind, or around, its optimizer."""
        if self.inner:
            return self.bare(self.optimizer())
        return optax.chain(self.optimizer(), self.bare(params=params))

    def own_state(self, state: Any) -> Any:
        """The state of the transform within that of :meth:`make`."""
        return state if self.inner else state[-1]

    def start(self) -> Any:
        """The parameters before the first step."""
        params = sparse_start() if self.kind == "keep_support" else dense_start()
        return jax.tree.map(lambda leaf: leaf.astype(self.dtype), params)


GROUPED = ("rows", "group", "blocks")
_BF16, _MIXED = dict(dtype=jnp.bfloat16), dict(dtype=jnp.bfloat16, latent_dtype=jnp.float32)
CASES = [
    *(Case(threshold=name) for name in ("float", "schedule", "lats", "target")),
    *(Case(threshold=name, inner=True) for name in ("float", "target")),
    # A bound goes by the weights, which in sixteen bits the oracle knows to two roundings.
    *(Case(threshold=name, pruned_scale=1.0, **_MIXED) for name in ("schedule", "target")),
    *(Case(threshold=name, pruned_scale=1.0, **_BF16) for name in ("float", "target")),
    *(Case(threshold="lats", operator=name) for name in ("non_negative", "elastic_net", "rows")),
    *(
        Case(threshold="target", operator=name)
        for name in ("non_negative", "group", "blocks", "l0")
    ),
    Case(threshold="lats", operator="group", **_BF16),
    Case(threshold="lats", operator="group", pruned_scale=1.0),
    Case(threshold="target", update_every=4),
    Case(threshold="held", operator="annealed"),
    Case(threshold="held", operator="rescaled"),
    Case(threshold="held", operator="power", pruned_scale=0.5),
    Case(threshold="held", freeze_after=4),
    Case(threshold="curve", operator="power", inner=True),
    Case(threshold="curve", operator="annealed", pruned_scale=0.0, **_MIXED),
    *(Case(threshold=name, freeze_after=3) for name in ("float", "target")),
    Case(threshold="lats", freeze_after=3, inner=True),
    Case(threshold="schedule", freeze_after=3, **_MIXED),
    Case(threshold="lats", freeze_after=3, operator="group"),
    *(Case("proximal_step", threshold=name) for name in ("float", "schedule")),
    Case("proximal_step", threshold="float", operator="rows"),
    Case("keep_support", threshold="none"),
]
# One of each kind, for the properties that need a compilation of their own.
FEW = [
    Case(threshold="schedule"),
    Case(threshold="target", inner=True),
    Case(threshold="target", update_every=4, **_MIXED),
    Case(threshold="lats", operator="group", freeze_after=3),
    Case(threshold="layers", freeze_after=4),
    Case(threshold="held", operator="annealed"),
    Case("proximal_step", threshold="float"),
    Case("keep_support", threshold="none"),
]


def dense_start() -> Any:
    """A kernel of a dense layer with its bias, and one of a convolution.

    Rows and columns differ in scale, so that whole groups come under the threshold.
    """
    rng = np.random.default_rng(0)

    def one(shape: tuple[int, ...]) -> jax.Array:
        scales = [np.linspace(0.2, 1.5, size) for size in shape] if len(shape) > 1 else []
        values = rng.normal(size=shape)
        for axis, scale in enumerate(scales):
            values *= np.expand_dims(scale, [i for i in range(len(shape)) if i != axis])
        return jnp.asarray(values, jnp.float32)

    return {"conv": {"kernel": one((2, 3, 4))}, "dense": {"bias": one((5,)), "kernel": one((6, 5))}}


def sparse_start() -> Any:
    """The same with the small weights of the kernels at zero."""
    return jax.tree.map(
        lambda leaf: jnp.where((leaf.ndim > 1) & (jnp.abs(leaf) < 0.6), 0.0, leaf), dense_start()
    )


def gradients(params: Any, step: Any) -> Any:
    """Gradients of 1/2 ||w - c_t||^2 for noisy c_t: they move zeros as well as survivors.

    The noise depends on a leaf's shape alone, so that trees of another structure get the same.
    """

    def one(leaf: jax.Array) -> jax.Array:
        noise = np.random.default_rng(leaf.shape).normal(size=(2 * STEPS, *leaf.shape))
        return leaf - jnp.asarray(noise, leaf.dtype)[step % (2 * STEPS)]

    return jax.tree.map(one, params)


@dataclass
class Run:
    """What a case did: parameters, states and gradients, step by step, and the compiled step."""

    step: Any
    params: list[Any]
    states: list[Any]
    gradients: list[Any]


@functools.cache
def run(case: Case, steps: int = STEPS) -> Run:
    """A case under jit, update and application in one program; compiled once for all tests."""
    tx = case.make()
    params = case.start()

    @jax.jit
    def step(params: Any, state: Any, count: Any) -> Any:
        slopes = gradients(params, count)
        updates, state = tx.update(slopes, state, params)
        return optax.apply_updates(params, updates), state, slopes

    record = Run(step, [params], [tx.init(params)], [])
    for count in range(steps):
        params, state, slopes = step(record.params[-1], record.states[-1], count)
        record.params.append(params)
        record.states.append(state)
        record.gradients.append(slopes)
    return record


# --- the oracle ---------------------------------------------------------------------------------


def oracle(case: Case, start: Any, slopes: list[Any]) -> list[tuple[Any, Any, float]]:
    """(w, theta, d) after each step, as dicts from path to float64 arrays, given the gradients."""
    w = flat(start)
    pruned = [name for name, leaf in w.items() if leaf.ndim > 1]
    support = {name: w[name] != 0 for name in pruned}
    earlier: dict[str, float] = {}
    d = threshold_of(case, 0, 0.0, [], earlier)
    kept_in = case.dtype if case.latent_dtype is None else case.latent_dtype
    theta = {name: _round(_lift(case.operator, w[name], d), kept_in) for name in pruned}
    trace = {name: np.zeros_like(leaf) for name, leaf in w.items()}
    after = []
    for t, slope in enumerate(map(flat, slopes)):
        w, theta = dict(w), dict(theta)
        frozen = case.freeze_after is not None and t >= case.freeze_after
        if frozen:
            theta = {name: shrink(case.operator, theta[name], d, t) for name in pruned}
        for name in w:
            seen = theta[name] if case.inner and name in pruned else w[name]
            decayed = slope[name] + (0 if case.narrow else DECAY * seen)
            trace[name] = decayed + (0 if case.narrow else MOMENTUM * trace[name])
            moved = -RATE * trace[name]
            if name not in pruned:
                w[name] = _round(w[name] + moved, case.dtype)
            elif case.kind == "keep_support":
                w[name] = np.where(support[name], w[name] + moved, 0.0)
            elif case.kind == "proximal_step":
                d = threshold_of(case, t, 0.0, [], earlier)
                w[name] = shrink(case.operator, w[name] + moved, d)
            else:
                moved = np.where(w[name] == 0, _pruned_scale(case, w[name], moved), 1.0) * moved
                moved = _round(theta[name] + moved, kept_in)
                theta[name] = np.where(frozen & (theta[name] == 0), 0.0, moved)
        if case.kind == "soft_threshold":
            sizes = np.concatenate([magnitude(case.operator, theta[n]).ravel() for n in pruned])
            d = 0.0 if frozen else threshold_of(case, t + 1, d, sizes, earlier)
            w.update({name: shrink(case.operator, theta[name], d, t + 1) for name in pruned})
        after.append((w, theta, d))
    return after


def _pruned_scale(case: Case, w: Any, moved: Any) -> Any:
    """The factor on the update of each weight that is pruned, output by output."""
    if case.pruned_scale is not None:
        return case.pruned_scale
    if case.operator in GROUPED:
        return 0.0
    scale = np.ones(w.shape)
    if case.threshold not in ("target", "layers", "held", "curve") or not w.any():
        return scale
    for output in range(w.shape[-1]):
        alive = math.sqrt(sum(v * v for v in w[..., output].ravel()))
        pruned = w[..., output] == 0
        length = math.sqrt(sum(v * v for v in moved[..., output][pruned]))
        if length > 0.1 * alive:
            scale[..., output] = 0.1 * alive / length
    return scale


def threshold_of(
    case: Case, t: int, before: float, magnitudes: Any, earlier: dict[str, float]
) -> float:
    """The threshold after t steps; what it needs of earlier ones is kept in a dict."""
    rates = [RATE * (1 + math.cos(math.pi * s / (STEPS + 1))) / 2 for s in range(STEPS)]
    if case.threshold == "float":
        return case.final
    if case.threshold == "schedule":
        return case.final * min(t / (STEPS - 1), 1.0)
    if case.threshold == "lats":
        return case.final * sum(rates[:t]) / sum(rates)
    if case.threshold in ("held", "curve"):
        return _held(case, t, magnitudes, earlier)
    rates = rates[: case.steps]
    if t == 0 or t > case.steps or case.threshold == "none":
        return before
    if (t - 1) % case.update_every == 0 or t == case.steps:
        quantile = sorted(magnitudes)[round(TARGET * len(magnitudes)) - 1]
        spent, left = sum(rates[1:t]), sum(rates[t:])
        rise, first, reach = 0.0, quantile, 0.0
        if t > 1:
            first = earlier["first"]
            between = spent - earlier["spent"]
            window = max(between, min(spent, left / 2))
            rise = earlier["rise"] * left / earlier["left"] * (1 - between / window)
            rise += left * (quantile - earlier["quantile"]) / window
            reach = left / spent
        # The quantile as last selected and its rise from there on, the learning rate spent since
        # the first step and left, the first quantile, and what is left over what is spent.
        earlier |= dict(
            quantile=quantile, rise=rise, spent=spent, left=left, first=first, reach=reach
        )
    quantile = earlier["quantile"]
    aim = quantile + min(earlier["rise"], earlier["reach"] * (quantile - earlier["first"]))
    return max(before + rates[t - 1] / sum(rates[t - 1 :]) * (aim - before), 0.0)


def _held(case: Case, t: int, magnitudes: Any, earlier: dict[str, float]) -> float:
    """A target that is reached after half the steps, and held: selections every second step."""
    reached = STEPS // 2
    if t == 0:
        return 0.0

    def quantile(fraction: float) -> float:
        return sorted(magnitudes)[round(fraction * TARGET * len(magnitudes)) - 1]

    d, q, first, slope = (earlier.get(name, 0.0) for name in ("d", "q", "first", "slope"))
    due = (t - 1) % 2 == 0 or t in (reached, STEPS, case.freeze_after)
    if case.threshold == "curve":
        d = quantile(1 - (1 - min(t / reached, 1.0)) ** 3) if due else d
        earlier["d"] = d
        return d
    # Increments of a cubic threshold over three steps: 19, 7 and 1 of 27.
    increments = [19 / 27, 7 / 27, 1 / 27]
    before, q = q, quantile(1.0) if due else q
    if t == 1:
        first = q
    if t <= reached:
        spent, left = sum(increments[1:t]), sum(increments[t:])
        if due and t > 1:
            # The selection before this one is the first: what is spent is spent since then.
            window = max(spent, min(spent, left / 2))
            slope += (q - before) / window - slope * spent / window
        mean = (q - first) / spent if spent else 0.0
        setpoint = q + left * min(slope, mean)
        rho = increments[t - 1] / sum(increments[t - 1 :])
        d = max(d + rho * (setpoint - d), 0.0)
    else:
        d = q
    earlier |= dict(d=d, q=q, first=first, slope=slope)
    return d


def shrink(operator: str, x: np.ndarray, d: float, t: int = 0) -> np.ndarray:
    """The operator after t steps, one weight or one group at a time."""
    if operator in GROUPS:
        out = np.zeros_like(x)
        for where in GROUPS[operator](x.shape):
            rms = _root_mean_square(x[where])
            out[where] = x[where] * (1 - d / rms) if rms > d else 0.0
        return out
    if operator == "rescaled":
        w = shrink("annealed", x, d, t)
        pairs = list(zip(x.ravel().tolist(), w.ravel().tolist()))
        squares = math.fsum(b * b for _, b in pairs)
        return w * min(math.fsum(a * b for a, b in pairs) / squares, 2.0) if squares else w
    one = {
        "l1": lambda v: math.copysign(max(abs(v) - d, 0.0), v),
        "non_negative": lambda v: max(v - d, 0.0),
        "elastic_net": lambda v: math.copysign(max(abs(v) - d, 0.0), v) / (1 + 0.5 * d),
        "l0": lambda v: v if abs(v) > math.sqrt(2 * d) else 0.0,
        "power": lambda v: _power(v, d, 3.0),
        "annealed": lambda v: _annealed(v, d, min(t / STEPS, 1.0)),
    }[operator]
    return np.array([one(float(v)) for v in x.ravel()]).reshape(x.shape)


def _power(v: float, d: float, p: float) -> float:
    return math.copysign((abs(v) ** p - d**p) ** (1 / p), v) if abs(v) > d else 0.0


def _annealed(v: float, d: float, x: float) -> float:
    size = math.sqrt((abs(v) - d) * (abs(v) - d + 2 * d * x)) if abs(v) > d else 0.0
    return math.copysign(size, v)


def _tiles(
    shape: tuple[int, ...], taps: bool, rows: int | None, columns: int | None
) -> list[tuple[slice, ...]]:
    """The index of every tile; None: all rows or columns; taps: all in one tile, or one each."""
    sides = [size if taps else 1 for size in shape[:-2]]
    sides = [max(side, 1) for side in (*sides, rows or shape[-2], columns or shape[-1])]
    starts = itertools.product(*(range(0, n, side) for n, side in zip(shape, sides)))
    return [tuple(slice(a, a + side) for a, side in zip(start, sides)) for start in starts]


def _of_each_layer(groups: str, shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """The groups of every layer of a stack along the first axis."""
    layers = [slice(layer, layer + 1) for layer in range(shape[0])]
    return [(layer, *where) for layer in layers for where in GROUPS[groups](shape[1:])]


# From the shape of a leaf to the indices of its groups.
GROUPS: dict[str, Callable[[tuple[int, ...]], list[tuple[slice, ...]]]] = {
    "group": lambda shape: _tiles(shape, True, None, 1),
    "rows": lambda shape: _tiles(shape, False, 1, None),
    "blocks": lambda shape: _tiles(shape, False, 4, 3),
    "output_channels": lambda shape: _tiles(shape, True, None, 1),
    "input_channels": lambda shape: _tiles(shape, True, 1, None),
    "filters": lambda shape: _tiles(shape, True, 1, 1),
    "stacked output_channels": lambda shape: _of_each_layer("output_channels", shape),
    "stacked input_channels": lambda shape: _of_each_layer("input_channels", shape),
    "stacked filters": lambda shape: _of_each_layer("filters", shape),
}


def _root_mean_square(group: np.ndarray) -> float:
    values = group.ravel().tolist()
    return math.sqrt(math.fsum(value * value for value in values) / len(values))


def magnitude(operator: str, x: np.ndarray) -> np.ndarray:
    """The least strength that sends a weight to zero, one weight or one group at a time."""
    if operator in GROUPS:
        out = np.zeros_like(x)
        for where in GROUPS[operator](x.shape):
            out[where] = _root_mean_square(x[where])
        return out
    return {"non_negative": np.maximum(x, 0), "l0": x**2 / 2}.get(operator, np.abs(x))


def _lift(operator: str, w: np.ndarray, d: float) -> np.ndarray:
    """An x with shrink(x, d) == w."""
    if operator in GROUPS:
        return w * (1 + d / magnitude(operator, w))
    return {
        "l1": w + d * np.sign(w),
        "non_negative": np.where(w > 0, w + d, w),
        "elastic_net": w * (1 + 0.5 * d) + d * np.sign(w),
        "l0": w,
        "power": np.sign(w) * (np.abs(w) ** 3 + d**3) ** (1 / 3),
        "annealed": w + d * np.sign(w),  # as at the first step
        "rescaled": w,  # its thresholds begin at zero
    }[operator]


def _round(x: np.ndarray, dtype: Any) -> np.ndarray:
    # float32 is left alone: the order in which its roundings happen is XLA's.
    return x.astype(dtype).astype(float) if jnp.dtype(dtype).itemsize == 2 else x


# --- looking at trees ---------------------------------------------------------------------------


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Path -> float64 array."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf, float) for path, leaf in leaves}


def kinds(tree: Any) -> Any:
    """What decides whether a program is compiled again: types, weak types and shapes."""
    return jax.tree.map(lambda leaf: (leaf.dtype, leaf.weak_type, leaf.shape), tree)


def assert_same(left: Any, right: Any) -> None:
    """Two trees are equal bit by bit, but for the sign of zeros, in types too."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_close(left: Any, right: Any, tolerance: float = 2e-6) -> None:
    """Two trees agree up to rounding, and exactly in where they are zero."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        assert a.dtype == b.dtype
        wide_a, wide_b = np.asarray(a, float), np.asarray(b, float)
        np.testing.assert_array_equal(wide_a == 0, wide_b == 0)
        np.testing.assert_allclose(wide_a, wide_b, rtol=tolerance, atol=tolerance)
