"""The report: its numbers against NumPy, its table to the letter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lats_optax import prunable, select, sparsity
from tests import versions

MASKS = {
    "default": prunable,
    "all": True,
    "some": select("conv|bias"),
    "tree": {"conv": {"kernel": True}, "dense": {"bias": False, "kernel": True}, "scale": True},
}


def model(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {
        "conv": {"kernel": (3, 3, 2, 4)},
        "dense": {"bias": (5,), "kernel": (12, 5)},
        "scale": (),
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.integers(-1, 2, size=shape) * 0.5, dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int8], ids=lambda d: d.__name__)
@pytest.mark.parametrize("mask", MASKS)
def test_numbers(mask, dtype):
    params = model(dtype=dtype)
    report = sparsity(params, MASKS[mask])
    leaves = [np.asarray(leaf, float) for leaf in jax.tree.leaves(params)]
    # In the order conv/kernel, dense/bias, dense/kernel, scale.
    picked = {
        "default": [True, False, True, False],
        "all": [True] * 4,
        "some": [True, True, False, False],
        "tree": [True, False, True, True],
    }[mask]
    for layer, leaf, prunable_layer in zip(report.layers, leaves, picked):
        assert layer.shape == leaf.shape
        assert layer.size == leaf.size
        assert layer.zeros == (leaf == 0).sum()
        assert layer.prunable is prunable_layer
        assert layer.sparsity == (leaf == 0).mean()
    inside = np.concatenate([leaf.ravel() for leaf, inside in zip(leaves, picked) if inside])
    everything = np.concatenate([leaf.ravel() for leaf in leaves])
    assert (report.size, report.zeros) == (inside.size, (inside == 0).sum())
    assert report.nonzeros == (inside != 0).sum()
    assert report.sparsity == (inside == 0).mean()
    assert (report.total_size, report.total_zeros) == (everything.size, (everything == 0).sum())
    assert report.total_sparsity == (everything == 0).mean()
    assert [layer.path for layer in report.layers] == [
        "conv/kernel",
        "dense/bias",
        "dense/kernel",
        "scale",
    ]


def test_what_counts_as_zero():
    params = jnp.array([[0.0, -0.0, 1e-30, jnp.nan, -jnp.inf, 1.0]])
    assert sparsity(params).zeros == 2


@pytest.mark.slow
def test_the_table():
    params = {
        "conv_with_a_long_name": {"kernel": jnp.zeros((3, 3, 16, 32)).at[0].set(1.0)},
        "dead": jnp.zeros((4, 5)),
        "dense": {"bias": jnp.zeros(5), "kernel": jnp.ones((32, 5))},
        "empty": jnp.zeros((0, 3)),
        "half_dead": jnp.zeros((1, 1)),
    }
    assert str(sparsity(params)).split("\n") == [
        "layer                             shape        weights       non-zero  sparsity",
        "-------------------------------------------------------------------------------",
        "conv_with_a_long_name/kernel  3×3×16×32          4,608          1,536    66.67%",
        "dead                                4×5             20              0   100.00%",
        "dense/kernel                       32×5            160            160     0.00%",
        "empty                               0×3              0              0     0.00%",
        "half_dead                           1×1              1              0   100.00%",
        "-------------------------------------------------------------------------------",
        "prunable weights                                 4,789          1,696    64.59%",
        "all parameters                                   4,794          1,696    64.62%",
        "wholly zero: dead, half_dead",
    ]


def test_wholly_zero_layers_are_prunable_ones():
    params = {"bias": jnp.zeros(3), "dead": jnp.zeros((2, 2)), "empty": jnp.zeros((0, 2))}
    assert sparsity(params).wholly_zero == ("dead",)
    assert sparsity({"alive": jnp.eye(2)}).wholly_zero == ()
    assert "wholly zero" not in str(sparsity({"alive": jnp.eye(2)}))


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ({"b": jnp.ones(3), "a": jnp.ones(2)}, "a, b"),
        ({}, "no parameters"),
        (jnp.ones(3), "params"),
    ],
)
def test_nothing_prunable_is_said(params, names):
    with pytest.warns(UserWarning, match=f"nothing is prunable: the mask selects none of {names}$"):
        report = sparsity(params)
    assert report.sparsity == 0
    assert str(report).endswith("\nnothing was prunable")


def test_a_mask_of_another_structure():
    with pytest.raises(ValueError, match=r"^mask: its structure"):
        sparsity(model(), {"conv": True})


@pytest.mark.slow
def test_parameters_on_several_devices():
    mesh = versions.auto_mesh((8,), ("d",))
    kernel = jnp.arange(64.0).reshape(8, 8) % 3
    sharded = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec("d")))
    assert sparsity({"k": sharded}) == sparsity({"k": kernel})
    assert sparsity({"k": np.asarray(kernel)}) == sparsity({"k": kernel})


def test_the_report_is_a_frozen_value():
    report = sparsity(model())
    assert report == sparsity(model())
    assert report != sparsity(model(seed=1))
    with pytest.raises(AttributeError):
        report.layers = ()
