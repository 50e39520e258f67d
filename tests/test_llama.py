"""The decoder against its formulas: whole, in parts, and one token after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lats_optax.models import DecoderLayer, Llama, LlamaConfig, llama
from lats_optax.torch.hugging_face import params_from_hugging_face
from tests import matrix, tiny_llama

IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [60, 2, 2, 2, 8, 59, 0, 7]])
each_config = pytest.mark.parametrize("name", tiny_llama.CONFIGS)


def tiny(name="grouped"):
    """A config, its tensors and the parameters made of them."""
    config = tiny_llama.CONFIGS[name]
    tensors = tiny_llama.draw(config)
    return config, tensors, params_from_hugging_face(tensors, config)


def by_formulas(tensors, config, ids):
    return np.array([tiny_llama.logits(tensors, config, row) for row in ids])


def run(model, params):
    return jax.jit(model.apply)({"params": params}, jnp.asarray(IDS))


# --- numbers --------------------------------------------------------------------------------------


@each_config
def test_logits_are_those_of_the_formulas(name):
    config, tensors, params = tiny(name)
    with jax.enable_x64(True):
        found = run(Llama(config, jnp.float64), params)
    assert found.dtype == np.float64
    expected = by_formulas(tensors, config, IDS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.1)])
def test_dtype_is_that_of_the_computation(dtype, tolerance):
    config, tensors, params = tiny()
    model = Llama(config, dtype)
    found = run(model, params)
    hidden = jax.eval_shape(lambda: model.apply({"params": params}, IDS, method="embed"))
    assert (found.dtype, hidden.dtype) == (np.float32, dtype)
    expected = by_formulas(tensors, config, IDS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@each_config
def test_parameters_have_the_structure_that_the_model_makes(name):
    config, _, params = tiny(name)
    made = jax.eval_shape(Llama(config).init, jax.random.key(0), IDS)["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, made)
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {np.dtype(np.float32)}


@pytest.mark.slow
def test_rotation_turns_pairs_by_their_angles():
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(1, 5, 2, 6)), np.array([0, 1, 2, 40, 1000])
    pairs = x[..., :3] + 1j * x[..., 3:]
    turned = pairs * np.exp(1j * positions[:, None, None] * 50.0 ** (-np.arange(0, 6, 2) / 6))
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    with jax.enable_x64(True):
        found = llama.rotate(jnp.asarray(x), jnp.asarray(positions), 50.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_layers_run_alone_with_their_own_parameters():
    """Each part is given no parameters but its own, and all of them make the whole."""
    config, _, params = tiny()
    model, ids = Llama(config), jnp.asarray(IDS)
    embedding = {"embed_tokens": params["embed_tokens"]}
    x = model.apply({"params": embedding}, ids, method="embed")
    assert x.shape == (2, 8, 32)
    for i in range(config.num_hidden_layers):
        x = jax.jit(DecoderLayer(config).apply)({"params": params[f"layers_{i}"]}, x)
    ends = {**embedding, "norm": params["norm"]}
    found = model.apply({"params": ends}, x, method="head")
    whole = run(model, params)
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-6 * np.abs(whole).max())


@pytest.mark.slow
def test_losses_are_those_of_the_formulas():
    config, tensors, params = tiny("multi-head")
    expected = by_formulas(tensors, config, IDS)
    chances = np.exp(expected) / np.exp(expected).sum(-1, keepdims=True)
    expected = [[-np.log(chances[b, t, IDS[b, t + 1]]) for t in range(7)] for b in range(2)]
    logits = run(Llama(config), params)
    found = llama.next_token_losses(logits, jnp.asarray(IDS))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", matrix.fast([1, 5], [1]))
def test_generation_takes_the_likeliest_token(length):
    config, tensors, params = tiny()
    ids = IDS[:, :length]
    found = llama.generate(Llama(config), params, jnp.asarray(ids), new_tokens=6)
    expected = ids
    for _ in range(6):
        logits = by_formulas(tensors, config, expected)[:, -1]
        expected = np.concatenate([expected, logits.argmax(-1)[:, None]], axis=1)
    assert found.dtype == jnp.asarray(ids).dtype
    np.testing.assert_array_equal(found, expected)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; allowed: an integer of 1 or more"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0; allowed: an integer"),
        ({"hidden_size": True}, "hidden_size is True; allowed: an integer"),
        ({"head_dim": 7}, "head_dim is 7; allowed: an even number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; allowed: a divisor of num_att"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; allowed: a positive number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; allowed: a positive number"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is None; allowed: True or False"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_sizes_that_are_not_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_llama.without(tiny_llama.CONFIGS["grouped"], **changes)


@pytest.mark.parametrize(
    ("ids", "new_tokens", "message"),
    [
        (np.zeros((1, 2), np.float32), 1, r"ids are float32 of shape \(1, 2\); allowed: integers"),
        (np.zeros(2, np.int32), 1, r"ids are int32 of shape \(2,\); allowed: integers \(batch"),
        (np.zeros((1, 2), np.int32), 0, "new_tokens is 0; allowed: 1 or more"),
        (np.zeros((1, 0), np.int32), 3, r"the shape of ids is \(1, 0\); allowed: \(batch, length"),
    ],
)
def test_ids_that_are_not_allowed(ids, new_tokens, message):
    config, _, params = tiny("multi-head")
    with pytest.raises(ValueError, match=message):
        llama.generate(Llama(config), params, jnp.asarray(ids), new_tokens)


def test_a_config_is_a_part_of_a_static_argument():
    assert hash(Llama(LlamaConfig(**vars(tiny_llama.CONFIGS["grouped"])))) == hash(
        Llama(tiny_llama.CONFIGS["grouped"])
    )
