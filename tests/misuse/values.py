"""Arguments of the wrong kind, numbers in the wrong place, and trees that do not go together."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lats_optax
from lats_optax import (
    erdos_renyi,
    keep_support,
    lats_threshold,
    per_layer,
    pgh_threshold,
    proximal_step,
    prune_at_initialization,
    soft_threshold,
    support,
    target_sparsity,
    threshold_from_l1,
)
from lats_optax.prox import ElasticNet, prox_l1, prox_power
from tests.misuse import Case, gives, raises, warns

PARAMS = {"bias": jnp.zeros(3), "kernel": jnp.array([[0.1, -0.2, 0.3], [0.3, 0.2, -0.1]])}
RATE = optax.cosine_decay_schedule(0.1, 100)
TARGET = target_sparsity(0.5, 0.1, steps=10)


def init(threshold, **options):
    return soft_threshold(threshold, **options).init(PARAMS)


def step(tx, updates=PARAMS, state=None, params=PARAMS):
    return tx.update(updates, tx.init(PARAMS) if state is None else state, params)


def search(**changes):
    transform = optax.chain(optax.sgd(0.1), soft_threshold(TARGET))
    arguments = {
        "loss": lambda params, batch: jnp.sum((params["kernel"] - batch) ** 2),
        "params": PARAMS,
        "batches": itertools.repeat(PARAMS["kernel"]),
        "transform": transform,
        "steps": 10,
    }
    return prune_at_initialization(**(arguments | changes))


def after_the_fall(threshold):
    """The threshold after a step under which the schedule is negative."""
    tx = soft_threshold(threshold)
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update(PARAMS, state, PARAMS)
    return float(state.threshold)


TRANSFORMS = {
    "soft_threshold": soft_threshold(0.05),
    "proximal_step": proximal_step(0.05),
    "keep_support": keep_support(support),
}
SHORT = {"bias": jnp.zeros(3), "kernel": jnp.ones(3)}
NONE = {"bias": jnp.zeros(3), "kernel": None}


CASES = [
    # A number in the wrong place.
    Case(
        "a word for a threshold",
        lambda: soft_threshold("0.1"),
        raises(ValueError, r"^threshold: '0.1' is not allowed"),
    ),
    Case(
        "a sparsity for a threshold",
        lambda: init(0.95),
        warns(r"^threshold: 0\.95 is a magnitude .* above 0\.3; .*target_sparsity\(0\.95"),
    ),
    Case("percents for a threshold", lambda: init(95), warns("^threshold: 95 is a magnitude")),
    Case(
        "a sparsity for a threshold, known only to a program",
        lambda: jax.eval_shape(soft_threshold(0.95).init, PARAMS),
        gives(lambda state: state.latent["kernel"].shape == (2, 3)),
    ),
    Case("a threshold", lambda: init(0.25), gives(lambda state: state.threshold == 0.25)),
    Case(
        "a learning rate for a threshold",
        lambda: soft_threshold(RATE),
        warns(r"^threshold: it begins at 0\.1 and ends at 0, .*target_sparsity"),
    ),
    Case(
        "a learning rate with a warmup for a threshold",
        lambda: soft_threshold(optax.warmup_cosine_decay_schedule(0, 0.1, 10, 100)),
        warns(r"^threshold: it begins at 0 and ends at 0,"),
    ),
    Case(
        "a schedule of thresholds that rises",
        lambda: init(optax.linear_schedule(0.0, 0.2, 10)),
        gives(lambda state: state.threshold == 0),
    ),
    Case(
        "a schedule that falls below zero",
        lambda: after_the_fall(optax.linear_schedule(0.1, -0.1, 2)),
        warns("^threshold: it begins at 0.1 and ends at 0,", lambda value: value == 0),
    ),
    Case(
        "target and learning rate in each other's place",
        lambda: target_sparsity(RATE, 0.95, 100),
        raises(ValueError, "^target: it is a schedule, .*target, learning_rate, steps"),
    ),
    *(
        Case(
            f"a distribution for a threshold, {function.__qualname__}",
            lambda function=function: soft_threshold(function),
            raises(ValueError, r"^threshold: .* a sparsity; wrap it, .*\(target_sparsity\("),
        )
        for function in (erdos_renyi(0.95), per_layer({"": 0.95}))
    ),
    Case(
        "a target that is chained",
        lambda: optax.chain(optax.sgd(0.1), TARGET).init(PARAMS),
        raises(TypeError, r"^target_sparsity: .* wrap it, .* soft_threshold\(target_sparsity"),
    ),
    *(
        Case(
            f"a threshold that is chained, of {make.__name__}",
            lambda make=make, options=options: optax.chain(optax.sgd(0.1), make(**options)).init(
                PARAMS
            ),
            raises(
                TypeError,
                r"^threshold: ThresholdSchedule\(steps=10, 0 … 0\.1\) is a threshold and not a "
                r"transform; wrap it, as in optax\.chain\(optimizer, soft_threshold\(lats_",
            ),
        )
        for make, options in [
            (lats_threshold, {"learning_rate": 0.1, "steps": 10, "final": 0.1}),
            (lats_optax.s_lats_threshold, {"steps": 10, "final": 0.1}),
            (threshold_from_l1, {"l1": 0.1, "learning_rate": 0.1, "steps": 10}),
        ]
    ),
    # Arguments of another kind.
    *(
        Case(
            f"a learning rate that is {what}, in {name}",
            lambda rate=rate, make=make: make(rate),
            raises(ValueError, "^learning_rate: "),
        )
        for what, rate in {
            "a word": "x",
            "None": None,
            "an optimizer": optax.sgd(0.1),
            "a vector": jnp.ones(3),
            "a function that gives None": lambda count: None,
            "a function that makes a schedule": optax.cosine_decay_schedule,
            "near the largest float": 1e308,
        }.items()
        for name, make in {
            "lats_threshold": lambda rate: lats_threshold(rate, 10, 0.1),
            "target_sparsity": lambda rate: target_sparsity(0.9, rate, 10),
            "threshold_from_l1": lambda rate: threshold_from_l1(0.1, rate, 10),
        }.items()
    ),
    *(
        Case(
            f"{steps} steps, in {name}",
            lambda steps=steps, make=make: make(steps),
            raises(ValueError, rf"^steps: {steps} is not allowed; .* <= 100000000$"),
        )
        for steps in (10**12, 2**63, 2**64)
        for name, make in {
            "lats_threshold": lambda steps: lats_threshold(0.1, steps, 0.1),
            "s_lats_threshold": lambda steps: lats_optax.s_lats_threshold(steps, 0.1),
        }.items()
    ),
    Case(
        "a freeze beyond what can be counted",
        lambda: soft_threshold(0.1, freeze_after=2**40),
        raises(ValueError, "^freeze_after: .* <= 2147483647$"),
    ),
    *(
        Case(
            f"a profile that is {what}",
            lambda profile=profile: lats_threshold(1.0, 10, 0.1, l1=profile),
            raises(ValueError, "^l1: "),
        )
        for what, profile in {
            "a number": 3,
            "of words": lambda x: "x",
            "of another length": lambda x: np.ones(3),
            "too large to add up": lambda x: 1e308 + 0 * x,
        }.items()
    ),
    *(
        Case(
            f"a beta of {beta!r}",
            lambda beta=beta: pgh_threshold(10, 0.1, beta=beta),
            raises(ValueError, "^beta: .* is not allowed"),
        )
        for beta in ("x", None, 1e308)
    ),
    *(
        Case(
            f"an elastic net with {l2!r}",
            lambda l2=l2: ElasticNet(l2),
            raises(ValueError, "^l2: .* is not allowed; allowed are finite numbers >= 0"),
        )
        for l2 in ("x", None, math.nan)
    ),
    *(
        Case(
            f"an operator that is {what}",
            lambda operator=operator: init(0.1, operator=operator),
            raises(ValueError, "^operator: "),
        )
        for what, operator in {
            "a word": "l1",
            "a class": ElasticNet,
            "a function that makes one": prox_power,
        }.items()
    ),
    *(
        Case(
            f"an operator that adds up, in {make.__name__}",
            lambda make=make: make(0.1, operator=lambda x, d: jnp.sum(x)).init(PARAMS),
            raises(ValueError, r"^operator: .* for kernel, of shape \(2, 3\), its value is"),
        )
        for make in (soft_threshold, proximal_step)
    ),
    Case(
        "a dtype that there is not",
        lambda: soft_threshold(0.1, latent_dtype="float99"),
        raises(ValueError, "^latent_dtype: float99 is not allowed"),
    ),
    *(
        Case(
            f"an inner optimizer that is {type(inner).__name__}",
            lambda inner=inner: soft_threshold(0.1, inner=inner),
            raises(ValueError, r"^inner: .* is not allowed; allowed are transforms such as"),
        )
        for inner in ("sgd", optax.sgd, TARGET, lats_threshold(0.1, 10, 0.1))
    ),
    *(
        Case(
            f"a leaf that is {type(leaf).__name__}, in {name}",
            lambda act=act, leaf=leaf: act({"layer": {"kernel": leaf, "bias": jnp.ones(3)}}),
            raises(
                ValueError,
                "^params: at layer/kernel it is .*, a .*; allowed are arrays and numbers$",
            ),
        )
        for leaf in (
            "x",
            "float32",
            np.array(["x", "y"]),
            np.array([[None]]),
            object(),
            jax.nn.relu,
        )
        for name, act in {
            "soft_threshold": soft_threshold(0.1).init,
            "target_sparsity": soft_threshold(TARGET).init,
            "proximal_step": proximal_step(0.1).init,
            "keep_support": keep_support(True).init,
            "sparsity": lats_optax.sparsity,
            "support": support,
            "finalize": lambda params: lats_optax.finalize(params, ()),
            "freeze": lambda params: lats_optax.freeze((), optax.sgd(0.1), params),
        }.items()
    ),
    Case(
        "a word for weights",
        lambda: prox_l1("abc", 1),
        raises(TypeError, "^x: 'abc' is not allowed"),
    ),
    *(
        Case(
            f"a strength of {strength!r}",
            lambda strength=strength: prox_l1(jnp.ones(3), strength),
            raises(ValueError, "^strength: .* is not allowed; allowed are numbers >= 0"),
        )
        for strength in ("x", math.nan)
    ),
    # Early pruning.
    Case(
        "a search that goes on without a transform",
        lambda: lats_optax.freeze((), "x", PARAMS),
        raises(ValueError, "^frozen: 'x' is not allowed"),
    ),
    Case(
        "a search of another length than its target's",
        lambda: search(steps=5),
        raises(ValueError, "^steps: 5 is not allowed; .* is for 10 steps"),
    ),
    *(
        Case(
            f"a search with {what} for its {name}",
            lambda name=name, value=value: search(**{name: value}),
            raises(ValueError, f"^{name}: "),
        )
        for name, what, value in [
            ("loss", "a number", 3),
            ("loss", "a function to an array", lambda params, batch: params["kernel"]),
            ("loss", "a function to a pair", lambda params, batch: (1.0, 2.0)),
            ("params", "a word", "x"),
            ("batches", "a number", 3),
            ("batches", "words", ["x"] * 10),
            ("transform", "a function that makes one", optax.sgd),
        ]
    ),
    # Trees that do not go together.
    *(
        Case(
            f"gradients {what}, in {name}",
            lambda tx=tx, updates=updates: step(tx, updates),
            raises(ValueError, message),
        )
        for name, tx in TRANSFORMS.items()
        for what, updates, message in [
            ("that broadcast", SHORT, r"^updates: at kernel its shape is \(3,\), .* \(2, 3\)$"),
            ("that are None", NONE, "^updates: there is no array at kernel"),
            ("without a leaf", {"bias": jnp.zeros(3)}, "^updates: there is no array at kernel"),
            ("with one leaf more", PARAMS | {"more": jnp.ones(2)}, "^updates: at more"),
        ]
    ),
    Case(
        "no gradient of what is not pruned",
        lambda: step(soft_threshold(0.05), PARAMS | {"bias": None})[0]["bias"],
        gives(lambda update: update is None),
    ),
    *(
        Case(
            f"a foreign state, in {name}",
            lambda tx=tx: step(tx, state=optax.sgd(0.1).init(PARAMS)),
            raises(ValueError, "^state: tuple is not allowed; allowed is the .*State that init"),
        )
        for name, tx in TRANSFORMS.items()
    ),
    Case(
        "the state of other parameters",
        lambda: step(
            soft_threshold(0.05),
            state=soft_threshold(0.05).init(PARAMS | {"kernel": jnp.ones((2, 1))}),
        ),
        raises(ValueError, r"^state: at kernel its shape is \(2, 1\), .* \(2, 3\)$"),
    ),
]
