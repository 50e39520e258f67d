"""Weights in bfloat16: what a compiled step returns is what its own state says.

Within a compiled program XLA may keep a sixteen-bit value in float32 from one operation to the
next. The weights and the threshold must be those of the latent weights that are stored.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lats_optax
from lats_optax import prox
from tests import matrix

STEPS = 20
OPERATORS = {
    "l1": prox.prox_l1,
    "l0": prox.prox_l0,
    "group_lasso": prox.Axes(axes=(0, 1)),
}


def trained(name, dtype, latent_dtype):
    """Weights and state after STEPS compiled steps with random gradients."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(0.1 * rng.normal(size=shape), dtype)  # noqa: E731
    params = {"conv": draw(3, 3, 8, 16), "dense": draw(37, 50)}
    tx = optax.chain(
        optax.sgd(0.05),
        lats_optax.soft_threshold(
            lats_optax.target_sparsity(0.7, 0.05, STEPS, update_every=3),
            operator=OPERATORS[name],
            latent_dtype=latent_dtype,
        ),
    )

    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state, {k: draw(*v.shape) for k, v in params.items()})
    return params, state[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "latent_dtype"), [("bfloat16", None), ("bfloat16", "float32")])
@pytest.mark.parametrize("name", OPERATORS)
def test_weights_and_threshold_are_those_of_the_stored_latent_weights(name, dtype, latent_dtype):
    params, state = trained(name, dtype, latent_dtype)
    for key, w in params.items():
        expected = OPERATORS[name](state.latent[key], state.threshold).astype(w.dtype)
        assert w.dtype == dtype
        np.testing.assert_array_equal(np.asarray(w) == 0, np.asarray(expected) == 0)
        # The update w' - w is rounded beside w, which is of the size of these weights at most.
        np.testing.assert_allclose(
            np.asarray(w, float), np.asarray(expected, float), atol=float(jnp.finfo(dtype).eps)
        )

    operator = OPERATORS[name]
    each = [
        (operator.magnitude(leaf), operator.group_sizes(leaf.shape))
        for leaf in state.latent.values()
    ]
    magnitudes = np.sort(
        np.concatenate(
            [np.repeat(np.ravel(m), np.broadcast_to(n, m.shape).ravel()) for m, n in each]
        )
    )
    rank = round(0.7 * len(magnitudes))
    np.testing.assert_allclose(state.threshold, magnitudes[rank - 1], rtol=1e-6)
    # More only where magnitudes tie.
    assert lats_optax.sparsity(params).zeros >= rank


@pytest.mark.parametrize(
    ("size", "scale", "target", "operator", "gradients"),
    matrix.fast(
        [
            (900_000, 1e-2, 0.9, None, "float32"),
            (900_000, 5e-5, 0.73, prox.prox_l1, "float16"),
            (80_000, 1e-8, 0.5, None, "float32"),
            (80_000, 3e-7, 0.99, prox.prox_l1, "float32"),
            (80_000, 8e-5, 0.99, None, "float16"),
            (80_000, 1e4, 0.999, prox.prox_l1, "float32"),
        ],
        [(80_000, 3e-7, 0.99, prox.prox_l1, "float32")],
    ),
)
def test_a_named_sparsity_is_met_by_float16_weights_over_float32_latent_ones(
    size, scale, target, operator, gradients
):
    """From scales at which float16 has next to no numbers to those at which it nearly overflows."""
    steps, rng = 4, np.random.default_rng(1)
    params = {
        name: jnp.asarray(scale * rng.uniform(-2, 2, (part, 8)), jnp.float16)
        for name, part in (("a", size // 24), ("b", size // 8 - size // 24))
    }
    threshold = lats_optax.target_sparsity(target, 0.1, steps)
    tx = optax.chain(
        optax.sgd(0.1),
        lats_optax.soft_threshold(threshold, operator=operator, latent_dtype=jnp.float32),
    )

    def step(carry, key):
        params, state = carry
        keys = dict(zip(params, jax.random.split(key)))
        noise = {
            name: (scale * jax.random.normal(keys[name], w.shape)).astype(gradients)
            for name, w in params.items()
        }
        updates, state = tx.update(noise, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), steps)
    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), keys)[0])
    params, state = run(params)
    magnitudes = np.sort(
        np.concatenate([np.abs(np.ravel(leaf)) for leaf in jax.tree.leaves(state[-1].latent)])
    )
    rank = round(target * size)
    zeros = sum(int(np.sum(np.asarray(w) == 0)) for w in jax.tree.leaves(params))
    assert zeros == np.searchsorted(magnitudes, magnitudes[rank - 1], side="right")
    if gradients == "float32":  # those of sixteen bits leave latent weights of one magnitude
        assert zeros == rank
