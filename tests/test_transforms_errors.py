"""What the transforms refuse, and what they say then."""

import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lats_optax
from lats_optax import keep_support, proximal_step, select, soft_threshold, target_sparsity

PARAMS = {
    "dense": {"bias": jnp.zeros(3), "kernel": jnp.ones((2, 3))},
    "steps": jnp.ones((2, 2), int),
}
FLOATS = {"dense": PARAMS["dense"]}


def unknown(x, strength):
    return jnp.where(abs(x) < strength, 0, x)


@pytest.mark.parametrize("make", [soft_threshold, proximal_step])
@pytest.mark.parametrize(
    "value",
    [
        -1,
        -1e-30,
        float("nan"),
        float("inf"),
        np.float32("nan"),
        jnp.array(-1.0),
        jnp.ones(3),
        [0.1],
        "0.1",
        None,
        True,
        1j,
        optax.sgd(0.1),
        lambda count: -0.1,
        lambda count: float("nan"),
        lambda count: jnp.ones(2),
        lambda count: None,
    ],
    ids=lambda value: type(value).__name__,
)
def test_thresholds_and_strengths(make, value):
    name = "threshold" if make is soft_threshold else "strength"
    with pytest.raises(ValueError, match=f"^{name}: .* is not allowed; allowed are finite numbers"):
        make(value)


@pytest.mark.parametrize("value", [0, -1, 2.5, float("nan"), float("inf"), "3", True, [3]], ids=str)
def test_freeze_after(value):
    with pytest.raises(ValueError, match=r"^freeze_after: .* allowed are whole numbers >= 1$"):
        soft_threshold(0.1, freeze_after=value)


@pytest.mark.parametrize(
    ("threshold", "freeze_after", "allowed"),
    [
        (
            target_sparsity(0.9, 0.1, 100),
            150,
            "allowed are whole numbers from 50, where the target is reached, to 100",
        ),
        (
            target_sparsity(0.9, 0.1, 100),
            49,
            "allowed are whole numbers from 50, where the target is reached, to 100",
        ),
        (lats_optax.lats_threshold(0.1, 100, 0.5), 101, "allowed are whole numbers up to 100,"),
        (lats_optax.pgh_threshold(100, 0.5, 0.1), 150, "allowed are whole numbers up to 100,"),
    ],
)
def test_a_freeze_outside_of_the_run(threshold, freeze_after, allowed):
    with pytest.raises(
        ValueError, match=f"^freeze_after: {freeze_after} is not allowed; {allowed}"
    ):
        soft_threshold(threshold, freeze_after=freeze_after)


@pytest.mark.parametrize(
    ("threshold", "freeze_after"),
    [
        (target_sparsity(0.9, 0.1, 100), 100),
        (target_sparsity(0.9, 0.1, 100), 50),
        (lats_optax.lats_threshold(0.1, 100, 0.5), 100),
        (lats_optax.lats_threshold(0.1, 100, 0.5), 50),
        (optax.linear_schedule(0.0, 0.5, 100), 150),
        (0.5, 150),
    ],
)
def test_a_freeze_within_the_run_or_one_of_unknown_length(threshold, freeze_after):
    soft_threshold(threshold, freeze_after=freeze_after)


@pytest.mark.parametrize(
    "value", [int, jnp.int8, "int32", bool, jnp.complex64, jnp.float8_e4m3fn, "float99"], ids=str
)
def test_latent_dtype(value):
    with pytest.raises(ValueError, match=r"^latent_dtype: .* is not allowed; .* of 16 bits"):
        soft_threshold(0.1, latent_dtype=value)


def test_a_closed_loop_needs_the_magnitude():
    with pytest.raises(ValueError, match=r"^operator: .*unknown.*plain function"):
        soft_threshold(target_sparsity(0.5, 0.1, 10), operator=unknown)
    soft_threshold(0.1, operator=unknown)


@pytest.mark.parametrize("make", [soft_threshold, proximal_step])
@pytest.mark.parametrize(
    ("mask", "params", "message"),
    [
        ({"dense": {"kernel": True}}, FLOATS, "structure"),
        ([True], FLOATS, "structure"),
        (lambda params: None, FLOATS, "structure"),
        ({"dense": {"kernel": 1, "bias": 0}}, FLOATS, "holds"),
        ({"dense": {"kernel": "yes", "bias": "no"}}, FLOATS, "holds 'no'"),
        ({"dense": {"kernel": jnp.ones((2, 3), bool), "bias": False}}, FLOATS, "holds"),
        (None, PARAMS, "it selects steps, which is int32; only float parameters"),
        (True, {"spectrum": jnp.ones(2, complex)}, "selects spectrum, which is complex64"),
        (True, {"alive": jnp.ones(2, bool)}, "selects alive, which is bool"),
    ],
)
def test_masks(make, mask, params, message):
    with pytest.raises(ValueError, match=f"^mask: .*{message}"):
        make(0.1, mask=mask).init(params)


def test_an_expression_without_a_match_lists_the_paths():
    tx = optax.chain(optax.sgd(0.1), soft_threshold(0.1, mask=select("kernal$")))
    with pytest.raises(ValueError, match=r"'kernal\$' matches no .* dense/bias, dense/kernel$"):
        tx.init(FLOATS)


@pytest.mark.parametrize("make", [soft_threshold, proximal_step])
@pytest.mark.parametrize(
    ("params", "names"),
    [({"scale": jnp.ones(3), "bias": jnp.ones(3)}, "bias, scale"), (jnp.ones(3), "params")],
)
def test_a_mask_that_selects_nothing_warns(make, params, names):
    with pytest.warns(UserWarning, match=f"nothing is pruned: the mask selects none of {names}$"):
        make(0.1).init(params)


def test_no_parameters_at_all_are_fine():
    for tx in (soft_threshold(0.1), proximal_step(0.1), keep_support({})):
        assert tx.update({}, tx.init({}), {})[0] == {}


@pytest.mark.parametrize(
    ("support", "message"),
    [
        ({"kernel": True}, "its structure"),
        (
            {"dense": {"bias": True, "kernel": jnp.ones((3, 2), bool)}},
            r"at dense/kernel .*\[3, 2\]",
        ),
        ({"dense": {"bias": True, "kernel": jnp.ones(3, bool)}}, r"bool\[3\]; .* bool\[2, 3\]"),
        ({"dense": {"bias": True, "kernel": jnp.ones((2, 3))}}, r"at dense/kernel it is float32"),
        ({"dense": {"bias": 1, "kernel": True}}, r"at dense/bias it is int32\[\]"),
    ],
)
def test_supports(support, message):
    with pytest.raises(ValueError, match=f"^support: .*{message}"):
        keep_support(support).init(FLOATS)


@pytest.mark.parametrize(
    "tx", [soft_threshold(0.1), proximal_step(0.1), keep_support(lats_optax.support(FLOATS))]
)
def test_update_without_params_says_what_to_pass(tx):
    state = tx.init(FLOATS)
    with pytest.raises(ValueError, match=re.escape("call update(updates, state, params)")):
        tx.update(FLOATS, state)
