"""Layers stacked along a leading axis, under operators of groups, and what only looks like that."""

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from lats_optax import groups, prox, proximal_step, soft_threshold
from tests.misuse import Case, gives, warns

KEY = jax.random.key(0)


def started(params, operator, mask=None):
    """The latent weights, after a look at the parameters."""
    return lambda: soft_threshold(0.0, operator=operator, mask=mask).init(params())


def scanned(use_bias=True):
    """Three blocks in one scan, and a layer behind them that is not stacked."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(4, use_bias=use_bias)(nn.RMSNorm()(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return nn.Dense(2, name="head")(scan()(x, None)[0])

    return jax.eval_shape(Model().init, KEY, jnp.ones((1, 4)))["params"]


def experts():
    make = nnx.vmap(lambda rngs: nnx.Linear(6, 4, rngs=rngs))
    return nnx.state(make(nnx.Rngs(0).split(3)), nnx.Param)


def scanned_experts():
    return {"kernel": jnp.ones((3, 5, 4, 6)), "bias": jnp.ones((3, 5, 6))}


def stacked_equinox():
    keys = jax.random.split(KEY, 3)
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(6, 4, key=key))
    return eqx.filter(make(keys), eqx.is_array)


def attention(features, heads):
    """Heads of as many as there are features too, where the shapes alone say little."""
    layer = nn.MultiHeadDotProductAttention(heads, qkv_features=2 * heads)
    return jax.eval_shape(layer.init, KEY, jnp.ones((1, 2, features)))["params"]


def stacked_attention():
    return {
        "query": {"kernel": jnp.ones((2, 8, 4, 3)), "bias": jnp.ones((2, 4, 3))},
        "out": {"kernel": jnp.ones((2, 4, 3, 8)), "bias": jnp.ones((2, 8))},
    }


class Network(nn.Module):
    """Layers as most networks have them."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x))
        x = nn.LayerNorm()(nn.Conv(4, (1, 4), use_bias=False)(x))
        x = nn.DenseGeneral((2, 3), axis=(-2, -1))(x)
        return nn.Dense(6)(nn.Dense(6)(x.reshape(*x.shape[:-2], -1)))


def network():
    return jax.eval_shape(Network().init, KEY, jnp.ones((1, 8, 8, 3)))["params"]


def equinox():
    def layers():
        return [
            eqx.nn.Conv1d(3, 4, 1, key=KEY),
            eqx.nn.Conv2d(4, 4, 1, key=KEY),
            eqx.nn.Conv2d(4, 8, 3, groups=4, key=KEY),
            eqx.nn.LayerNorm((8, 4)),
            eqx.nn.Linear(8, 8, key=KEY),
            eqx.nn.MultiheadAttention(4, 8, key=KEY),
        ]

    shapes = eqx.filter_eval_shape(layers)
    return eqx.filter(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))


def across(path, axes=1):
    first = "axis" if axes == 1 else f"{axes} axes"
    return warns(
        rf"^operator: layers are stacked along the first {first} of {path}.*, and groups of "
        rf".* go through all of them\. .* write stacked_axes={axes}, as in lats_optax\.groups"
    )


def stacked_beside_one():
    return {"stacked": scanned_experts(), "conv": network()["Conv_0"]}


CHANNELS = groups.output_channels()
WITHIN = groups.output_channels(stacked_axes=1)
CASES = [
    *(
        Case(
            f"channels across {what}, under {operator!r}",
            started(params, operator),
            across(*which),
        )
        for operator in (CHANNELS, groups.input_channels(), prox.Axes())
        for what, params, which in [
            ("a scan in Linen", scanned, (r"ScanBlock_0/Dense_0/kernel \[3, 4, 4\]",)),
            ("a scan without biases", lambda: scanned(False), ("ScanBlock_0/Dense_0/kernel",)),
            ("vmapped experts in nnx", experts, (r"kernel \[3, 6, 4\]",)),
            ("experts in a scan", scanned_experts, (r"kernel \[3, 5, 4, 6\]", 2)),
            ("attention within a scan", stacked_attention, ("out/kernel .*query/kernel",)),
            ("vmapped layers of Equinox", stacked_equinox, ("weight",)),
        ]
    ),
    Case(
        "channels across a scan, in a proximal step",
        lambda: proximal_step(0.1, operator=CHANNELS).init(experts()),
        across("kernel"),
    ),
    Case(
        "a convolution taken for a stack of layers",
        started(stacked_beside_one, groups.output_channels(stacked_axes=2)),
        warns(
            r"^operator: .*output_channels\(stacked_axes=2\) takes the first axes of conv/kernel "
            r"\[3, 3, 3, 4\] for a stack of layers, and the bias beside shows one layer"
        ),
    ),
    *(
        Case(
            f"no warning of {what}",
            started(params, operator),
            gives(lambda state: len(jax.tree.leaves(state.latent)) > 0),
        )
        for what, params, operator in [
            ("channels within experts", experts, WITHIN),
            ("channels within attention in a scan", stacked_attention, WITHIN),
            (
                "channels within experts in a scan",
                scanned_experts,
                groups.output_channels(stacked_axes=2),
            ),
            ("other axes", experts, prox.Axes(axes=-2)),
            ("blocks of stacked layers", scanned, groups.blocks(2, 2)),
            ("single weights of stacked layers", scanned, prox.prox_l1),
            ("channels of a network", network, CHANNELS),
            ("channels of attention", lambda: attention(8, 4), CHANNELS),
            ("channels of as many features as heads", lambda: attention(4, 4), CHANNELS),
            ("channels of modules of Equinox", equinox, groups.input_channels()),
        ]
    ),
]
