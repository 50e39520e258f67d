"""Functions whose MACs are hard to count, or cannot be counted."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import sparse
from jax.experimental.custom_partitioning import custom_partitioning

from lats_optax import MacsReport, count_macs
from tests.misuse import Case, gives, raises, warns

# 12 of its 48 entries are not zero, all of them in the left half.
W = jnp.zeros((6, 8)).at[:4, jnp.array([0, 1, 3])].set(1.0)
X = jax.ShapeDtypeStruct((2, 6), jnp.float32)


def product(w, x):
    return x @ w


def custom_vmap(w, x):
    fn = jax.custom_batching.custom_vmap(product)
    fn.def_vmap(lambda size, batched, w, x: (product(w, x), True))
    return fn(w, x)


def partitioned(w, x):
    fn = custom_partitioning(product)
    fn.def_partition(
        partition=lambda *args: None,
        infer_sharding_from_operands=lambda *args: None,
        sharding_rule="i j, k i -> k j",
    )
    return fn(w, x)


def on_the_host(w, x):
    return jax.pure_callback(product, jax.ShapeDtypeStruct((2, 8), x.dtype), w, x)


def sum_and_product(w, x):
    def both(a, b):
        return a[0] + b[0], a[1] * b[1]

    return lax.reduce((w, w), (0.0, 1.0), both, (0,)), x @ w


def counts(dense, effective, other=0):
    def check(report: MacsReport):
        return (report.dense - report.other, report.effective - report.other, report.other) == (
            dense,
            effective,
            other,
        )

    return check


STORED = sparse.BCOO.fromdense(W, nse=20)  # and 8 zeros that fill it up
BATCH = sparse.BCOO.fromdense(jnp.stack([W, W, W]), nse=20, n_batch=1)


def batched(w, x):
    numbers = (((2,), (1,)), ((0,), (0,)))
    return sparse.bcoo_dot_general(w, jnp.ones((3, 8, 5)), dimension_numbers=numbers), x


CASES = [
    Case(
        "a product within custom_vmap",
        lambda: count_macs(custom_vmap, W, X),
        gives(counts(96, 24)),
    ),
    Case(
        "a product within sequential_vmap, batched",
        lambda: count_macs(
            jax.vmap(jax.custom_batching.sequential_vmap(product), (None, 0)),
            W,
            jax.ShapeDtypeStruct((5, 2, 6), jnp.float32),
        ),
        gives(counts(5 * 96, 5 * 24)),
    ),
    Case(
        "a product within custom_partitioning",
        lambda: count_macs(partitioned, W, X),
        gives(counts(96, 24)),
    ),
    Case(
        "a product within a callback",
        lambda: count_macs(on_the_host, W, X),
        warns("^fn: not counted are pure_callback,", counts(0, 0)),
    ),
    Case(
        "a factorization",
        lambda: count_macs(lambda w, x: x @ jnp.linalg.qr(w)[0], W, X),
        warns("^fn: not counted are qr,", counts(72, 72)),
    ),
    Case(
        "a BCOO parameter",
        lambda: count_macs(lambda w, x: x @ w, STORED, X),
        gives(counts(40, 24)),
    ),
    Case(
        "a BCOO parameter with a batch of its own",
        lambda: count_macs(batched, BATCH, X),
        gives(counts(3 * 20 * 5, 3 * 12 * 5)),
    ),
    Case(
        "a BCSR parameter",
        lambda: count_macs(lambda w, x: w @ x.T, sparse.BCSR.from_bcoo(STORED.T.sort_indices()), X),
        gives(lambda report: report.dense == 40),
    ),
    Case(
        "a product of two BCOO arrays",
        lambda: count_macs(lambda w, x: (w @ w.T, x), STORED, X),
        warns("^fn: not counted are bcoo_spdot_general,"),
    ),
    Case(
        "half of a split weight",
        lambda: count_macs(lambda w, x: x @ jnp.split(w, 2, 1)[0], W, X),
        gives(counts(48, 24)),
    ),
    Case(
        "a tiled weight",
        lambda: count_macs(lambda w, x: x @ jnp.tile(w, (1, 3)), W, X),
        gives(counts(288, 72)),
    ),
    *(
        Case(
            f"a {what} weight",
            lambda make=make: count_macs(lambda w, x: x @ make(w), W, X),
            gives(counts(*expected)),
        )
        for what, make, expected in [
            # Columns 0, 1 and 3 of four rows are not zero: the mask leaves two of them.
            ("masked", lambda w: jnp.where(jnp.arange(8) < 2, w, 0), (96, 16)),
            ("padded", lambda w: jnp.pad(w, ((0, 0), (0, 4))), (144, 24)),
        ]
    ),
    Case(
        "a reduction of several arrays",
        lambda: count_macs(sum_and_product, W, X),
        gives(counts(96, 24)),
    ),
    Case(
        "no function",
        lambda: count_macs(None),
        raises(TypeError, "^fn: None is not allowed; allowed are functions"),
    ),
]
