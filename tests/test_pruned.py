"""How pruned weights move: the bound by what is alive, and that it keeps layers from dying."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lats_optax
from lats_optax.latent.pruned import as_pruned_update
from tests import matrix

W = np.array([[0.0, 0.0, 3.0], [2.0, 0.0, 4.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
U = np.array([[3.0, 1.0, 9.0], [1.0, 2.0, 9.0], [4.0, 3.0, 0.3], [0.0, 4.0, 0.4]], np.float32)


@pytest.mark.slow
def test_an_output_whose_pruned_updates_are_too_long_is_scaled_and_others_are_left():
    found = np.asarray(lats_optax.bounded(0.1)(U, W))
    # 5 in the first output, where 2 is alive: to 0.2. Nothing alive in the second. 0.5 of 5: left.
    expected = np.array([[0.12, 0, 9], [1, 0, 9], [0.16, 0, 0.3], [0, 0, 0.4]], np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
def test_outputs_may_be_on_the_first_axis():
    other = lats_optax.bounded(0.1, axis=0)(U.T, W.T)
    np.testing.assert_array_equal(other.T, lats_optax.bounded(0.1)(U, W))


@pytest.mark.slow
@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("stack", [(3,), (2, 3)])
def test_each_of_the_stacked_layers_is_bounded_by_itself(axis, stack):
    rng = np.random.default_rng(0)
    updates = rng.normal(size=(*stack, 5, 4)).astype(np.float32)
    w = np.where(rng.random(updates.shape) < 0.6, 0, rng.normal(size=updates.shape)).astype("f")
    found = np.asarray(lats_optax.bounded(axis=axis, stacked_axes=len(stack))(updates, w))
    one = lats_optax.bounded(axis=axis)
    for layer in np.ndindex(stack):
        np.testing.assert_allclose(found[layer], one(updates[layer], w[layer]), rtol=1e-6)
    assert not np.allclose(found, one(updates, w))


def test_what_is_not_stacked_is_refused():
    tx = lats_optax.soft_threshold(0.1, pruned_scale=lats_optax.bounded(stacked_axes=1))
    with pytest.raises(ValueError, match=r"^pruned_scale: bounded\(stacked_axes=1\) needs 3 dim"):
        tx.update(jnp.asarray(U), tx.init(jnp.asarray(W)), jnp.asarray(W))


@pytest.mark.slow
def test_an_array_of_one_dimension_is_one_output():
    found = lats_optax.bounded(0.5)(jnp.array([3.0, 4.0, 1.0]), jnp.array([0.0, 0.0, 1.0]))
    np.testing.assert_allclose(found, [0.3, 0.4, 1.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("rule", "w"),
    [
        (lats_optax.bounded(math.inf), W),
        (lats_optax.bounded(), np.zeros_like(W)),
        (lats_optax.bounded(), np.ones_like(W)),
        (as_pruned_update(1), W),
    ],
    ids=["inf", "nothing alive", "all alive", "straight-through"],
)
def test_where_updates_are_left_as_they_are(rule, w):
    np.testing.assert_array_equal(rule(jnp.asarray(U), jnp.asarray(w)), U)


@pytest.mark.parametrize(
    "dtype", matrix.fast([jnp.float16, jnp.bfloat16, jnp.float32], [jnp.bfloat16])
)
def test_narrow_updates_are_measured_in_float32(dtype):
    # Squares of 300 overflow float16.
    update, w = jnp.full((4, 1), 300.0, dtype), jnp.zeros((4, 1), dtype).at[0].set(30.0)
    found = lats_optax.bounded(0.1)(update, w)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(found[1:, 0], float), 3 / math.sqrt(3), rtol=1e-2)


@pytest.mark.slow
def test_non_finite_updates_stay_visible():
    found = lats_optax.bounded()(jnp.array([[jnp.nan], [jnp.inf], [1.0]]), jnp.eye(3)[:, 2:])
    assert not np.isfinite(np.asarray(found[:2])).any()


def test_the_derivative_is_finite_where_nothing_moves_and_where_nothing_is_alive():
    slope = jax.grad(lambda u: jnp.sum(lats_optax.bounded()(u, jnp.asarray(W)) ** 2))
    assert np.isfinite(slope(jnp.asarray(U))).all()
    assert np.isfinite(slope(jnp.zeros_like(U))).all()


def normalized():
    """Two convolutions, batch normalization after each, and a classifier."""
    nn = pytest.importorskip("flax.linen")

    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in (16, 32):
                x = nn.Conv(width, (3, 3), strides=2, use_bias=False)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=False, use_bias=True)(x))
            return nn.Dense(4)(x.mean(axis=(1, 2)))

    return Normalized()


def trained(steps=240, **how):
    """The loss and the report of a network at 98 %, where straight-through kills layers."""
    model = normalized()
    prototypes = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    labels = jax.random.randint(jax.random.key(2), (steps, 64), 0, 4)
    noise = jax.random.normal(jax.random.key(3), (steps, 64, 8, 8, 1))
    variables = model.init(jax.random.key(0), noise[0])
    params, stats = variables["params"], variables["batch_stats"]
    rate = optax.cosine_decay_schedule(0.3, steps)
    threshold = lats_optax.target_sparsity(0.98, rate, steps)
    tx = optax.chain(optax.sgd(rate, momentum=0.9), lats_optax.soft_threshold(threshold, **how))

    def loss_of(params, x, y):
        both = {"params": params, "batch_stats": stats}
        logits, _ = model.apply(both, x, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(carry, batch):
        params, state = carry
        y, z = batch
        loss, gradients = jax.value_and_grad(loss_of)(params, prototypes[y] + 0.5 * z, y)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    carry = params, tx.init(params)
    (params, _), losses = jax.jit(lambda c: jax.lax.scan(step, c, (labels, noise)))(carry)
    return float(losses[-20:].mean()), lats_optax.sparsity(params)


@pytest.mark.slow
def test_no_layer_before_a_normalization_dies():
    loss, report = trained()
    assert loss < 0.1
    assert all(layer.zeros < layer.size for layer in report.layers)


@pytest.mark.slow
def test_straight_through_the_classifier_dies_of_what_revives():
    loss, report = trained(pruned_scale=1.0)
    assert loss > 1.3  # that of four classes by chance is 1.386
    assert [layer.path for layer in report.layers if layer.zeros == layer.size] == [
        "Dense_0/kernel"
    ]


@pytest.mark.slow
def test_a_classifier_that_begins_at_zero_is_trained():
    params = {"kernel": jnp.zeros((8, 4))}
    tx = optax.chain(
        optax.sgd(0.1), lats_optax.soft_threshold(lats_optax.target_sparsity(0.75, 0.1, 50))
    )
    state = tx.init(params)
    goal = jax.random.normal(jax.random.key(0), (8, 4))
    for _ in range(50):
        gradients = jax.tree.map(lambda w: w - goal, params)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    largest = np.sort(np.abs(np.asarray(goal)).ravel())[-8:]
    kept = np.abs(np.asarray(goal))[np.asarray(params["kernel"]) != 0]
    assert kept.size == 8
    assert kept.sum() > 0.9 * largest.sum()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: lats_optax.bounded(0), "most: 0 is not allowed"),
        (lambda: lats_optax.bounded(math.nan), "most: nan is not allowed"),
        (lambda: lats_optax.bounded(stacked_axes=-1), "stacked_axes: -1 is not allowed"),
        (lambda: lats_optax.bounded(axis=1), "axis: 1 is not allowed; allowed are -1 and 0"),
        (lambda: lats_optax.soft_threshold(0.1, pruned_scale=2), "pruned_scale: 2 is not allowed"),
        (lambda: lats_optax.soft_threshold(0.1, pruned_scale="x"), "pruned_scale: 'x' is not"),
    ],
    ids=["no bound", "nan", "a negative stack", "another axis", "above one", "a word"],
)
def test_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
