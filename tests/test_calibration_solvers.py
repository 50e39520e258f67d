"""Solvers of one layer: each against its defining property, and a dense oracle in NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lats_optax.calibration import solvers
from lats_optax.calibration.budgets import Pattern, PerLayer, PerOutput, as_pattern
from lats_optax.calibration.solvers import metric
from lats_optax.calibration.solvers.lasso import largest_eigenvalue, minimize_l1
from lats_optax.calibration.solvers.lats import Lats
from tests import matrix

RANDOM = np.random.default_rng(0)


def problem(inputs, outputs, groups=1, blocks=1, decay=1.0, samples=4):
    """Weights, and Gram matrices whose eigenvalues fall as a power, with inputs of unlike size."""
    random = np.random.default_rng(0)
    size = inputs // blocks
    shape = (groups, blocks, samples * size, size)
    x = random.normal(size=shape) * np.arange(1, size + 1) ** (-decay / 2)
    turn, _ = np.linalg.qr(random.normal(size=(size, size)))
    x = (x @ turn) * np.exp(0.5 * random.normal(size=size))
    gram = np.einsum("gbsi,gbsj->gbij", x, x) / samples
    w = random.normal(size=(groups, inputs, outputs))
    return jnp.asarray(w, jnp.float32), jnp.asarray(gram, jnp.float32)


@functools.cache
def compiled(method, kind):
    return jax.jit(lambda w, gram, zeros: solvers.METHODS[method](w, gram, kind(zeros)))


def solve(method, w, gram, budget):
    """What a solver gives; it is compiled once for each kind of budget and shape."""
    kind = budget.always if isinstance(budget, Pattern) else type(budget)
    return compiled(method, kind)(w, gram, budget.zeros)


def relative(gram, w, w0):
    return float(metric.error(gram, w, w0) / metric.error(gram, w0, 0 * w0))


# --- budgets --------------------------------------------------------------------------------------

BUDGETS = {
    "layer": (PerLayer(100), lambda zero: zero.sum() == 100),
    "output": (PerOutput(7), lambda zero: (zero.sum(1) == 7).all()),
    "each output": (
        PerOutput(jnp.arange(8)[None] + jnp.zeros((2, 1), int)),
        lambda zero: (zero.sum(1) == np.arange(8)).all(),
    ),
    "2 of 4": (Pattern(2, 4), lambda zero: (zero.reshape(2, 3, 4, 8).sum(2) == 2).all()),
    "1 of 3": (Pattern(1, 3), lambda zero: (zero.reshape(2, 4, 3, 8).sum(2) == 2).all()),
    "all of 4": (Pattern(4, 4), lambda zero: not zero.any()),
    "none": (PerLayer(0), lambda zero: not zero.any()),
}


@pytest.mark.cover
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("case", matrix.fast(BUDGETS, ["each output", "2 of 4", "none"]))
def test_a_budget_keeps_the_largest_and_exactly_so_many(case, ties):
    budget, check = BUDGETS[case]
    scores = RANDOM.random((2, 12, 8)).astype(np.float32)
    if ties:
        scores = np.floor(3 * scores)
    keep = np.asarray(budget.keep(jnp.asarray(scores)))
    assert check(~keep)
    bound = np.broadcast_to(budget.bound(jnp.asarray(scores)), scores.shape)
    assert (scores[keep] >= bound[keep]).all()
    assert (scores[~keep] <= bound[~keep]).all()


@pytest.mark.parametrize("case", ["layer", "output", "each output", "2 of 4"])
def test_the_parts_of_a_budget_are_the_whole(case):
    budget, _ = BUDGETS[case]
    parts = np.asarray(budget.divided(np.array([5, 10, 12])))
    assert parts.shape[0] == 3
    assert (parts >= 0).all()
    if case != "2 of 4":
        np.testing.assert_array_equal(parts.sum(0), budget.zeros)


def test_patterns_are_pairs_or_objects_with_n_and_m():
    assert as_pattern([1, 4]) == as_pattern(Pattern(1, 4)) == Pattern(1, 4)


# --- all of them ----------------------------------------------------------------------------------

SHAPES = {
    "dense": {"inputs": 24, "outputs": 10},
    "two column blocks": {"inputs": 132, "outputs": 6},
    "groups and blocks": {"inputs": 24, "outputs": 4, "groups": 3, "blocks": 2},
}


@pytest.mark.cover("solvers")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "method", matrix.fast(solvers.METHODS, ["magnitude", "wanda", "sparsegpt"])
)
def test_the_budget_is_met_to_the_weight(method, shape):
    w, gram = problem(**SHAPES[shape])
    groups, inputs, outputs = w.shape
    for budget, check in (
        (PerLayer(w.size // 2 + 1), lambda zero: zero.sum() == w.size // 2 + 1),
        (PerOutput(inputs // 3), lambda zero: (zero.sum(1) == inputs // 3).all()),
        (
            Pattern(1, 4),
            lambda zero: (zero.reshape(groups, -1, 4, outputs).sum(2) == 3).all(),
        ),
    ):
        after = np.asarray(solve(method, w, gram, budget))
        assert after.dtype == np.float32
        assert check(after == 0), (method, budget)


@pytest.mark.cover("solvers")
@pytest.mark.parametrize("method", solvers.METHODS)
def test_nothing_to_prune_changes_nothing(method):
    w, gram = problem(24, 10)
    np.testing.assert_allclose(solve(method, w, gram, PerLayer(0)), w, rtol=1e-3, atol=1e-3)


@pytest.mark.cover("solvers")
@pytest.mark.parametrize("method", solvers.METHODS)
def test_gram_matrices_of_zeros_and_of_few_samples(method):
    """No tokens reached an expert, or fewer samples than inputs: finite, and the budget is met."""
    w, gram = problem(24, 5, groups=2, samples=1)
    x = RANDOM.normal(size=(7, 24)) * (np.arange(24) > 3)
    gram = gram.at[0].set(0.0).at[1].set(x.T @ x)
    for budget in (PerOutput(12), PerLayer(120), Pattern(2, 4)):
        after = np.asarray(solve(method, w, gram, budget))
        assert np.isfinite(after).all()
        assert (after == 0).sum() >= 120


@pytest.mark.cover("solvers")
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "lats", "lasso"])
def test_inputs_without_correlation_need_no_compensation(method):
    """``G = diag(d)``: the best zeros are those of the smallest d w^2, and survivors stay."""
    w, _ = problem(16, 5)
    d = jnp.ones(16) if method == "magnitude" else jnp.asarray(RANDOM.random(16) + 0.5, jnp.float32)
    after = solve(method, w, jnp.diag(d)[None, None], PerOutput(6))
    # Damping shifts the diagonal by a hundredth of its mean.
    shift = 0.0 if method in ("magnitude", "wanda") else 0.01 * d.mean()
    score = np.asarray((d + shift)[:, None] * w**2)
    alive = score > np.sort(score, axis=1)[:, 5:6]
    np.testing.assert_allclose(after, np.where(alive, w, 0.0), rtol=1e-4, atol=1e-5)


# --- from their papers ----------------------------------------------------------------------------


def test_magnitude():
    w, gram = problem(24, 10)
    flat = np.sort(np.abs(np.asarray(w)).ravel())
    expected = np.where(np.abs(w) > flat[99], w, 0.0)
    np.testing.assert_array_equal(solve("magnitude", w, gram, PerLayer(100)), expected)


def test_wanda():
    """Rows of the paper are columns here: the smallest ``|W_ij| ||X_j||`` of each output."""
    w, _ = problem(24, 10)
    x = RANDOM.normal(size=(50, 24)).astype(np.float32) * np.arange(1, 25, dtype=np.float32)
    found = solve("wanda", w, jnp.asarray(x.T @ x)[None, None], PerOutput(12))
    for output in range(10):
        column = np.asarray(w[0, :, output])
        order = np.argsort(np.abs(column) * np.linalg.norm(x, axis=0))
        expected = column.copy()
        expected[order[:12]] = 0.0
        np.testing.assert_array_equal(found[0, :, output], expected)


def brain_surgeon(w, gram, pick):
    """Input after input, by the inverse of what is left of H, in float64: no Cholesky."""
    w = np.array(w, np.float64)
    h = np.asarray(gram, np.float64)
    h = h + 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    keep = np.ones(w.shape, bool)
    pivots = np.array([np.linalg.inv(h[j:, j:])[0, 0] for j in range(len(h))])
    for j in range(len(h)):
        if (rows := pick(j)) is not None:
            start, stop, select = rows
            keep[start:stop] = select(w[start:stop] ** 2 / pivots[start:stop, None])
        left = np.linalg.inv(h[j:, j:])
        error = np.where(keep[j], 0.0, w[j]) / left[0, 0]
        w[j:] -= left[:, :1] * error
        w[j] = np.where(keep[j], w[j], 0.0)
    return w


def above(scores, zeros):
    """All but the smallest of them together."""
    return scores > np.sort(scores, axis=None)[zeros - 1] if zeros else np.ones_like(scores, bool)


def above_in_each(scores, zeros):
    return scores > np.sort(scores, axis=0)[zeros - 1]


SURGERY = {
    "layer": (
        24,
        PerLayer(120),
        lambda j: (0, 24, lambda s: above(s, 120)) if j == 0 else None,
    ),
    "output": (
        24,
        PerOutput(12),
        lambda j: (0, 24, lambda s: above_in_each(s, 12)) if j == 0 else None,
    ),
    "two blocks of columns": (
        160,
        PerLayer(800),
        lambda j: {
            0: (0, 128, lambda s: above(s, 640)),
            128: (128, 160, lambda s: above(s, 160)),
        }.get(j),
    ),
    "2 of 4": (
        24,
        Pattern(2, 4),
        lambda j: (j, j + 4, lambda s: above_in_each(s, 2)) if j % 4 == 0 else None,
    ),
}


@pytest.mark.parametrize("case", matrix.fast(SURGERY, ["layer", "output", "2 of 4"]))
def test_sparsegpt_is_the_optimal_brain_surgeon(case):
    inputs, budget, pick = SURGERY[case]
    w, gram = problem(inputs, 10)
    expected = brain_surgeon(w[0], gram[0, 0], pick)
    found = np.asarray(solve("sparsegpt", w, gram, budget))[0]
    np.testing.assert_array_equal(found == 0, expected == 0)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_one_weight_by_the_closed_form():
    """``w - w_0 / [H^-1]_00 H^-1_0``: the first input's weight is the one that costs least."""
    w, gram = problem(12, 1)
    w = w.at[0, 0, 0].set(1e-3)
    h = np.asarray(metric.damped(gram)[0, 0], np.float64)
    inverse = np.linalg.inv(h)
    expected = np.asarray(w[0]) - w[0, 0] / inverse[0, 0] * inverse[:, :1]
    found = solve("sparsegpt", w, gram, PerLayer(1))[0]
    np.testing.assert_allclose(found, np.where(np.arange(12)[:, None] > 0, expected, 0), atol=1e-5)


# --- ours -----------------------------------------------------------------------------------------


def test_the_refit_is_least_squares_on_the_support():
    x = RANDOM.normal(size=(80, 24))
    w0, _ = problem(24, 6)
    alive = RANDOM.random((1, 24, 6)) < 0.5
    gram = jnp.asarray(x.T @ x, jnp.float32)[None, None]
    found = np.asarray(metric.refit(gram, w0, w0, jnp.asarray(alive), 60))[0]
    for output in range(6):
        chosen = alive[0, :, output]
        goal = x @ np.asarray(w0[0, :, output], np.float64)
        best = np.linalg.lstsq(x[:, chosen], goal, rcond=None)[0]
        np.testing.assert_allclose(found[chosen, output], best, rtol=1e-3, atol=1e-3)
        assert not found[~chosen, output].any()


@pytest.mark.slow
def test_the_refit_lowers_the_error_with_every_step():
    w0, gram = problem(24, 6, blocks=2)
    gram, _ = metric.unit(metric.damped(gram))
    alive = jnp.asarray(RANDOM.random((1, 24, 6)) < 0.5)
    run = jax.jit(lambda steps: metric.refit(gram, w0, w0, alive, steps))
    errors = [relative(gram, run(steps), w0) for steps in range(12)]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]


def objective(gram, w, w0, l1):
    return float(0.5 * metric.error(gram, w, w0) + l1 * jnp.sum(jnp.abs(w)))


@pytest.mark.parametrize("l1", matrix.fast([0.03, 0.3], [0.3]))
def test_fista_falls_and_meets_the_conditions_of_karush_kuhn_and_tucker(l1):
    w0, gram = problem(24, 6)
    gram, _ = metric.unit(metric.damped(gram))
    run = jax.jit(lambda steps: minimize_l1(gram, w0, l1, steps))
    path = [objective(gram, run(steps), w0, l1) for steps in range(15)]
    assert all(after <= before + 1e-5 for before, after in itertools.pairwise(path))
    w = run(1500)
    slope = np.asarray(metric.times(gram, w - w0))
    alive = np.asarray(w) != 0
    assert 0 < alive.mean() < 1
    np.testing.assert_allclose(slope[alive], -l1 * np.sign(np.asarray(w)[alive]), atol=2e-4)
    assert (np.abs(slope[~alive]) <= l1 + 2e-4).all()


@pytest.mark.slow
def test_the_largest_eigenvalue():
    _, gram = problem(24, 6, groups=3, blocks=2)
    expected = np.linalg.eigvalsh(np.asarray(gram, np.float64)).max((1, 2))
    found = np.asarray(largest_eigenvalue(gram, 200))[:, 0, 0]
    np.testing.assert_allclose(found, 1.05 * expected, rtol=1e-3)


@pytest.mark.slow
def test_survivors_meet_the_conditions_of_least_squares():
    w0, gram = problem(24, 8)
    w = Lats(refit=80)(w0, gram, PerLayer(96))
    slope = np.asarray(metric.times(metric.damped(gram), w - w0))
    assert np.abs(slope[np.asarray(w) != 0]).max() < 1e-3 * np.abs(slope).max()


@pytest.mark.slow
def test_against_every_support():
    """Six weights of ten in each of 20 outputs: all 210 supports, by brute force."""
    w0, gram = problem(10, 20, decay=1.5)
    h = np.asarray(gram[0, 0], np.float64)
    goal = np.asarray(w0[0], np.float64)
    least = np.full(20, np.inf)
    for support in itertools.combinations(range(10), 6):
        rows = list(support)
        fitted = np.zeros_like(goal)
        fitted[rows] = np.linalg.solve(h[np.ix_(rows, rows)], h[rows] @ goal)
        least = np.minimum(least, np.einsum("io,ij,jo->o", fitted - goal, h, fitted - goal))
    whole = np.einsum("io,ij,jo->", goal, h, goal)

    def share(method):
        return relative(gram, solve(method, w0, gram, PerOutput(4)), w0)

    best = least.sum() / whole
    assert best <= share("lats") < 1.15 * best
    assert share("lats") < share("sparsegpt") < share("wanda") < share("magnitude")


@pytest.mark.slow
@pytest.mark.parametrize("budget", [PerLayer(1536), PerOutput(48), Pattern(2, 4)], ids=repr)
@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_lats_has_the_least_error(budget, decay):
    w, gram = problem(96, 32, decay=decay)
    errors = {m: relative(gram, solve(m, w, gram, budget), w) for m in solvers.METHODS}
    assert min(errors, key=errors.get) == "lats", errors
    assert errors["lats"] < 0.9 * errors["sparsegpt"]


@pytest.mark.slow
def test_a_solver_is_a_pure_function_of_arrays():
    w, gram = problem(24, 10)
    once, again = solve("lats", w, gram, PerLayer(100)), solvers.lats(w, gram, PerLayer(100))
    np.testing.assert_allclose(once, again, rtol=1e-3, atol=1e-3)
