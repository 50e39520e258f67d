"""The decoder of Llama-like language models, whole and in parts, and greedy generation.

Here belongs the architecture. How its weights lie in files is in `torch/llama_weights.py`; the
files are in `torch/hugging_face.py` and `torch/gguf.py`, text in `torch/tokenizer.py`.

Every module works on its own part of the parameters, so that a program can go through the decoder
layer by layer and hold one layer at a time::

    hidden = model.apply({"params": params}, ids, method="embed")     # (batch, length, hidden_size)
    for i in range(config.num_hidden_layers):
        hidden = DecoderLayer(config).apply({"params": params[f"layers_{i}"]}, hidden)
    logits = model.apply({"params": params}, hidden, method="head")   # (batch, length, vocab_size)

Kernels are those of plain `flax.linen.Dense`, (inputs, outputs), in attention too: the axis that is
contracted is axis 0 of every one, in any role, so that a Gram matrix of a layer's inputs, a
pattern along them and an importance score need no case of their own. Heads are contiguous ranges of
the outputs of ``q_proj``, ``k_proj`` and ``v_proj``, and of the inputs of ``o_proj``.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from lats_optax.checks.options import check

# What the published models were initialized with.
_NORMAL = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The sizes of a decoder, by the names and with the defaults of Hugging Face's ``config.json``.

    Attributes:
      vocab_size: number of tokens.
      hidden_size: width of the residual stream.
      intermediate_size: width of the feed-forward layers.
      num_hidden_layers: number of decoder layers.
      num_attention_heads: number of query heads.
      num_key_value_heads: number of key and value heads, each shared by as many query heads.
      head_dim: width of a head, even.
      max_position_embeddings: the context that the model was trained for; nothing is checked
        against it.
      rope_theta: base of the rotary frequencies.
      rms_norm_eps: what is added to the mean of squares.
      tie_word_embeddings: whether the output layer is the embedding.

    Raises:
      ValueError: a size that is not a positive integer, an odd ``head_dim``, query heads that are
        no multiple of the key-value heads, another value that is not allowed.

    Example:
      >>> config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48,
      ...                      num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
      ...                      head_dim=8)
      >>> config.rope_theta, config.tie_word_embeddings
      (10000.0, False)
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        """Checks the attributes."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                positive = type(value) is int and value >= 1
                check(positive, field.name, value, "an integer of 1 or more")
            elif field.type is float:
                positive = type(value) in (int, float) and 0 < value < float("inf")
                check(positive, field.name, value, "a positive number")
            else:
                check(type(value) is bool, field.name, value, "True or False")
        check(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number")
        shared = self.num_attention_heads % self.num_key_value_heads == 0
        allowed = f"a divisor of num_attention_heads, {self.num_attention_heads}"
        check(shared, "num_key_value_heads", self.num_key_value_heads, allowed)


class Cache(NamedTuple):
    """Keys and values of the positions that one layer has seen.

    Attributes:
      keys: rotated, (batch, positions, num_key_value_heads, head_dim).
      values: of the same shape.
    """

    keys: Array
    values: Array


def rotate(x: Array, positions: Array, theta: float) -> Array:
    """Rotary position embedding, in the layout of Hugging Face: entry i is paired with i + d/2.

    ``(x_i, x_{i+d/2})`` is turned by the angle ``p · theta^(−2i/d)`` at position p.

    Args:
      x: (batch, length, heads, d).
      positions: (length,), integers.
      theta: base of the frequencies.

    Returns:
      The rotated array, of the shape and dtype of ``x``; angles are computed in float32 at least.

    Example: a quarter of a turn takes (1, 0) to (0, 1).
      >>> rotate(jnp.array([[[[1.0, 0.0]]]]), jnp.pi / 2 * jnp.ones(1), 100.0).round(3).tolist()
      [[[[-0.0, 1.0]]]]

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
    """
    half = x.shape[-1] // 2
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    frequencies = theta ** (-jnp.arange(half, dtype=dtype) / half)
    angles = (positions[:, None] * frequencies)[:, None]  # (length, 1, half)
    first, second = x[..., :half].astype(dtype), x[..., half:].astype(dtype)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attend(queries: Array, keys: Array, values: Array, positions: Array) -> Array:
    """``softmax(q kᵀ / √d) v`` over the positions up to a query's own.

    ``jax.nn.dot_product_attention`` is not used, because its softmax is in float32 where the rest
    is in float64.

    Args:
      queries: (batch, length, heads, d).
      keys: (batch, positions, key-value heads, d); query head h has key-value head h // group.
      values: of the same shape.
      positions: (length,), of the queries.

    Returns:
      (batch, length, heads, d) in the dtype of ``queries``; the softmax is in float32 at least.
    """
    batch, length, heads, d = queries.shape
    dtype = jnp.promote_types(queries.dtype, jnp.float32)
    grouped = queries.reshape(batch, length, keys.shape[2], -1, d)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, keys, preferred_element_type=dtype)
    seen = jnp.arange(keys.shape[1]) <= positions[:, None]
    chances = jax.nn.softmax(scores / d**0.5, where=seen, axis=-1).astype(queries.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", chances, values).reshape(batch, length, heads, d)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions, without biases.

    Attributes:
      config: the sizes.
      dtype: of the computation; the softmax is in float32 at least.

    Source: Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models" (2023).
    """

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, cache: Cache | None, start: ArrayLike) -> tuple[Array, Cache]:
        """Attention of x over what is cached and over itself.

        Args:
          x: (batch, length, hidden_size).
          cache: keys and values of the positions before ``start``, with room for those of ``x``;
            ``None``: there are none before, and ``start`` is 0.
          start: the position of the first entry of ``x``.

        Returns:
          (batch, length, hidden_size), and the cache with the keys and values of ``x``.
        """
        sizes = self.config
        dense = partial(nn.Dense, use_bias=False, dtype=self.dtype, kernel_init=_NORMAL)

        def heads(name: str, count: int) -> Array:
            projected = dense(count * sizes.head_dim, name=name)(x)
            return projected.reshape(*x.shape[:2], count, sizes.head_dim)

        positions = jnp.asarray(start) + jnp.arange(x.shape[1])
        queries = rotate(heads("q_proj", sizes.num_attention_heads), positions, sizes.rope_theta)
        keys = rotate(heads("k_proj", sizes.num_key_value_heads), positions, sizes.rope_theta)
        new = Cache(keys, heads("v_proj", sizes.num_key_value_heads))
        if cache is not None:
            at = (0, start, 0, 0)
            write = partial(lax.dynamic_update_slice, start_indices=at)
            new = Cache(*map(write, cache, new))
        mixed = attend(queries, *new, positions).reshape(*x.shape[:2], -1)
        return dense(sizes.hidden_size, name="o_proj")(mixed), new


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) · up(x))``, without biases.

    Attributes:
      config: the sizes.
      dtype: of the computation.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps (…, hidden_size) to the same."""
        dense = partial(nn.Dense, use_bias=False, dtype=self.dtype, kernel_init=_NORMAL)
        gate = nn.silu(dense(self.config.intermediate_size, name="gate_proj")(x))
        up = dense(self.config.intermediate_size, name="up_proj")(x)
        return dense(self.config.hidden_size, name="down_proj")(gate * up)


class DecoderLayer(nn.Module):
    """One layer of the decoder; it runs alone, with its own part of the parameters.

    ``h = x + attention(norm(x))``, ``y = h + mlp(norm(h))``.

    Attributes:
      config: the sizes.
      dtype: of the computation; parameters are float32.

    Example:
      >>> config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48,
      ...                      num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
      ...                      head_dim=8)
      >>> init = jax.jit(Llama(config).init)
      >>> params = init(jax.random.key(0, impl="rbg"), jnp.zeros((1, 5), int))["params"]
      >>> hidden = jnp.ones((3, 5, 32))
      >>> jax.jit(DecoderLayer(config).apply)({"params": params["layers_0"]}, hidden).shape
      (3, 5, 32)
    """

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Makes the parts, by the names of Hugging Face."""
        self.input_layernorm = _norm(self.config, self.dtype)
        self.self_attn = Attention(self.config, self.dtype)
        self.post_attention_layernorm = _norm(self.config, self.dtype)
        self.mlp = MLP(self.config, self.dtype)

    def __call__(self, x: Array) -> Array:
        """Maps hidden states (batch, length, hidden_size) of the positions 0, 1, … to the same."""
        return self.extend(x, None, 0)[0]

    def extend(self, x: Array, cache: Cache | None, start: ArrayLike) -> tuple[Array, Cache]:
        """The same for positions that follow cached ones; arguments as those of `Attention`."""
        attended, cache = self.self_attn(self.input_layernorm(x), cache, start)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Llama(nn.Module):
    """A decoder: embedding, layers, a norm and the output layer.

    Parameters are ``embed_tokens``, ``layers_0`` …, ``norm`` and, unless it is tied to the
    embedding, ``lm_head``.

    Attributes:
      config: the sizes.
      dtype: of the computation, ``jnp.bfloat16`` for mixed precision; parameters are float32, and
        so are the logits (float64 where ``dtype`` is that).

    Example:
      >>> config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48,
      ...                      num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
      ...                      head_dim=8)
      >>> model, ids = Llama(config), jnp.arange(10).reshape(2, 5)
      >>> variables = jax.jit(model.init)(jax.random.key(0, impl="rbg"), ids)
      >>> jax.jit(model.apply)(variables, ids).shape, sorted(variables["params"])
      ((2, 5, 96), ['embed_tokens', 'layers_0', 'lm_head', 'norm'])

    Source: Touvron et al., "LLaMA: Open and Efficient Foundation Language Models" (2023).
    """

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Makes the parts, by the names of Hugging Face."""
        sizes = self.config
        self.embed_tokens = nn.Embed(
            sizes.vocab_size, sizes.hidden_size, dtype=self.dtype, embedding_init=_NORMAL
        )
        self.layers = [
            DecoderLayer(sizes, self.dtype) for _ in range(sizes.num_hidden_layers)
        ]  # Flax calls them layers_0, layers_1, …
        self.norm = _norm(sizes, self.dtype)
        if not sizes.tie_word_embeddings:
            self.lm_head = nn.Dense(
                sizes.vocab_size, use_bias=False, dtype=self.dtype, kernel_init=_NORMAL
            )

    def __call__(self, ids: Array) -> Array:
        """Maps token ids (batch, length) to logits (batch, length, vocab_size) of the next ones."""
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def embed(self, ids: Array) -> Array:
        """Maps token ids (batch, length) to hidden states (batch, length, hidden_size).

        Raises:
          ValueError: ``ids`` are not integers, or not (batch, length).
        """
        _check_ids(ids)
        return self.embed_tokens(ids)

    def head(self, x: Array) -> Array:
        """Maps hidden states (…, hidden_size) to logits (…, vocab_size)."""
        x = self.norm(x)
        tied = self.config.tie_word_embeddings
        logits = self.embed_tokens.attend(x) if tied else self.lm_head(x)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def next_token_losses(logits: Array, ids: Array) -> Array:
    """Negative log-likelihood of each token given those before it; e^mean is the perplexity.

    ``−log softmax(logits[t])[ids[t + 1]]``.

    Args:
      logits: (batch, length, vocab_size).
      ids: (batch, length).

    Returns:
      (batch, length − 1), in nats.

    Example: of equal logits every token has the same probability.
      >>> next_token_losses(jnp.zeros((1, 3, 8)), jnp.array([[1, 2, 3]])) / jnp.log(8)
      Array([[1., 1.]], dtype=float32)
    """
    scores = jnp.take_along_axis(logits[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits[:, :-1], axis=-1) - scores


def generate(model: Llama, params: Mapping[str, Any], ids: Array, new_tokens: int) -> Array:
    """Continues token ids by the likeliest ones, one after the other.

    Keys and values of earlier positions are kept. One layer is compiled, for the given tokens and
    for one more, and serves as all of them: the whole decoder would take as many times longer.

    Args:
      model: the decoder.
      params: its parameters.
      ids: (batch, length) of one or more tokens, without padding.
      new_tokens: how many to add, 1 or more; what follows a model's own end-of-text token has no
        meaning.

    Returns:
      (batch, length + new_tokens).

    Raises:
      ValueError: ``new_tokens`` < 1; ``ids`` are not integers (batch, length ≥ 1).

    Example:
      >>> config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48,
      ...                      num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
      ...                      head_dim=8)
      >>> model, ids = Llama(config), jnp.array([[1, 2, 3]])
      >>> params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), ids)["params"]
      >>> generate(model, params, ids, new_tokens=4).shape
      (1, 7)
    """
    _check_ids(ids)
    check(new_tokens >= 1, "new_tokens", new_tokens, "1 or more")
    check(0 not in ids.shape, "the shape of ids", ids.shape, "(batch, length) of 1 or more each")
    sizes = model.config
    layer = DecoderLayer(sizes, model.dtype)
    params = jax.device_put(dict(params))  # NumPy arrays would be copied for every token
    ends = {name: part for name, part in params.items() if not name.startswith("layers_")}
    room = (len(ids), ids.shape[1] + new_tokens - 1, sizes.num_key_value_heads, sizes.head_dim)
    caches = [
        Cache(jnp.zeros(room, model.dtype), jnp.zeros(room, model.dtype))
        for _ in range(sizes.num_hidden_layers)
    ]
    tokens, start = [ids], 0
    for _ in range(new_tokens):
        x = _embed(model, ends, tokens[-1])
        for i, cache in enumerate(caches):
            x, caches[i] = _extend(layer, params[f"layers_{i}"], x, cache, start)
        start += x.shape[1]
        tokens.append(_likeliest(model, ends, x).astype(ids.dtype))
    return jnp.concatenate(tokens, axis=1)


@partial(jax.jit, static_argnames="model")
def _embed(model: Llama, params: Mapping[str, Any], ids: Array) -> Array:
    return _apply(model, params, ids, method="embed")


@partial(jax.jit, static_argnames="layer", donate_argnames="cache")
def _extend(
    layer: DecoderLayer, params: Mapping[str, Any], x: Array, cache: Cache, start: ArrayLike
) -> tuple[Array, Cache]:
    return _apply(layer, params, x, cache, start, method="extend")


@partial(jax.jit, static_argnames="model")
def _likeliest(model: Llama, params: Mapping[str, Any], x: Array) -> Array:
    return _apply(model, params, x[:, -1:], method="head").argmax(-1)


def _apply(module: nn.Module, params: Mapping[str, Any], *args: Any, method: str) -> Any:
    return module.apply({"params": params}, *args, method=method)


def _norm(config: LlamaConfig, dtype: DTypeLike) -> nn.RMSNorm:
    """``x / √(mean(x²) + ε) · scale``, the mean in float32 at least."""
    return nn.RMSNorm(epsilon=config.rms_norm_eps, dtype=dtype)


def _check_ids(ids: Array) -> None:
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"ids are {ids.dtype} of shape {ids.shape}; allowed: integers (batch, length)."
        )
