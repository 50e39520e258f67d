"""Masks, paths and supports."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lats_optax import apply_support, masks, prunable, select, support

PARAMS = {
    "head": {"bias": jnp.zeros(2), "kernel": jnp.ones((4, 2))},
    "norm": {"scale": jnp.ones(4)},
    "stem": {"kernel": jnp.ones((3, 3, 1, 4))},
    "temperature": jnp.ones(()),
}


def chosen(mask, params=PARAMS):
    """The paths that a mask selects."""
    names = jax.tree.leaves(masks.paths(params))
    tree = mask(params)
    assert jax.tree.structure(tree) == jax.tree.structure(params)
    assert all(isinstance(leaf, bool) for leaf in jax.tree.leaves(tree))
    return [name for name, picked in zip(names, jax.tree.leaves(tree)) if picked]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (prunable, ["head/kernel", "stem/kernel"]),
        (select(), ["head/kernel", "stem/kernel"]),
        (select("stem"), ["stem/kernel"]),
        (select(["stem", "bias$"]), ["head/bias", "stem/kernel"]),
        (select(("norm", "temperature")), ["norm/scale", "temperature"]),
        (select(iter(["kernel"])), ["head/kernel", "stem/kernel"]),
        (select("kernel", exclude="^head/"), ["stem/kernel"]),
        (select(exclude=["stem", "scale"]), ["head/kernel"]),
        (select(".*"), ["head/bias", "head/kernel", "norm/scale", "stem/kernel", "temperature"]),
        (select(r"(?i)HEAD/.*L$"), ["head/kernel"]),
        (select(""), ["head/bias", "head/kernel", "norm/scale", "stem/kernel", "temperature"]),
        (select([]), []),
    ],
)
def test_select(mask, expected):
    assert chosen(mask) == expected
    # The same mask may meet several trees, or one of them again.
    assert chosen(mask) == expected


@pytest.mark.parametrize(
    ("options", "argument", "pattern"),
    [
        (dict(include="kernal"), "include", "kernal"),
        (dict(include=["kernel", "haed/"]), "include", "haed/"),
        (dict(exclude="^kernel"), "exclude", "\\^kernel"),
        (dict(include="kernel", exclude=["stem", "tail"]), "exclude", "tail"),
    ],
)
def test_an_expression_that_matches_nothing_lists_the_paths(options, argument, pattern):
    paths = "head/bias, head/kernel, norm/scale, stem/kernel, temperature"
    with pytest.raises(ValueError, match=f"^{argument}: .*'{pattern}' matches no .*{paths}$"):
        select(**options)(PARAMS)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_what_is_no_regular_expression(argument):
    with pytest.raises(ValueError, match=rf"^{argument}: '\(head' is not a regular expression: .*"):
        select(**{argument: ["stem", "(head"]})


def test_paths_of_trees():
    layers = [{"w": 1.0}, ({"b": 2.0}, None)]
    assert masks.paths({"layers": layers}) == {
        "layers": [{"w": "layers/0/w"}, ({"b": "layers/1/0/b"}, None)]
    }
    assert masks.paths(jnp.ones(3)) == "params"
    assert masks.paths({}) == {}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box:
    """As flax boxes a parameter."""

    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    """A module one of whose parameters happens to be called `value`."""

    key: Any
    value: Any

    def __call__(self, x):
        raise AssertionError("a module is no function from parameters to a mask")


def test_boxes_leave_no_trace_in_paths_but_parameters_called_value_do():
    params = {
        "attention": Attention(1.0, 2.0),
        "boxed": Box(3.0),
        "plain": {"value": 4.0},
        "projection": Attention({"kernel": Box(5.0)}, Box(6.0)),
    }
    assert jax.tree.leaves(masks.paths(params)) == [
        "attention/key",
        "attention/value",
        "boxed",
        "plain/value",
        "projection/key/kernel",
        "projection/value",
    ]


# --- resolve ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (True, [True] * 5),
        (prunable, [False, True, False, True, False]),
        (lambda params: False, [False] * 5),
        (
            {"head": True, "norm": {"scale": False}, "stem": False, "temperature": np.True_},
            [True, True, False, False, True],
        ),
        (
            lambda params: {
                "head": jnp.array(True),
                "norm": False,
                "stem": True,
                "temperature": True,
            },
            [True, True, False, True, True],
        ),
    ],
)
def test_masks_may_be_functions_or_prefixes(mask, expected):
    resolved = masks.resolve(mask, PARAMS)
    assert jax.tree.structure(resolved) == jax.tree.structure(PARAMS)
    assert jax.tree.leaves(resolved) == expected
    assert {type(leaf) for leaf in jax.tree.leaves(resolved)} == {bool}


def test_a_callable_tree_of_bools_is_a_mask():
    params = Attention(jnp.ones((2, 2)), jnp.ones((2, 2)))
    resolved = masks.resolve(Attention(True, False), params)
    assert (resolved.key, resolved.value) == (True, False)


def test_masks_of_everything_meet_parameters_of_which_some_are_masked_out():
    mask = {"a": {"b": True, "c": [True, False]}, "d": True}
    params = {"a": {"b": 1.0, "c": optax.MaskedNode()}, "d": {"e": 1.0, "f": optax.MaskedNode()}}
    assert masks.resolve(mask, params) == {
        "a": {"b": True, "c": optax.MaskedNode()},
        "d": {"e": True, "f": optax.MaskedNode()},
    }
    with pytest.raises(ValueError, match=r"^mask: its structure.* nor a prefix of it$"):
        masks.resolve({"a": {"c": True}, "d": True}, params)


# --- support ------------------------------------------------------------------------------------


def test_support():
    params = {"kernel": jnp.array([[0.0, -0.0, 1e-30], [-2.0, jnp.nan, 3.0]]), "bias": jnp.zeros(3)}
    alive = support(params)
    assert alive["kernel"].tolist() == [[False, False, True], [True, True, True]]
    assert alive["bias"].shape == ()
    assert alive["bias"].dtype == alive["kernel"].dtype == bool
    assert bool(alive["bias"])
    everything = support(params, True)
    assert everything["bias"].tolist() == [False] * 3
    assert jax.tree.map(jnp.shape, jax.jit(support)(params)) == {"bias": (), "kernel": (2, 3)}
    with pytest.raises(ValueError, match=r"^mask: its structure"):
        support(params, {"kernel": True})


def test_support_follows_a_layer_through_masks():
    params = {"a": jnp.array([[0.0, 1.0]]), "b": jnp.array([[0.0, 1.0]])}
    alive = support(params, select("a"))
    assert alive["a"].tolist() == [[False, True]]
    assert alive["b"].tolist() is True


# --- apply_support ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32])
@pytest.mark.parametrize("compiled", [False, True])
def test_apply_support_keeps_what_is_alive_and_zeros_the_rest(dtype, compiled):
    params = {"kernel": jnp.array([[3, -4, 5, -6]], dtype), "bias": jnp.array([7, 0], dtype)}
    alive = {"kernel": jnp.array([[True, False, False, True]]), "bias": True}
    kept = (jax.jit(apply_support) if compiled else apply_support)(params, alive)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(dtype)}
    assert kept["kernel"].tolist() == [[3, 0, 0, -6]]
    assert kept["bias"].tolist() == [7, 0]


def test_apply_support_gives_positive_zeros_whatever_stood_there():
    excluded = jnp.array([-1.0, -0.0, jnp.nan, jnp.inf, -jnp.inf, 1e-45])
    kept = np.asarray(apply_support(excluded, jnp.zeros(6, bool)))
    assert (kept == 0).all()
    assert not np.signbit(kept).any()
    # What is kept is not looked at.
    assert np.isnan(apply_support(excluded, jnp.ones(6, bool))[2])


def test_apply_support_takes_prefixes_and_names_what_does_not_fit():
    params = {"a": {"b": jnp.ones(2), "c": jnp.ones(3)}, "d": jnp.ones(2)}
    kept = apply_support(params, {"a": False, "d": jnp.array([True, False])})
    assert jax.tree.map(lambda leaf: leaf.tolist(), kept) == {
        "a": {"b": [0, 0], "c": [0, 0, 0]},
        "d": [1, 0],
    }
    with pytest.raises(ValueError, match=r"^support: its structure, with nothing more.*with d, n"):
        apply_support(params, {"a": True})
    with pytest.raises(ValueError, match=r"^support: its structure, with a/e, .* with a/b, a/c, d"):
        apply_support(params, {"a": {"e": True}})
    with pytest.raises(ValueError, match=r"^support: its structure, with PyTreeDef\(\(\*"):
        apply_support([1.0, 2.0], (True, False))
    with pytest.raises(ValueError, match=r"^support: at d it is 'no'; allowed is bool\[2\]"):
        apply_support(params, {"a": True, "d": "no"})
    with pytest.raises(ValueError, match=r"^support: at d it is bool\[3\]; allowed is bool\[2\]"):
        apply_support(params, {"a": True, "d": jnp.ones(3, bool)})
    with pytest.raises(ValueError, match=r"^support: at d it is float32\[2\]; allowed is bool"):
        apply_support(params, {"a": True, "d": jnp.ones(2)})
