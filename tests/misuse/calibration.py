"""One-shot pruning: batches, functions and targets that cannot be."""

import jax.numpy as jnp
import numpy as np

from lats_optax import erdos_renyi, masks, per_layer
from lats_optax.calibration import calibrate, prune_with, sequential
from tests.misuse import Case, gives, raises

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(20, 6)).astype(np.float32)
PARAMS = {"a": RANDOM.normal(size=(6, 9)).astype(np.float32), "b": jnp.ones((9, 4))}


def fn(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def calibrated(batches, **options):
    return lambda: calibrate(fn, PARAMS, batches, **options)


def pruned(*args, params=PARAMS, largest=8192, **options):
    return lambda: prune_with(calibrate(fn, PARAMS, [X], largest=largest), params, *args, **options)


def broken(x, at):
    return np.where(np.arange(len(x))[:, None] == at, np.nan, x).astype(np.float32)


def after_a_function(function):
    return lambda: calibrate(function, PARAMS, [X])


CASES = [
    # --- batches ------------------------------------------------------------------------------
    Case("no batches", calibrated([]), raises(ValueError, r"^batches: there are none; allowed")),
    Case(
        "one batch instead of a list of them",
        calibrated(X),
        raises(ValueError, r"^batches: ndarray is not allowed; allowed are iterables of batches"),
    ),
    Case(
        "a dict for a list of them",
        calibrated({"x": X}),
        raises(ValueError, r"^batches: dict is not allowed"),
    ),
    Case(
        "a batch of words",
        calibrated([{"x": "words"}]),
        raises(ValueError, r"^batches: in batch 1: at x it is 'words', a str"),
    ),
    Case(
        "inputs of another width",
        calibrated([X[:, :5]]),
        raises(ValueError, r"^batches: fn does not take batch 1, of float32\[20, 5\]: TypeError: "),
    ),
    Case(
        "a later batch of another width",
        calibrated([X, X[:, :5]]),
        raises(ValueError, r"^batches: fn does not take batch 2, of float32\[20, 5\]"),
    ),
    Case(
        "a later batch of another number of axes",
        calibrated([X, X[0]]),
        raises(
            ValueError,
            r"^batches: batch 2 has float32\[6\], and the first one float32\[20, 6\]; allowed are",
        ),
    ),
    Case(
        "a later batch of another type",
        calibrated([X, X.astype(np.float16)]),
        raises(ValueError, r"^batches: batch 2 has float16\[20, 6\], and the first one float32"),
    ),
    Case(
        "a later batch of another structure",
        calibrated([X, [X, X]]),
        raises(ValueError, r"^batches: batch 2 has float32\[20, 6\], float32\[20, 6\], and the"),
    ),
    Case(
        "a later batch that takes another way",
        lambda: calibrate(
            lambda p, x: x @ p["a"] if len(x) > 5 else x.T @ p["b"][: len(x)], PARAMS, [X, X[:5]]
        ),
        raises(ValueError, r"^batches: batch 2 is multiplied with other parameters"),
    ),
    Case("a smaller last batch", calibrated([X, X[:5]]), gives(lambda grams: grams.batches == 2)),
    Case(
        "a batch that is not finite",
        calibrated([X, broken(X, 3), X]),
        raises(
            ValueError,
            r"^batches: in batch 2 the activations that a is multiplied with are not finite",
        ),
    ),
    Case(
        "activations whose squares are too large",
        calibrated([X, 1e25 * X]),
        raises(ValueError, r"^batches: in batch 2 .* or their squares are not in float32"),
    ),
    # --- functions and masks ------------------------------------------------------------------
    Case(
        "what is no function",
        lambda: calibrate("fn", PARAMS, [X]),
        raises(TypeError, r"^fn: 'fn' is not allowed; allowed are functions"),
    ),
    Case(
        "a function that multiplies nothing",
        after_a_function(lambda p, x: x + p["a"].sum()),
        raises(ValueError, r"^fn: it multiplies activations with none of a, b$"),
    ),
    Case(
        "a function of which no product can be followed",
        after_a_function(lambda p, x: x @ jnp.tanh(p["a"])),
        raises(ValueError, r"^fn: it .* none of a, b; a tanh stands before its product$"),
    ),
    Case(
        "a mask that selects nothing",
        calibrated([X], mask={"a": False, "b": False}),
        raises(ValueError, r"^mask: it selects none of a, b$"),
    ),
    Case(
        "a mask that matches nothing",
        calibrated([X], mask=masks.select("kernel")),
        raises(ValueError, r"^include: the expression 'kernel' matches no parameter"),
    ),
    Case(
        "a limit of no inputs",
        calibrated([X], largest=0),
        raises(ValueError, r"^largest: 0 is not allowed; allowed are whole numbers >= 1"),
    ),
    Case(
        "a parameter used twice, and one never",
        after_a_function(lambda p, x: x @ p["a"] @ p["a"].T),
        gives(
            lambda grams: (
                "a: in 2 products, along different axes" in str(grams)
                and "not calibrated: b: in no product" in str(grams)
            )
        ),
    ),
    # --- targets ------------------------------------------------------------------------------
    Case(
        "neither a sparsity nor a pattern",
        pruned(),
        raises(ValueError, r"^sparsity: it is None, and so is pattern; allowed is one"),
    ),
    Case(
        "both of them",
        pruned(0.5, pattern=(1, 3)),
        raises(ValueError, r"^sparsity: 0\.5 beside a pattern; allowed is one of the two"),
    ),
    Case(
        "a sparsity in per cent",
        pruned(50),
        raises(ValueError, r"^sparsity: 50 is not allowed; allowed are numbers in \[0, 1\)"),
    ),
    Case(
        "a pattern that does not divide",
        pruned(pattern=(2, 4)),
        raises(ValueError, r"^pattern: 4 does not divide the 6 inputs of a; leave it out"),
    ),
    Case(
        "a pattern of one number",
        pruned(pattern=4),
        raises(ValueError, r"^pattern: 4 is not allowed; allowed are pairs \(n, m\)"),
    ),
    Case(
        "more of m than there are",
        pruned(pattern=(4, 3)),
        raises(ValueError, r"^pattern: 4 of 3 is not allowed; allowed is n <= m"),
    ),
    Case(
        "none of m",
        pruned(pattern=(0, 3)),
        raises(ValueError, r"^pattern: n: 0 is not allowed; allowed are whole numbers >= 1"),
    ),
    Case(
        "an unknown method",
        pruned(0.5, method="obs"),
        raises(ValueError, r"^method: 'obs' is not allowed; allowed are lasso, lats, magnitude"),
    ),
    Case(
        "an unknown budget",
        pruned(0.5, budget="row"),
        raises(ValueError, r"^budget: 'row' is not allowed; allowed are global, layer, output"),
    ),
    Case(
        "a budget for a pattern",
        pruned(pattern=(1, 3), budget="layer"),
        raises(ValueError, r"^budget: 'layer' has no meaning under a pattern"),
    ),
    Case(
        "a sparsity for each layer, and one bound for all",
        pruned(erdos_renyi(0.5), budget="global"),
        raises(ValueError, r"^budget: 'global' takes one number for all"),
    ),
    Case(
        "an expression that matches no layer",
        pruned(per_layer({"c": 0.5, "": 0.1})),
        raises(ValueError, r"^sparsities: the expression 'c' matches no"),
    ),
    Case(
        "SparseGPT by diagonals",
        pruned(0.5, method="sparsegpt", largest=1),
        raises(ValueError, r"^method: 'sparsegpt' needs more than the diagonal .* of a; allowed"),
    ),
    Case(
        "other parameters than those calibrated",
        pruned(0.5, params=PARAMS | {"b": jnp.ones((9, 5))}),
        raises(
            ValueError,
            r"^params: they are not those .* calibrated: b: \(9, 5\), calibrated as \(9, 4\)",
        ),
    ),
    Case(
        "no Gram matrices",
        lambda: prune_with(None, PARAMS, 0.5),
        raises(TypeError, r"^grams: None is not allowed; allowed is what calibrate gives"),
    ),
    Case(
        "a singular Gram matrix",
        lambda: prune_with(calibrate(fn, PARAMS, [X[:3]]), PARAMS, 0.5),
        gives(
            lambda pruned: (
                "singular: 3 samples, so it is damped" in str(pruned.report)
                and np.isfinite(pruned.params["a"]).all()
            )
        ),
    ),
    Case(
        "more blocks than parameters",
        lambda: sequential([fn, fn], [PARAMS], [X], 0.5),
        raises(ValueError, r"^blocks: 2 functions for 1 blocks' parameters; allowed are as many"),
    ),
    Case(
        "no blocks",
        lambda: sequential(fn, [], [X], 0.5),
        raises(ValueError, r"^blocks: 0 functions for 0 blocks' parameters"),
    ),
]
