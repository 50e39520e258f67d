"""Language models in and out of directories as Hugging Face's: config.json and safetensors.

Here belongs what such a directory holds. Names and layouts are in `llama_weights.py`.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lats_optax.checks.options import check, check_choice
from lats_optax.files.atomic import replacing
from lats_optax.models.llama import LlamaConfig
from lats_optax.torch import llama_weights, state_dicts

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# What the decoder has one form of: key, that form, which is also what a missing key says.
_SETTLED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}
_DEFAULT_ROPE = "default"


def load(directory: str | os.PathLike[str]) -> tuple[LlamaConfig, dict[str, Any]]:
    """Config and parameters of a Llama-like model, from a directory as Hugging Face's hub has it.

    Args:
      directory: with ``config.json``, and ``model.safetensors`` or the shards that
        ``model.safetensors.index.json`` names.

    Returns:
      The config, and what ``Llama(config)`` takes as ``params``: NumPy arrays of float32.

    Raises:
      FileNotFoundError: the directory, or one of these files, is not there.
      ImportError: safetensors is missing.
      ValueError: a file is truncated or damaged; the architecture is another; tensors are unknown,
        missing, misshapen or of another dtype than float16, bfloat16 and float32.

    Example: as in `save`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}.")
    config = _naming(directory / _CONFIG, config_from_json, _read_json(directory / _CONFIG))
    return config, _naming(directory, params_from_hugging_face, _read_tensors(directory), config)


def save(
    directory: str | os.PathLike[str],
    params: Mapping[str, Any],
    config: LlamaConfig,
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes ``config.json`` and the weights; `load` is its inverse, bit for bit.

    Every file appears whole or not at all, and those of the same names are replaced. A tokenizer is
    not written: its ``tokenizer.json`` stays valid.

    Args:
      directory: made where its parent is there.
      params: of ``Llama(config)``, of float16, bfloat16 or float32; written as they are.
      config: the sizes.
      max_shard_bytes: where the weights take more, they are written as several files with an index,
        each of as many tensors as go in, and of one at least.

    Raises:
      FileNotFoundError: there is no directory to write to.
      ImportError: safetensors is missing.
      ValueError: arrays are unknown, missing, misshapen or of another dtype; ``max_shard_bytes``
        is not 1 or more.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp
      >>> from lats_optax.models.llama import Llama
      >>> config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48,
      ...                      num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
      ...                      head_dim=8)
      >>> init = jax.jit(Llama(config).init)
      >>> params = init(jax.random.key(0, impl="rbg"), jnp.zeros((1, 1), int))["params"]
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     save(directory, params, config, max_shard_bytes=30_000)
      ...     files, (same, loaded) = sorted(os.listdir(directory)), load(directory)
      >>> files[1], same == config, jax.tree.all(jax.tree.map(np.array_equal, loaded, dict(params)))
      ('model-00001-of-00003.safetensors', True, True)
    """
    directory = Path(directory)
    check(max_shard_bytes >= 1, "max_shard_bytes", max_shard_bytes, "1 or more")
    tensors = params_to_hugging_face(params, config)
    if not directory.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {directory.parent}.")
    directory.mkdir(exist_ok=True)
    shards = list(_shards(tensors, max_shard_bytes))
    if len(shards) == 1:
        state_dicts.write(directory / _WEIGHTS, tensors)
    else:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        for file, shard in zip(files, shards):
            state_dicts.write(directory / file, shard)
        total = sum(array.nbytes for array in tensors.values())
        where = {name: file for file, shard in zip(files, shards) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(directory / _INDEX, index)
    # Of an earlier checkpoint in the other form, which would be read instead.
    (directory / (_INDEX if len(shards) == 1 else _WEIGHTS)).unlink(missing_ok=True)
    _write_json(directory / _CONFIG, config_to_json(config))


def params_from_hugging_face(tensors: Mapping[str, Any], config: LlamaConfig) -> dict[str, Any]:
    """The parameters of a decoder from a state dict.

    Args:
      tensors: Hugging Face's name -> array or tensor of float16, bfloat16 or float32. Rotary
        frequencies are passed over, and so is an ``lm_head.weight`` equal to the embedding to
        which the output is tied.
      config: the sizes.

    Returns:
      What ``Llama(config)`` takes as ``params``: NumPy arrays of float32 of their own.

    Raises:
      ValueError: tensors are unknown, missing, misshapen or of another dtype.
    """
    arrays = {
        name: state_dicts.to_numpy(tensor)
        for name, tensor in tensors.items()
        if not name.endswith("rotary_emb.inv_freq")  # which old checkpoints hold
    }
    embedding, head = arrays.get("model.embed_tokens.weight"), arrays.get("lm_head.weight")
    if config.tie_word_embeddings and head is not None and np.array_equal(head, embedding):  # type: ignore[arg-type]
        del arrays["lm_head.weight"]
    llama_weights.check_fit(arrays, config)
    return llama_weights.to_params(arrays.__getitem__, config)


def params_to_hugging_face(params: Mapping[str, Any], config: LlamaConfig) -> dict[str, np.ndarray]:
    """The state dict of a decoder; `params_from_hugging_face` is its inverse.

    Args, returns and raises: as `llama_weights.from_params`.
    """
    return llama_weights.from_params(params, config)


def config_from_json(values: Mapping[str, Any]) -> LlamaConfig:
    """The sizes of a decoder from what ``config.json`` holds.

    Raises:
      ValueError: the architecture is another, or has biases, another activation, scaled rotary
        frequencies or quantized weights; a size is missing or not allowed.

    Example:
      >>> values = {"model_type": "llama", "vocab_size": 96, "hidden_size": 32,
      ...           "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
      >>> config_from_json(values).head_dim
      8
    """
    check_choice("model_type", values.get("model_type"), ["llama"])
    for key, only in _SETTLED.items():
        check_choice(key, values.get(key, only), [only])
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):  # of transformers 4, and of 5
        given = values.get(key) or {}
        check(isinstance(given, Mapping), key, given, "an object")
        rope |= given
    kind = rope.get("rope_type", rope.get("type", _DEFAULT_ROPE))
    check_choice("rope_type", kind, [_DEFAULT_ROPE])
    fields = [field.name for field in dataclasses.fields(LlamaConfig)]
    found = {**values, **rope}
    sizes = {name: found[name] for name in fields if found.get(name) is not None}
    return config_from_sizes(sizes)


def config_from_sizes(sizes: Mapping[str, Any]) -> LlamaConfig:
    """A config from some of its fields: heads share nothing and divide the width, unless said.

    Raises:
      ValueError: a size is missing or not allowed.
    """
    needed = [f.name for f in dataclasses.fields(LlamaConfig) if f.default is dataclasses.MISSING]
    heads, width = sizes.get("num_attention_heads"), sizes.get("hidden_size")
    sizes = {"num_key_value_heads": heads, **sizes}
    if type(heads) is type(width) is int and heads > 0:
        sizes = {"head_dim": width // heads, **sizes}
    for name in needed:
        check(sizes.get(name) is not None, name, None, "an integer of 1 or more")
    return LlamaConfig(**sizes)


def config_to_json(config: LlamaConfig) -> dict[str, Any]:
    """What ``config.json`` holds; `config_from_json` is its inverse."""
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    settled = {key: only for key, only in _SETTLED.items() if only is not None}
    return {**llama, **settled, **dataclasses.asdict(config)}


def _naming(path: Path, convert: Any, *args: Any) -> Any:
    """What a function makes of a file's contents; its errors name the file."""
    try:
        return convert(*args)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; allowed: an object.")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(values, indent=2) + "\n")


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    if (directory / _WEIGHTS).is_file():
        return dict(state_dicts.read(directory / _WEIGHTS))
    path = directory / _INDEX
    if not path.is_file():
        raise FileNotFoundError(f"there is neither {_WEIGHTS} nor {_INDEX} in {directory}.")
    where: Any = _read_json(path).get("weight_map")
    # Of this directory alone: an index may have come with the files, from anywhere.
    plain = isinstance(where, dict) and all(
        isinstance(file, str) and file == Path(file).name for file in where.values()
    )
    if not plain:
        raise ValueError(f"{path}: weight_map is not an object from tensors to files beside it.")
    shards = {file: state_dicts.read(directory / file) for file in sorted(set(where.values()))}
    for name, file in where.items():
        if name not in shards[file]:
            raise ValueError(f"{path}: {name} is missing in {file}.")
    return {name: shards[file][name] for name, file in where.items()}


def _shards(tensors: Mapping[str, np.ndarray], most: int) -> Iterator[dict[str, np.ndarray]]:
    """The tensors in their order, in parts of at most so many bytes, or of one tensor."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in tensors.items():
        if shard and size + array.nbytes > most:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard
