"""Attention heads and hidden units, against loops and against networks without them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lats_optax
from lats_optax import groups, prox, select, soft_threshold, target_sparsity
from tests import versions

STEPS, RATE = 30, 0.05
EMBED, HEADS, FEATURES, SHARED = 6, 4, 3, 2

LAYOUTS = {
    # Leaf -> its shape, and what of it belongs to a unit.
    "flax": (
        groups.heads(),
        HEADS,
        {
            "query/kernel": ((EMBED, HEADS, FEATURES), lambda u: np.s_[:, u]),
            "key/kernel": ((EMBED, HEADS, FEATURES), lambda u: np.s_[:, u]),
            "value/kernel": ((EMBED, HEADS, FEATURES), lambda u: np.s_[:, u]),
            "out/kernel": ((HEADS, FEATURES, EMBED), lambda u: np.s_[u]),
        },
    ),
    "shared keys": (
        groups.heads(),
        SHARED,
        {
            "query/kernel": ((EMBED, HEADS, FEATURES), lambda u: np.s_[:, 2 * u : 2 * u + 2]),
            "key/kernel": ((EMBED, SHARED, FEATURES), lambda u: np.s_[:, u]),
            "value/kernel": ((EMBED, SHARED, FEATURES), lambda u: np.s_[:, u]),
            "out/kernel": ((HEADS, FEATURES, EMBED), lambda u: np.s_[2 * u : 2 * u + 2]),
        },
    ),
    "llama": (
        groups.heads(SHARED),
        SHARED,
        {
            "q_proj/kernel": ((EMBED, HEADS * FEATURES), lambda u: np.s_[:, 6 * u : 6 * u + 6]),
            "k_proj/kernel": ((EMBED, SHARED * FEATURES), lambda u: np.s_[:, 3 * u : 3 * u + 3]),
            "v_proj/kernel": ((EMBED, SHARED * FEATURES), lambda u: np.s_[:, 3 * u : 3 * u + 3]),
            "o_proj/kernel": ((HEADS * FEATURES, EMBED), lambda u: np.s_[6 * u : 6 * u + 6]),
        },
    ),
    "fused": (
        groups.heads(HEADS),
        HEADS,
        {
            "c_attn/w": (
                (EMBED, 3 * HEADS * FEATURES),
                lambda u: np.s_[:, [p * 12 + u * 3 + f for p in range(3) for f in range(3)]],
            ),
            "c_proj/w": ((HEADS * FEATURES, EMBED), lambda u: np.s_[3 * u : 3 * u + 3]),
        },
    ),
    "gated": (
        groups.hidden_units(),
        8,
        {
            "gate_proj/kernel": ((EMBED, 8), lambda u: np.s_[:, u]),
            "up_proj/kernel": ((EMBED, 8), lambda u: np.s_[:, u]),
            "down_proj/kernel": ((8, EMBED), lambda u: np.s_[u]),
        },
    ),
    "timm's heads": (
        groups.heads(HEADS),
        HEADS,
        {
            "attn/qkv/kernel": (
                (EMBED, 3 * HEADS * FEATURES),
                lambda u: np.s_[:, [p * 12 + u * 3 + f for p in range(3) for f in range(3)]],
            ),
            "attn/proj/kernel": ((HEADS * FEATURES, EMBED), lambda u: np.s_[3 * u : 3 * u + 3]),
        },
    ),
    "timm's units": (
        groups.hidden_units(),
        8,
        {
            "mlp/fc1/kernel": ((EMBED, 8), lambda u: np.s_[:, u]),
            "mlp/fc2/kernel": ((8, EMBED), lambda u: np.s_[u]),
        },
    ),
    "named": (
        groups.units({"first": -1, "second": -2}),
        5,
        {
            "first": ((3, EMBED, 5), lambda u: np.s_[..., u]),
            "second": ((5, EMBED), lambda u: np.s_[u]),
        },
    ),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def modules(layout, seed=0):
    """Two modules of random weights, in which each unit has a scale of its own."""
    _, number, leaves = LAYOUTS[layout]
    rng = np.random.default_rng(seed)
    tree = {}
    for module in ("layer_10", "layer_9"):  # in the order of neither numbers nor layers
        scales = np.linspace(0.3, 2.0, number)  # so that each module loses some and keeps some
        for name, (shape, unit) in leaves.items():
            w = rng.normal(size=shape)
            for u in range(number):
                w[unit(u)] *= scales[u]
            tree[f"{module}/{name}"] = w.astype(np.float32)
    return tree


def sizes(layout, tree):
    """The root mean square of each unit: a loop."""
    _, number, leaves = LAYOUTS[layout]
    found = {}
    for module in ("layer_10", "layer_9"):
        for u in range(number):
            own = [
                np.ravel(tree[f"{module}/{name}"][unit(u)]) for name, (_, unit) in leaves.items()
            ]
            found[module, u] = float(np.sqrt(np.mean(np.concatenate(own).astype(float) ** 2)))
    return found


def is_dead(layout, tree):
    return {key for key, size in sizes(layout, tree).items() if size == 0}


@pytest.mark.cover
@each_layout
def test_values_are_those_of_a_loop(layout):
    operator, _, leaves = LAYOUTS[layout]
    tree = modules(layout)
    rms = sizes(layout, tree)
    d = float(np.median(list(rms.values())))
    got = jax.jit(operator)(tree, d)
    for (module, u), size in rms.items():
        factor = max(1 - d / size, 0.0)
        for name, (_, unit) in leaves.items():
            path = f"{module}/{name}"
            np.testing.assert_allclose(got[path][unit(u)], tree[path][unit(u)] * factor, atol=1e-5)


@pytest.mark.cover
@each_layout
@pytest.mark.parametrize("kind", ["target", "frozen", "schedule"])
def test_units_die_as_a_whole(layout, kind):
    operator, number, _ = LAYOUTS[layout]
    tree, goal = modules(layout), modules(layout, seed=1)
    threshold = target_sparsity(0.5, RATE, STEPS)
    if kind == "schedule":
        threshold = optax.linear_schedule(0.0, float(np.median([*sizes(layout, tree).values()])), 9)
    frozen = 20 if kind == "frozen" else None
    tx = optax.chain(
        optax.sgd(RATE), soft_threshold(threshold, operator=operator, freeze_after=frozen)
    )

    def step(carry, _):
        params, state = carry
        slopes = jax.tree.map(lambda w, other: 0.1 * (w - other), params, goal)
        updates, state = tx.update(slopes, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda tree: jax.lax.scan(step, (tree, tx.init(tree)), length=STEPS)[0])
    params, state = run(tree)
    dead = is_dead(layout, params)
    assert 0 < len(dead) < 2 * number
    zeros = sum(int((w == 0).sum()) for w in jax.tree.leaves(params))
    whole = sum(w.size for w in tree.values()) // (2 * number)
    assert zeros == len(dead) * whole  # no zero outside of a unit that is dead
    if kind != "schedule":
        assert len(dead) == number
    exact = lats_optax.finalize(params, state, operator=operator)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a == 0, b == 0), exact, params)
    report = lats_optax.sparsity(params, lambda tree: True, groups=operator)
    assert (report.groups, report.zero_groups) == (2 * number, len(dead))


@pytest.mark.cover
@each_layout
def test_a_preimage_gives_the_weights_back(layout):
    operator, _, _ = LAYOUTS[layout]
    tree = modules(layout)
    state = soft_threshold(0.3, operator=operator).init(tree)
    again = operator(versions.tree.get(state, "latent"), 0.3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), again, tree)


def test_a_head_that_is_dead_is_as_good_as_gone():
    x = jax.random.normal(jax.random.key(0), (2, 7, 12))
    nn = pytest.importorskip("flax.linen")
    attention = nn.MultiHeadDotProductAttention(num_heads=4, use_bias=False)
    params = jax.jit(attention.init)(jax.random.key(1), x)["params"]
    operator = groups.heads()
    tx = soft_threshold(target_sparsity(0.5, RATE, 1), operator=operator)

    @jax.jit
    def prune(params):
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        return optax.apply_updates(params, updates)

    pruned = prune(params)
    alive = np.flatnonzero(np.any(np.asarray(pruned["out"]["kernel"]) != 0, axis=(1, 2)))
    assert len(alive) == 2
    smaller = {
        name: {"kernel": leaf["kernel"][alive] if name == "out" else leaf["kernel"][:, alive]}
        for name, leaf in pruned.items()
    }
    two = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, use_bias=False)
    np.testing.assert_allclose(
        jax.jit(attention.apply)({"params": pruned}, x),
        jax.jit(two.apply)({"params": smaller}, x),
        atol=1e-6,
    )


@pytest.mark.slow
def test_sharded_leaves_have_the_same_heads():
    tree = modules("llama")
    mesh = jax.make_mesh((2,), ("d",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    tx = soft_threshold(target_sparsity(0.5, RATE, 1), operator=groups.heads(SHARED))

    def after(params):
        updates, _ = jax.jit(tx.update)(
            jax.tree.map(jnp.zeros_like, params), tx.init(params), params
        )
        return optax.apply_updates(params, updates)

    expected, got = after(tree), after(jax.device_put(tree, rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)


TREE = {"q_proj": {"kernel": jnp.ones((4, 6))}, "o_proj": {"kernel": jnp.ones((6, 4))}}
ERRORS = {
    "no mapping": (lambda: groups.units("x"), r"^axes: 'x' is not allowed"),
    "no expression": (lambda: groups.units({"(": -1}), r"^axes: '\(' is not a regular expression"),
    "a positive axis": (lambda: groups.units({"a": 0}), r"^axes: 0 of 'a' is not allowed"),
    "half a head": (lambda: groups.heads(0.5), r"^number: 0\.5 is not allowed"),
    "heads along one axis": (
        lambda: soft_threshold(0.1, operator=groups.heads()).init(TREE),
        r"^number: None is not allowed where .* as in o_proj/kernel of shape \(6, 4\)",
    ),
    "heads that do not divide": (
        lambda: soft_threshold(0.1, operator=groups.heads(4)).init(TREE),
        r"finds 4 units in o_proj/kernel, q_proj/kernel, which do not divide axis -2 of o_proj/",
    ),
    "another leaf": (
        lambda: soft_threshold(0.1, operator=groups.heads(2)).init(
            TREE | {"mlp": jnp.ones((3, 3))}
        ),
        r"heads\(…\) knows no units of mlp; .*mask=lats_optax\.select",
    ),
    "too few axes": (
        lambda: soft_threshold(0.1, operator=groups.units({"mlp": -3})).init(
            {"mlp": jnp.ones((3, 3))}
        ),
        r"looks for units along axis -3 of mlp, of shape \(3, 3\)",
    ),
    "a target for each layer": (
        lambda: soft_threshold(
            target_sparsity(lats_optax.uniform(0.5), RATE, STEPS), operator=groups.heads(2)
        ).init(TREE),
        r"^target: one for each layer is not allowed where groups span layers",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_not_allowed_is_said(case):
    act, says = ERRORS[case]
    with pytest.raises(ValueError, match=says):
        act()


@pytest.mark.slow
def test_a_mask_selects_what_has_heads():
    tree = TREE | {"mlp": jnp.ones((3, 3))}
    tx = soft_threshold(0.1, operator=groups.heads(2), mask=select("_proj"))
    assert set(tx.init(tree).latent["q_proj"]) == {"kernel"}
    hard = groups.heads(2, shrinkage=prox.prox_power(np.inf))
    np.testing.assert_array_equal(hard(TREE, 0.5)["q_proj"]["kernel"], TREE["q_proj"]["kernel"])
