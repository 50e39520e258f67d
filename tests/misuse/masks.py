"""Which parameters are pruned, how they are named and counted."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

import lats_optax
from lats_optax import distributions, groups, masks, prox
from tests.misuse import Case, gives, raises

MATRIX = jnp.ones((2, 2))
STACK = jnp.ones((3, 16))
COLLIDING = {"a/b": MATRIX, "a": {"b": MATRIX}}
KEYS = jax.random.split(jax.random.key(0), (2, 3))
KERNELS = ["key/kernel", "out/kernel", "query/kernel", "value/kernel"]


def pruned(params):
    """The paths that the default mask selects."""
    chosen = zip(jax.tree.leaves(masks.paths(params)), jax.tree.leaves(lats_optax.prunable(params)))
    return [path for path, keep in chosen if keep]


def report(params, mask=lats_optax.prunable):
    """The lines of the table that say what is not pruned."""
    lines = str(lats_optax.sparsity(params, mask)).split("\n")
    return [line for line in lines if line.startswith("not pruned")]


def stacked_linen():
    """Two blocks in one scan, a leading axis on each of their arrays."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(4)(nn.LayerNorm()(x)), None

    scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    return scanned().init(jax.random.key(0), jnp.ones((1, 4)), None)["params"]


class Table(eqx.Module):
    """Modules of Equinox whose arrays are all called `weight`."""

    first: eqx.nn.Embedding
    second: eqx.nn.LayerNorm
    third: eqx.nn.Conv2d


def equinox_modules():
    key = jax.random.key(0)
    conv = eqx.nn.Conv2d(2, 4, 3, key=key)
    table = Table(eqx.nn.Embedding(5, 4, key=key), eqx.nn.LayerNorm((4, 4)), conv)
    return eqx.filter(table, eqx.is_array)


def nnx_with_dropout():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    return nnx.state(Model(nnx.Rngs(0)))


def after_a_step(params, transform):
    """Parameters that are floats of Python, after one update of -0.1 each."""
    updates = jax.tree.map(lambda _: -0.1, params)
    updates, state = transform.update(updates, transform.init(params), params)
    return optax.apply_updates(params, updates), state


def finalized_floats():
    params, state = after_a_step({"a": 2.0, "b": 0.05}, lats_optax.soft_threshold(0.2, mask=True))
    return lats_optax.finalize(jax.tree.map(float, params), state)


CASES = [
    Case(
        "biases of attention heads have two dimensions",
        lambda: pruned(nnx.state(nnx.MultiHeadAttention(4, 16, rngs=nnx.Rngs(0)), nnx.Param)),
        gives(lambda paths: paths == KERNELS),
    ),
    Case(
        "the same in Linen",
        lambda: pruned(
            nn.MultiHeadDotProductAttention(4).init(jax.random.key(0), jnp.ones((1, 2, 16)))[
                "params"
            ]
        ),
        gives(lambda paths: paths == KERNELS),
    ),
    Case(
        "layers that Linen stacks for a scan",
        lambda: pruned(stacked_linen()),
        gives(lambda paths: paths == ["Dense_0/kernel"]),
    ),
    Case(
        "layers that vmap stacks in nnx",
        lambda: pruned(
            nnx.state(
                nnx.vmap(lambda rngs: nnx.LayerNorm(4, rngs=rngs))(nnx.Rngs(0).split(3)),
                nnx.Param,
            )
        ),
        gives(lambda paths: paths == []),
    ),
    Case(
        "modules of Equinox that call everything weight",
        lambda: pruned(equinox_modules()),
        gives(lambda paths: paths == ["third/weight"]),
    ),
    Case(
        "stacked modules of Haiku",
        lambda: pruned(
            {
                "mlp/~/linear_0": {"w": jnp.ones((3, 4, 16)), "b": STACK},
                "layer_norm": {"scale": STACK, "offset": STACK},
                "embed": {"embeddings": STACK},
            }
        ),
        gives(lambda paths: paths == ["mlp/~/linear_0/w"]),
    ),
    Case(
        "what is added or scales by other names",
        lambda: pruned(
            dict.fromkeys(
                [
                    "pos_embedding",
                    "position",
                    "cls",
                    "gamma",
                    "beta",
                    "wte/weight",
                    "norms/0/g",
                    "in_proj_bias",
                    "ln_1/weight",
                    "layer_instance/kernel/scale",
                    "B",
                    "W",
                ],
                STACK,
            )
        ),
        gives(lambda paths: paths == ["W"]),
    ),
    Case(
        "plain names of a user's own arrays",
        lambda: pruned(dict.fromkeys(["a", "b", "lora_b", "posterior", "member", "normal"], STACK)),
        gives(lambda paths: len(paths) == 6),
    ),
    Case(
        "a projection named after what it makes",
        lambda: pruned(dict.fromkeys(["embedding/kernel", "patch_embed/weight"], STACK)),
        gives(lambda paths: len(paths) == 2),
    ),
    Case(
        "an embedding is pruned on demand",
        lambda: lats_optax.select("embedding")({"embedding": STACK, "bias": STACK}),
        gives(lambda mask: mask == {"embedding": True, "bias": False}),
    ),
    Case(
        "exclusion begins at the default mask",
        lambda: lats_optax.select(exclude="^head")({"head": MATRIX, "body": MATRIX, "bias": STACK}),
        gives(lambda mask: mask == {"head": False, "body": True, "bias": False}),
    ),
    Case(
        "the table says what is left out, and why",
        lambda: report({"kernel": STACK, "q": {"bias": STACK}, "k": {"bias": STACK}, "cls": STACK}),
        gives(
            lambda lines: (
                lines
                == ["not pruned (token): cls 3×16", "not pruned (bias): k/bias 3×16, q/bias 3×16"]
            )
        ),
    ),
    Case(
        "the table says what a mask leaves out",
        lambda: report({"a": MATRIX, "b": MATRIX, "c": jnp.ones(2)}, lats_optax.select("a")),
        gives(lambda lines: lines == ["not pruned (mask): b 2×2"]),
    ),
    Case(
        "the table of many biases stays short",
        lambda: report({"kernel": MATRIX, **{f"bias_{i}": MATRIX for i in range(9)}}),
        gives(lambda lines: len(lines) == 1 and lines[0].endswith("bias_3 2×2 and 5 others")),
    ),
    Case(
        "a Partial as a mask",
        lambda: (
            lats_optax.sparsity(
                {"a": MATRIX}, jax.tree_util.Partial(lambda keep, p: {"a": keep}, True)
            ).size
        ),
        gives(lambda size: size == 4),
    ),
    Case(
        "a Partial without arguments as a mask of the transform",
        lambda: (
            lats_optax.soft_threshold(0.5, mask=jax.tree_util.Partial(lats_optax.prunable))
            .init({"a": MATRIX})
            .latent["a"]
        ),
        gives(lambda latent: latent.shape == (2, 2)),
    ),
    Case(
        "functions in the place of bools",
        lambda: lats_optax.sparsity({"a": MATRIX}, {"a": lats_optax.prunable}),
        raises(ValueError, r"^mask: it holds <function prunable"),
    ),
    Case(
        "two leaves of one path in a transform",
        lambda: lats_optax.soft_threshold(0.5).init(COLLIDING),
        raises(ValueError, r"^params: a/b is the path of two leaves, .*\['a'\]\['b'\].*\['a/b'\]"),
    ),
    Case(
        "two leaves of one path in a count",
        lambda: lats_optax.sparsity(COLLIDING),
        raises(ValueError, r"^params: a/b is the path of two leaves"),
    ),
    Case(
        "two leaves of one path at the end",
        lambda: lats_optax.finalize(
            COLLIDING,
            lats_optax.soft_threshold(0.5).init({"a/b": MATRIX}),
        ),
        raises(ValueError, r"^params: a/b is the path of two leaves"),
    ),
    Case(
        "the keys of dropout among the state",
        lambda: lats_optax.sparsity(nnx_with_dropout()),
        gives(lambda found: found.size == 16 and found.total_size == 21),
    ),
    Case(
        "keys of several dimensions hold no weights",
        lambda: lats_optax.sparsity({"a": MATRIX, "keys": KEYS}),
        gives(lambda found: (found.size, found.total_size) == (4, 4)),
    ),
    Case(
        "per_layer of nothing",
        lambda: distributions.per_layer(None),
        raises(ValueError, r"^sparsities: None is not allowed"),
    ),
    Case(
        "per_layer of no expression",
        lambda: distributions.per_layer({}),
        raises(ValueError, r"^sparsities: \{\} is not allowed"),
    ),
    Case(
        "per_layer by numbers",
        lambda: distributions.per_layer({3: 0.5}),
        raises(ValueError, r"^sparsities: 3 is not allowed; allowed are .*regular expression"),
    ),
    Case(
        "select by a number",
        lambda: lats_optax.select(3),
        raises(ValueError, r"^include: 3 is not allowed"),
    ),
    Case(
        "select by bytes",
        lambda: lats_optax.select([b"kernel"]),
        raises(ValueError, r"^include: b'kernel' is not allowed"),
    ),
    *(
        Case(
            f"{argument} by bytes alone",
            lambda argument=argument: lats_optax.select(**{argument: b"a"}),
            raises(ValueError, rf"^{argument}: b'a' is not allowed; allowed are .*, a str, or sev"),
        )
        for argument in ("include", "exclude")
    ),
    Case(
        "select excludes nothing by None",
        lambda: lats_optax.select(exclude=None),
        raises(ValueError, r"^exclude: None is not allowed"),
    ),
    Case(
        "the sparsity of a word",
        lambda: lats_optax.sparsity("x"),
        raises(ValueError, r"^params: .*'x', a str; allowed are arrays"),
    ),
    Case(
        "a leaf that is no array",
        lambda: lats_optax.sparsity({"a": MATRIX, "b": object()}),
        raises(ValueError, r"^params: at b it is <object"),
    ),
    Case(
        "groups of an operator that has none",
        lambda: lats_optax.sparsity({"a": MATRIX}, groups=prox.prox_l1),
        raises(ValueError, r"^groups: SoftThreshold\(\) is not allowed"),
    ),
    Case(
        "groups by a factory that was not called",
        lambda: lats_optax.sparsity({"a": MATRIX}, groups=groups.output_channels),
        raises(ValueError, r"^groups: <function output_channels.* is not allowed"),
    ),
    Case(
        "floats of Python as parameters",
        finalized_floats,
        gives(lambda w: jax.tree.map(lambda x: round(float(x), 6), w) == {"a": 1.9, "b": 0.0}),
    ),
    Case(
        "floats of Python in a proximal step",
        lambda: after_a_step({"a": 2.0}, lats_optax.proximal_step(0.2, mask=True))[0],
        gives(lambda w: round(float(w["a"]), 6) == 1.7),
    ),
    Case(
        "a name that cannot be encoded",
        lambda: str(lats_optax.sparsity({"\ud800": MATRIX})).encode(),
        gives(lambda table: rb"\ud800" in table),
    ),
]
