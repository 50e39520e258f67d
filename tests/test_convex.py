"""Convex problems on real data, solved to the solutions that scikit-learn's solvers give.

With a constant L1 coefficient both `proximal_step` (ISTA) and `soft_threshold` (dual averaging)
rest where the penalized loss is minimal. All is in float64 and starts from zero weights with the
step size 1 / L, L being the largest curvature of the loss. The coefficients agree to 1e-6 of each
(seen: 1e-7 under a decaying learning rate, else 1e-8 or better), and the zeros are the same. How
many steps that takes is a matter of the problem's condition number and is said with each problem.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import datasets, linear_model

import lats_optax
from lats_optax import prox
from lats_optax.compatibility import enable_x64

RELATIVE = 1e-6


class Problem(NamedTuple):
    """A smooth loss of {"w": (features, 1), "b": (1,)}; only the matrix w is penalized."""

    loss: Any
    curvature: float
    features: int


def run(tx, problem, steps):
    """The weights and the intercept after so many steps from zero."""
    with enable_x64(True):
        params = {"w": jnp.zeros((problem.features, 1)), "b": jnp.zeros(1)}

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(problem.loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        @jax.jit
        def train(params):
            return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]

        params = jax.device_get(train(params))
    return params["w"][:, 0], params["b"][0]


def methods(curvature, l1, steps):
    """Transforms whose fixed points minimize loss + l1 |w|."""
    rate = 1 / curvature
    decaying = optax.linear_schedule(rate, rate / 2, steps)
    momentum = 0.8
    return {
        "proximal step": lambda: optax.chain(optax.sgd(rate), lats_optax.proximal_step(rate * l1)),
        "proximal step, decaying rate": lambda: optax.chain(
            optax.sgd(decaying), lats_optax.proximal_step(lambda t: decaying(t) * l1)
        ),
        "soft threshold": lambda: optax.chain(
            optax.sgd(rate),
            lats_optax.soft_threshold(lats_optax.threshold_from_l1(l1, rate, steps)),
        ),
        "soft threshold, decaying rate": lambda: optax.chain(
            optax.sgd(decaying),
            lats_optax.soft_threshold(lats_optax.threshold_from_l1(l1, decaying, steps)),
        ),
        "LATS": lambda: optax.chain(
            optax.sgd(rate),
            lats_optax.soft_threshold(
                lats_optax.lats_threshold(rate, steps, final=rate * l1 * steps)
            ),
        ),
        # Momentum m lengthens every step 1 / (1 - m) times, and the penalty must keep up with it.
        "soft threshold, momentum": lambda: optax.chain(
            optax.sgd(rate, momentum=momentum),
            lats_optax.soft_threshold(
                lats_optax.threshold_from_l1(l1 / (1 - momentum), rate, steps)
            ),
        ),
    }


METHODS = tuple(methods(1.0, 1.0, 1))
ISTA_AND_DUAL_AVERAGING = ("proximal step", "soft threshold")


def assert_solved(w, solution):
    np.testing.assert_array_equal(w != 0, solution != 0)
    np.testing.assert_allclose(w, solution, rtol=RELATIVE)


# --- linear regression: diabetes, 442 rows, 10 features; condition number 470 -------------------

LINEAR_STEPS = 5_000


@functools.cache
def diabetes():
    x, y = datasets.load_diabetes(return_X_y=True)
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


def least_squares(l2=0.0):
    """1/2 mean (y - x w - b)^2 + l2/2 |w|^2."""
    x, y = diabetes()

    def loss(params):
        residuals = y - x @ params["w"][:, 0] - params["b"]
        return 0.5 * jnp.mean(residuals**2) + 0.5 * l2 * jnp.sum(params["w"] ** 2)

    return Problem(loss, np.linalg.eigvalsh(x.T @ x / len(y))[-1] + l2, x.shape[1])


@pytest.mark.cover
@pytest.mark.parametrize(
    ("alpha", "method"),
    [(0.03, method) for method in METHODS]
    + [(alpha, method) for alpha in (0.005, 0.1, 0.3) for method in ISTA_AND_DUAL_AVERAGING],
)
def test_lasso(alpha, method):
    solution = linear_model.Lasso(alpha=alpha, tol=1e-14, max_iter=10**5).fit(*diabetes()).coef_
    assert 0 < np.count_nonzero(solution) < 10
    problem = least_squares()
    tx = methods(problem.curvature, alpha, LINEAR_STEPS)[method]()
    assert_solved(run(tx, problem, LINEAR_STEPS)[0], solution)


def elastic_net(alpha, l1_ratio):
    model = linear_model.ElasticNet(alpha=alpha, l1_ratio=l1_ratio, tol=1e-14, max_iter=10**5)
    return model.fit(*diabetes()).coef_


@pytest.mark.cover
@pytest.mark.parametrize(("alpha", "l1_ratio"), [(0.05, 0.6), (0.5, 0.5)])
@pytest.mark.parametrize("method", ISTA_AND_DUAL_AVERAGING)
def test_elastic_net_with_the_quadratic_part_in_the_loss(alpha, l1_ratio, method):
    problem = least_squares(l2=alpha * (1 - l1_ratio))
    tx = methods(problem.curvature, alpha * l1_ratio, LINEAR_STEPS)[method]()
    assert_solved(run(tx, problem, LINEAR_STEPS)[0], elastic_net(alpha, l1_ratio))


@pytest.mark.parametrize(("alpha", "l1_ratio"), [(0.05, 0.6), (0.5, 0.5)])
def test_elastic_net_with_the_quadratic_part_in_the_operator(alpha, l1_ratio):
    problem = least_squares()
    operator = prox.ElasticNet((1 - l1_ratio) / l1_ratio)
    rate = 1 / problem.curvature
    step = lats_optax.proximal_step(rate * alpha * l1_ratio, operator=operator)
    w, _ = run(optax.chain(optax.sgd(rate), step), problem, LINEAR_STEPS)
    assert_solved(w, elastic_net(alpha, l1_ratio))


def test_elastic_net_by_weight_decay_on_the_weights():
    """Weight decay that is chained before `soft_threshold` acts on w: plain L2."""
    alpha, l1_ratio = 0.05, 0.6
    problem = least_squares()
    l2 = alpha * (1 - l1_ratio)
    rate = 1 / (problem.curvature + l2)
    threshold = lats_optax.threshold_from_l1(alpha * l1_ratio, rate, LINEAR_STEPS)
    tx = optax.chain(
        optax.add_decayed_weights(l2), optax.sgd(rate), lats_optax.soft_threshold(threshold)
    )
    assert_solved(run(tx, problem, LINEAR_STEPS)[0], elastic_net(alpha, l1_ratio))


# --- logistic regression: breast cancer, 569 rows, 30 features ----------------------------------
# Correlated features and saturated predictions: more steps than above.

LOGISTIC_STEPS = 20_000


@functools.cache
def breast_cancer():
    x, y = datasets.load_breast_cancer(return_X_y=True)
    return (x - x.mean(0)) / x.std(0), y


def logistic(*, penalize_intercept):
    """The mean log loss of x w + b, or with b as the last entry of w."""
    x, y = breast_cancer()
    design = np.column_stack([x, np.ones(len(y))])

    def loss(params):
        w = params["w"][:, 0]
        weights = w if penalize_intercept else jnp.append(w, params["b"])
        return jnp.mean(optax.sigmoid_binary_cross_entropy(design @ weights, y))

    curvature = np.linalg.eigvalsh(design.T @ design / len(y))[-1] / 4
    return Problem(loss, curvature, 31 if penalize_intercept else 30)


@pytest.mark.cover
@pytest.mark.parametrize("c", [0.02, 0.05])
@pytest.mark.parametrize("method", ISTA_AND_DUAL_AVERAGING)
def test_logistic_regression_against_saga(c, method):
    """saga leaves the intercept out of the penalty, as the default mask does with a vector."""
    x, y = breast_cancer()
    model = linear_model.LogisticRegression(
        C=c, l1_ratio=1.0, solver="saga", tol=1e-11, max_iter=10**5, random_state=0
    ).fit(x, y)
    problem = logistic(penalize_intercept=False)
    tx = methods(problem.curvature, 1 / (c * len(y)), LOGISTIC_STEPS)[method]()
    w, b = run(tx, problem, LOGISTIC_STEPS)
    assert_solved(w, model.coef_[0])
    assert b == pytest.approx(model.intercept_[0], rel=RELATIVE)


@pytest.mark.cover
@pytest.mark.parametrize("c", [0.02, 0.05])
@pytest.mark.parametrize("method", ISTA_AND_DUAL_AVERAGING)
def test_logistic_regression_against_liblinear(c, method):
    """liblinear penalizes the intercept, as the weight of one more feature that is always 1."""
    x, y = breast_cancer()
    model = linear_model.LogisticRegression(
        C=c, l1_ratio=1.0, solver="liblinear", tol=1e-12, max_iter=10**5, random_state=0
    ).fit(x, y)
    problem = logistic(penalize_intercept=True)
    tx = methods(problem.curvature, 1 / (c * len(y)), LOGISTIC_STEPS)[method]()
    w, _ = run(tx, problem, LOGISTIC_STEPS)
    assert_solved(w, np.append(model.coef_[0], model.intercept_))
