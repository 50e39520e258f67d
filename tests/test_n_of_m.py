"""N:M sparsity against loops over single groups, and against all supports that a group can have."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lats_optax
from lats_optax import groups, prox, soft_threshold, sparsity, target_sparsity
from tests import matrix, versions

STEPS, RATE = 40, 0.05
SHAPES = {
    "dense/kernel": ((8, 6), 0),
    "conv/kernel": ((3, 2, 16, 5), 2),
    "attention/query/kernel": ((8, 3, 5), 0),
    "attention/out/kernel": ((3, 8, 5), 1),
    "stacked/query/kernel": ((2, 8, 3, 5), 1),
    "two/w": ((8, 1), 0),
}
"""Paths, with shapes and the axis of the inputs."""

PATTERNS = {(2, 4): 0.5, (1, 4): 0.75, (5, 8): 0.375, (1, 2): 0.5}
HARD = prox.prox_power(math.inf)
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids="{0[0]}:{0[1]}".format)


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, (shape, _) in SHAPES.items()}


def groups_of(w, axis, m):
    """Each group of a leaf, as indices into it: a loop."""
    others = [range(size) for at, size in enumerate(w.shape) if at != axis]
    for place in itertools.product(*others):
        for first in range(0, w.shape[axis], m):
            yield [(*place[:axis], i, *place[axis:]) for i in range(first, first + m)]


def by_loop(w, d, axis, n, m, hard=False):
    """The operator, one weight after the other."""
    z = np.array(w)
    for group in groups_of(w, axis, m):
        order = sorted(group, key=lambda at: -abs(float(w[at])))
        for at in order[n:]:
            size = abs(float(w[at]))
            left = (size if size > d else 0.0) if hard else max(size - d, 0.0)
            z[at] = math.copysign(left, w[at])
    return z


def trained(tx, params, steps=STEPS):
    goal = jax.tree.map(lambda w: jnp.cos(9 * w), params)

    def step(carry, _):
        params, state = carry
        slopes = jax.tree.map(lambda w, other: w - other, params, goal)
        updates, state = tx.update(slopes, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0])
    return run((params, tx.init(params)))


@each_pattern
@pytest.mark.parametrize(
    "shrinkage", matrix.fast([prox.prox_l1, HARD], [HARD]), ids=["soft", "hard"]
)
def test_values_are_those_of_a_loop(pattern, shrinkage):
    n, m = pattern
    for w, axis in zip(weights().values(), [axis for _, axis in SHAPES.values()]):
        if w.shape[axis] % m:
            continue
        operator = groups.n_of_m(n, m, axis=axis, shrinkage=shrinkage)
        expected = by_loop(w, 0.4, axis, n, m, hard=shrinkage is HARD)
        np.testing.assert_allclose(operator(w, 0.4), expected, atol=1e-6)


@each_pattern
def test_it_is_the_proximal_operator_of_the_sum_of_the_smallest(pattern):
    n, m = pattern
    rng = np.random.default_rng(1)
    for d in (0.0, 0.3, 1.0, 5.0):
        x = rng.normal(size=(m, 1))
        z = np.asarray(groups.n_of_m(n, m)(x, d), np.float64)

        def objective(z, x=x, d=d):
            return 0.5 * np.sum((z - x) ** 2) + d * np.sort(np.abs(z), axis=0)[: m - n].sum()

        # With the penalty on a given choice of weights it is soft thresholding of these.
        best = min(
            objective(np.where(np.isin(np.arange(m), chosen)[:, None], prox.prox_l1(x, d), x))
            for chosen in itertools.combinations(range(m), m - n)
        )
        assert objective(z) <= best + 1e-6
        nearby = z + rng.normal(size=(2000, m, 1)) * rng.choice([1e-3, 1e-1, 1.0], (2000, 1, 1))
        assert objective(z) <= min(map(objective, nearby)) + 1e-6


def test_a_magnitude_is_the_least_threshold_that_prunes():
    operator, w = groups.n_of_m(2, 4), weights()["dense/kernel"]
    magnitudes = np.asarray(operator.magnitude(w))
    assert np.isinf(magnitudes).mean() == 0.5
    for at in np.argwhere(np.isfinite(magnitudes)):
        d = magnitudes[tuple(at)]
        assert operator(w, d)[tuple(at)] == 0 != operator(w, 0.999 * d)[tuple(at)]
    assert np.all(np.asarray(operator(w, 1e30))[np.isinf(magnitudes)] != 0)


@pytest.mark.parametrize("shrinkage", [prox.prox_l1, HARD], ids=["soft", "hard"])
def test_a_preimage_gives_the_weights_back(shrinkage):
    operator, d = groups.n_of_m(2, 4, shrinkage=shrinkage), 0.3
    w = operator(weights()["dense/kernel"], d)
    np.testing.assert_allclose(operator(operator.preimage(w, d), d), w, atol=1e-6)
    # No group has two weights so much above the others that these can be a threshold larger.
    dense = jnp.ones((8, 6)) * jnp.linspace(1.0, 1.1, 8)[:, None]
    kept = np.isinf(operator.magnitude(dense))
    again = operator(operator.preimage(dense, d), d)
    np.testing.assert_array_equal(np.asarray(again)[kept], np.asarray(dense)[kept])


def test_of_those_that_tie_the_first_are_left():
    operator = groups.n_of_m(2, 4)
    assert np.asarray(operator(jnp.ones((4, 1)), 2.0))[:, 0].tolist() == [1, 1, 0, 0]
    report = sparsity({"kernel": operator(jnp.ones((16, 3)), 2.0)}, groups=operator)
    assert (report.groups, report.zero_groups) == (12, 12)


@pytest.mark.slow
def test_narrow_types_are_compared_as_they_are():
    for dtype in (jnp.bfloat16, jnp.float16):
        w = jnp.asarray(weights()["dense/kernel"], dtype)
        z = groups.n_of_m(2, 4)(w, 0.4)
        assert z.dtype == dtype
        expected = by_loop(np.asarray(w, np.float64), 0.4, 0, 2, 4)
        np.testing.assert_allclose(z.astype(jnp.float32), expected, rtol=0.01)


@functools.cache
def outcome(name):
    """A run to 2:4, and its operator."""
    shrinkage = HARD if name == "hard" else prox.prox_l1
    operator = groups.n_of_m(2, 4, shrinkage=shrinkage)
    law = {"curve": lats_optax.sparsity_curve(), "cubic": lats_optax.threshold_curve()}.get(name)
    target = operator.sparsity
    if name == "each layer":
        target = lats_optax.uniform(target)
    options = {
        "last step": {"reach": 1.0},
        "each step": {"update_every": 1},
    }.get(name, {})
    threshold = target_sparsity(target, RATE, STEPS, law=law, **options)
    frozen = 30 if name == "frozen" else None
    optimizer = optax.adamw(RATE) if name == "adamw" else optax.sgd(RATE, momentum=0.9)
    prune = soft_threshold(threshold, operator=operator, freeze_after=frozen)
    tx = optax.chain(optimizer, prune)
    if name == "inner":
        tx = soft_threshold(threshold, operator=operator, inner=optimizer)
    return operator, *trained(tx, weights() | {"bias": np.zeros(6, np.float32)})


RUNS = ["soft", "hard", "curve", "cubic", "each layer", "last step", "each step", "frozen"]


@pytest.mark.parametrize("name", matrix.fast([*RUNS, "adamw", "inner"], ["frozen"]))
def test_a_named_sparsity_ends_with_n_of_every_m(name):
    operator, params, state = outcome(name)
    for path, (_, axis) in SHAPES.items():
        w = np.asarray(params[path])
        alive = [sum(w[at] != 0 for at in group) for group in groups_of(w, axis, 4)]
        assert set(alive) == {2}, path
    exact = lats_optax.finalize(params, state, operator=operator)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a == 0, b == 0), exact, params)
    report = sparsity(params, groups=operator, opt_state=state)
    assert report.zero_groups == report.groups == report.size // 4
    assert "2:4 groups" in str(report).splitlines()[0]
    assert "target met" in str(report)


def test_survivors_are_the_latent_weights_themselves():
    _, params, state = outcome("soft")
    latent = versions.tree.get(state, "latent")
    for path in SHAPES:
        w, theta = np.asarray(params[path]), np.asarray(latent[path])
        np.testing.assert_allclose(w[w != 0], theta[w != 0], rtol=1e-5)


def test_a_threshold_that_rises_prunes_the_smallest_of_a_group_first():
    w, operator = weights()["dense/kernel"], groups.n_of_m(2, 4)
    before = np.asarray(operator(w, 0.0))
    np.testing.assert_array_equal(before, w)
    for d in np.linspace(0.0, 4.0, 40):
        after = np.asarray(operator(w, d))
        assert np.max(np.abs(after - before)) <= 4.0 / 39 + 1e-6  # continuous in the threshold
        assert np.all(after[before == 0] == 0)
        before = after
    assert np.all((before != 0).reshape(2, 4, 6).sum(axis=1) == 2)


def test_ista_with_it_moves_what_is_small():
    tx = optax.chain(optax.sgd(0.0), lats_optax.proximal_step(0.4, operator=groups.n_of_m(2, 4)))
    params = weights()
    updates, _ = tx.update(jax.tree.map(np.zeros_like, params), tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    for path, (_, axis) in SHAPES.items():
        np.testing.assert_allclose(moved[path], by_loop(params[path], 0.4, axis, 2, 4), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "most"), [(jnp.float32, 0.57), (jnp.bfloat16, 0.62)])
def test_a_file_has_the_places_in_two_bits_a_survivor(tmp_path, dtype, most):
    kernel = jax.random.normal(jax.random.key(0), (512, 256))
    kernel = groups.n_of_m(2, 4, shrinkage=HARD)(kernel, 10.0).astype(dtype)
    path = tmp_path / "kernel.safetensors"
    lats_optax.save_sparse(path, {"kernel": kernel})
    assert path.stat().st_size <= most * kernel.nbytes
    np.testing.assert_array_equal(lats_optax.load_sparse(path)["kernel"], kernel)


def test_half_of_the_macs_are_left():
    kernel = groups.n_of_m(2, 4, shrinkage=HARD)(weights()["dense/kernel"], 10.0)
    report = lats_optax.count_macs(
        lambda p, x: x @ p["kernel"], {"kernel": kernel}, jnp.ones((3, 8))
    )
    assert (report.dense, report.effective) == (3 * 8 * 6, 3 * 8 * 6 / 2)


def start(params, target=0.5, **options):
    threshold = target_sparsity(target, RATE, STEPS)
    return lambda: soft_threshold(threshold, operator=groups.n_of_m(2, 4, **options)).init(params)


SIX = {"odd": {"kernel": jnp.ones((6, 4))}, "even": {"kernel": jnp.ones((8, 4))}}
ERRORS = {
    "all of m": (lambda: groups.n_of_m(4, 4), r"^n: 4 is not allowed; .* from 1 to m - 1"),
    "none": (lambda: groups.n_of_m(0, 4), r"^n: 0 is not allowed"),
    "half of one": (lambda: groups.n_of_m(1, 2.5), r"^m: 2\.5 is not allowed"),
    "a word": (lambda: groups.n_of_m(2, "4"), r"^m: '4' is not allowed"),
    "an axis": (lambda: groups.n_of_m(2, 4, axis="in"), r"^axis: 'in' is not allowed"),
    "not divided": (
        start(SIX),
        r"does not fit odd/kernel of shape \(6, 4\): .* 6 is no multiple of 4\. Leave .*exclude=",
    ),
    "no such axis": (start(SIX, axis=-4), r"axis -4, which \(.*\) has not"),
    "too sparse": (
        start({"kernel": jnp.ones((8, 4))}, 0.6),
        r"^target: 0\.6 of kernel is not allowed under operator=.*; .* sparsities up to 0\.5",
    ),
    "one layer too sparse": (
        start(SIX["even"] | {"b": jnp.ones((4, 4))}, {"kernel": 0.5, "b": 0.75}),
        r"^target: 0\.75 of b is not allowed",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_not_allowed_is_said(case):
    act, says = ERRORS[case]
    with pytest.raises(ValueError, match=says):
        act()


def test_its_text_is_the_call_that_makes_it():
    assert repr(groups.n_of_m(2, 4)) == "lats_optax.groups.n_of_m(2, 4)"
    assert repr(groups.n_of_m(1, 8, axis=-1)) == "lats_optax.groups.n_of_m(1, 8, axis=-1)"
