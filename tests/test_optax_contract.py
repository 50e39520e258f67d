"""What optax asks of every optimizer in its own tables, as properties of each transform here."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lats_optax
from lats_optax import groups, prox
from tests import versions
from tests.properties import assert_close

STEPS, RATE = 60, 0.1
START = {
    "bias": jnp.zeros(8),
    "kernel": jax.random.normal(jax.random.key(0), (8, 16)),
}
GOAL = jax.tree.map(
    lambda leaf, key: jax.random.normal(key, leaf.shape),
    START,
    dict(zip(START, jax.random.split(jax.random.key(1)))),
)


def target(**how):
    return lats_optax.target_sparsity(0.5, RATE, STEPS, **how)


TRANSFORMS = {
    "number": lambda: lats_optax.soft_threshold(0.1),
    "schedule": lambda: lats_optax.soft_threshold(lats_optax.lats_threshold(RATE, STEPS, 0.3)),
    "target": lambda: lats_optax.soft_threshold(target()),
    "target_soft": lambda: lats_optax.soft_threshold(target(), operator=prox.prox_l1),
    "target_frozen": lambda: lats_optax.soft_threshold(target(), freeze_after=40),
    "each_layer": lambda: lats_optax.soft_threshold(
        lats_optax.target_sparsity(lats_optax.uniform(0.5), RATE, STEPS)
    ),
    "channels": lambda: lats_optax.soft_threshold(target(), operator=groups.output_channels()),
    "blocks": lambda: lats_optax.soft_threshold(target(), operator=groups.blocks(4, 4)),
    "n_of_m": lambda: lats_optax.soft_threshold(target(), operator=groups.n_of_m(2, 4)),
    "proximal_step": lambda: lats_optax.proximal_step(0.01),
    "keep_support": lambda: lats_optax.keep_support(lats_optax.support),
}
SPARSE = {
    "keep_support": jax.tree.map(lambda w: jnp.where(w > 0, w, 0), START) | {"bias": GOAL["bias"]}
}
every = pytest.mark.parametrize("name", TRANSFORMS)


def start(name):
    return SPARSE.get(name, START)


def chained(name):
    return optax.chain(optax.sgd(RATE), TRANSFORMS[name]())


def slopes(params):
    """The gradient of ``1/2 ||params - GOAL||^2``."""
    return jax.tree.map(lambda w, goal: w - goal.astype(w.dtype), params, GOAL)


def run(tx, params, steps=STEPS):
    @jax.jit
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(slopes(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0]


def kinds(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


@pytest.mark.cover
@every
def test_a_parabola_is_descended(name):
    params, _ = run(chained(name), start(name))
    before, after = (
        sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(slopes(each)))
        for each in (start(name), params)
    )
    assert after < 0.8 * before
    np.testing.assert_allclose(params["bias"], GOAL["bias"], atol=0.01)
    assert np.any(np.asarray(params["kernel"]) == 0)


@pytest.mark.cover
@every
def test_shapes_alone_give_the_state_in_shapes(name):
    tx = chained(name)
    shapes = jax.eval_shape(lambda: start(name))
    if name == "keep_support":
        shapes = start(name)  # the support is taken from values
    assert kinds(tx.init(shapes)) == kinds(jax.eval_shape(tx.init, start(name)))


@pytest.mark.cover
@every
def test_an_update_keeps_the_structure_the_shapes_and_the_types_of_its_state(name):
    tx = chained(name)
    state = tx.init(start(name))
    updates, after = tx.update(slopes(start(name)), state, start(name))
    assert kinds(after) == kinds(state)
    assert kinds(updates) == kinds(start(name))


@pytest.mark.cover
@every
def test_arguments_are_left_as_they_were(name):
    tx, params = chained(name), start(name)
    state, gradients = tx.init(params), slopes(params)
    copies = jax.tree.map(np.array, (gradients, state, params))
    tx.update(gradients, state, params)
    jax.tree.map(np.testing.assert_array_equal, (gradients, state, params), copies)


@pytest.mark.cover
@every
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_type_of_the_parameters_is_kept(name, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), start(name))
    after, _ = run(chained(name), params, 3)
    assert kinds(after) == kinds(params)


@pytest.mark.cover
@every
def test_jit_changes_nothing(name):
    tx, params = chained(name), start(name)
    state, jitted = tx.init(params), jax.jit(tx.update)
    for _ in range(3):
        expected = tx.update(slopes(params), state, params)
        found = jitted(slopes(params), state, params)
        assert_close(found, expected)
        updates, state = expected
        params = optax.apply_updates(params, updates)


@pytest.mark.cover
@every
def test_micro_batches_are_one_batch(name):
    whole, _ = run(chained(name), start(name), 4)
    parts, _ = run(optax.MultiSteps(chained(name), 2), start(name), 8)
    assert_close(parts, whole)


@pytest.mark.cover
@every
def test_parameters_are_asked_for(name):
    tx = TRANSFORMS[name]()
    with pytest.raises(ValueError, match="params"):
        tx.update(START, tx.init(start(name)))


@pytest.mark.cover
@every
def test_an_empty_tree_stays_empty(name):
    tx = TRANSFORMS[name]()
    updates, _ = tx.update({}, tx.init({}), {})
    assert updates == {}


@pytest.mark.cover
@every
@pytest.mark.parametrize(
    ("make_mesh", "around"),
    [
        (versions.auto_mesh, versions.set_mesh),
        pytest.param(versions.explicit_mesh, versions.set_mesh, marks=versions.explicit_sharding),
        pytest.param(
            versions.explicit_mesh, contextlib.nullcontext, marks=versions.explicit_sharding
        ),
    ],
    ids=["auto", "explicit", "explicit, of the arrays alone"],
)
@pytest.mark.parametrize("spec", [("d",), (None, "d")], ids=["rows", "columns"])
def test_the_layout_of_the_parameters_is_that_of_the_state_and_of_the_updates(
    name, make_mesh, around, spec
):
    mesh = make_mesh((8,), ("d",))
    layout = {
        "bias": NamedSharding(mesh, PartitionSpec()),
        "kernel": NamedSharding(mesh, PartitionSpec(*spec)),
    }
    tx = chained(name)
    expected, _ = run(tx, start(name), 3)
    with around(mesh):
        params, goal = jax.device_put((start(name), GOAL), (layout, layout))
        state = jax.jit(tx.init)(params)
        for _ in range(3):
            gradients = jax.tree.map(jnp.subtract, params, goal)
            updates, state = jax.jit(tx.update)(gradients, state, params)
            params = optax.apply_updates(params, updates)
        like_kernel = [
            leaf for leaf in jax.tree.leaves((state, updates, params)) if leaf.shape == (8, 16)
        ]
        assert len(like_kernel) >= 2
        for leaf in like_kernel:
            assert leaf.sharding.is_equivalent_to(layout["kernel"], 2)
    assert_close(params, expected)
