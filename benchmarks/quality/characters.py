"""The problem of `lats_optax.examples.char_transformer`: its model, text and batches in a scan."""

from functools import cache
from pydoc_data.topics import topics
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from benchmarks.quality.training import Problem
from lats_optax.examples.char_transformer import BATCH, CONTEXT, PRUNED, Transformer, bits

STEPS, CHUNKS = 1500, 5


@cache
def read_topics(split: str) -> tuple[int, np.ndarray, np.ndarray]:
    """The size of the alphabet, and int32 texts: to train on, and held out.

    Of every ten topics the first is the test text. The sixth is the validation text: it is trained
    on only where the test text is scored.
    """
    alphabet = sorted(set("".join(topics.values())))
    index = {character: i for i, character in enumerate(alphabet)}
    encoded = [np.array([index[c] for c in topics[name]], np.int32) for name in sorted(topics)]
    held_out = 5 if split == "validation" else 0
    training = [text for i, text in enumerate(encoded) if i % 10 not in (0, held_out)]
    return len(alphabet), np.concatenate(training), np.concatenate(encoded[held_out::10])


def language_model(split: str) -> Problem:
    """Bits per character on the test or the validation topics."""
    characters, training, held_out = read_topics(split)
    windows = np.lib.stride_tricks.sliding_window_view(held_out, CONTEXT + 1)[::CONTEXT]
    data = {"text": jnp.asarray(training), "held_out": jnp.asarray(windows)}
    graph = nnx.graphdef(nnx.eval_shape(lambda: Transformer(characters, rngs=nnx.Rngs(0))))

    def init(seed: int) -> tuple[Any, Any]:
        model = Transformer(characters, rngs=nnx.Rngs(seed))
        flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
        return {"/".join(map(str, path)): leaf[...] for path, leaf in flat}, {}

    def model(params: Any) -> Transformer:
        # The names sort as their paths do: a scan carries them as a flat dictionary.
        state = nnx.state(nnx.eval_shape(lambda: Transformer(characters, rngs=nnx.Rngs(0))))
        flat = [
            (path, leaf.replace(params["/".join(map(str, path))]))
            for path, leaf in nnx.to_flat_state(state)
        ]
        return nnx.merge(graph, nnx.from_flat_state(flat))

    def loss(params: Any, stats: Any, data: Any, rows: Array) -> tuple[Array, Any]:
        windows = data["text"][rows[:, None] + jnp.arange(CONTEXT + 1)]
        return bits(model(params), windows), stats

    def score(params: Any, stats: Any, data: Any) -> Array:
        del stats
        return bits(model(params), data["held_out"])

    def rows(seed: int) -> np.ndarray:
        drawn = np.random.default_rng(seed).integers(len(training) - CONTEXT, size=(STEPS, BATCH))
        return drawn.astype(np.int32)

    return Problem(data, init, loss, score, rows, PRUNED, STEPS, CHUNKS)
