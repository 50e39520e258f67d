"""The pure training step: parts of a batch, averages; against a whole batch and NumPy loops."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lats_optax
from lats_optax.training.step import averaged, create_state, train_step
from tests import matrix, tiny


class Plain(nn.Module):
    """Without batch statistics: a mean over parts is the mean over the batch."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        # Uniform: the default initializer takes XLA a second to compile.
        init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=init)
        return dense(tiny.CLASSES)(nn.relu(dense(16)(images.reshape(images.shape[0], -1))))


def batch_of(seed, count=12):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(count, *tiny.SHAPE)).astype(np.float32)
    return {"image": images, "label": rng.integers(tiny.CLASSES, size=count).astype(np.int32)}


def transform():
    threshold = lats_optax.lats_threshold(0.1, 6, final=0.05)
    return lats_optax.soft_threshold(threshold, inner=optax.sgd(0.1, momentum=0.9))


def run(model, steps=6, mean=lambda tree: tree, average=False, **options):
    """The states after each step, the first one before any."""
    tx = transform()
    step = partial(
        train_step, mean=mean, apply=model.apply, transform=tx, label_smoothing=0.1, **options
    )
    step, states = (
        jax.jit(step),
        [jax.jit(lambda: create_state(model, tx, tiny.SHAPE, 0, average))()],
    )
    metrics = []
    for index in range(steps):
        state, measured = step(states[-1], batch_of(index))
        states.append(state)
        metrics.append(measured)
    return jax.device_get((states, metrics))


@pytest.mark.parametrize("parts", matrix.fast([3, 12], [12]))
def test_parts_are_the_whole_batch_where_nothing_is_normalized(parts):
    whole, in_parts = run(Plain()), run(Plain(), grad_accum_steps=parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, in_parts)
    zeros = [lats_optax.sparsity(states[-1].params).zeros for states, _ in (whole, in_parts)]
    assert zeros[0] == zeros[1] > 0


@pytest.mark.slow
def test_parts_accumulate_in_float32_under_bfloat16():
    (whole, _), (in_parts, _) = (
        run(Plain(jnp.bfloat16), grad_accum_steps=parts) for parts in (1, 12)
    )
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(in_parts[-1].params))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=5e-3),
        whole[-1].params,
        in_parts[-1].params,
    )


@pytest.mark.parametrize("parts", [1, 4])
def test_replicas_meet_once_a_step(parts):
    model, tx = Plain(), transform()
    step = partial(
        train_step,
        mean=lambda tree: jax.lax.pmean(tree, "replica"),
        apply=model.apply,
        transform=tx,
        label_smoothing=0.0,
        grad_accum_steps=parts,
    )
    state = jax.eval_shape(lambda: create_state(model, tx, tiny.SHAPE, 0))
    program = jax.make_jaxpr(step, axis_env=[("replica", 2)])(state, batch_of(0)).jaxpr
    assert "psum" in str(program)
    assert str(program).count("psum") == sum(
        equation.primitive.name.startswith("psum") for equation in program.eqns
    )
    assert ("scan" in str(program)) == (parts > 1)


@pytest.mark.slow
def test_memory_falls_with_the_parts():
    model, tx = tiny.Model(), transform()
    sizes = []
    for parts in (1, 8):
        step = partial(
            train_step,
            mean=lambda tree: tree,
            apply=model.apply,
            transform=tx,
            label_smoothing=0.0,
            grad_accum_steps=parts,
        )
        state = jax.eval_shape(lambda: create_state(model, tx, tiny.SHAPE, 0))
        compiled = jax.jit(step).lower(state, batch_of(0, 1024)).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 0.3 * sizes[0]


@pytest.mark.parametrize("decay", matrix.fast([0.25, 0.999], [0.999]))
def test_the_average_is_the_formula(decay):
    states, _ = run(tiny.Model(), average=True, ema_decay=decay)
    for part in ("params", "batch_stats"):
        trees = [jax.tree.leaves(getattr(state, part)) for state in states]
        expected = [np.asarray(leaf, np.float64) for leaf in trees[0]]
        for t, new in enumerate(trees[1:]):
            d = min(decay, (1 + t) / (10 + t))
            expected = [d * old + (1 - d) * leaf for old, leaf in zip(expected, new)]
        for leaf, oracle in zip(jax.tree.leaves(getattr(states[-1].average, part)), expected):
            assert leaf.dtype == np.float32
            np.testing.assert_allclose(leaf, oracle, atol=1e-6)


@pytest.mark.slow
def test_an_average_does_not_change_the_run_and_costs_nothing_when_off():
    (plain, _), (kept, _) = run(tiny.Model()), run(tiny.Model(), average=True, ema_decay=0.25)
    assert plain[-1].average == ()
    jax.tree.map(np.testing.assert_array_equal, plain[-1].params, kept[-1].params)


@pytest.mark.slow
def test_averaged_takes_the_averages_and_the_zeros_of_the_weights():
    states, _ = run(tiny.Model(), average=True, ema_decay=0.25)
    sparse = jax.device_get(averaged(states[-1], lats_optax.prunable))
    kernel, average = (
        tree["Dense_0"]["kernel"] for tree in (states[-1].params, states[-1].average.params)
    )
    np.testing.assert_array_equal(
        sparse.params["Dense_0"]["kernel"], np.where(kernel == 0, np.float32(0), average)
    )
    assert 0 < (kernel == 0).sum() < kernel.size
    np.testing.assert_array_equal(
        sparse.batch_stats["BatchNorm_0"]["mean"],
        states[-1].average.batch_stats["BatchNorm_0"]["mean"],
    )
    dense = jax.device_get(averaged(states[-1], None))
    np.testing.assert_array_equal(dense.params["Dense_0"]["kernel"], average)
