"""The weights of a Llama-like decoder by Hugging Face's names, and back.

Here belong names, shapes and layouts, for files of any format. A tensor of a linear layer is
(outputs, inputs), a kernel here (inputs, outputs).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from lats_optax.checks.arrays import Shape, misfits
from lats_optax.models.llama import LlamaConfig
from lats_optax.torch.state_dicts import to_numpy

_DTYPES = ("float16", "bfloat16", "float32")
# How many misfits an error names; a wrong file has hundreds.
_NAMED = 5


def shapes(config: LlamaConfig) -> dict[str, Shape]:
    """Hugging Face's name of each tensor of a decoder -> its shape.

    >>> config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48,
    ...                      num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    ...                      head_dim=8)
    >>> shapes(config)["model.layers.1.self_attn.k_proj.weight"]
    (16, 32)
    """
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer: dict[str, Shape] = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    modules: dict[str, Shape] = {"model.embed_tokens": (config.vocab_size, width)}
    for index in range(config.num_hidden_layers):
        modules |= {f"model.layers.{index}.{part}": shape for part, shape in layer.items()}
    modules["model.norm"] = (width,)
    if not config.tie_word_embeddings:
        modules["lm_head"] = (config.vocab_size, width)
    return {f"{module}.weight": shape for module, shape in modules.items()}


def path_of(name: str) -> tuple[str, ...]:
    """Where a tensor lies in the parameters.

    >>> path_of("model.layers.1.self_attn.k_proj.weight"), path_of("model.norm.weight")
    (('layers_1', 'self_attn', 'k_proj', 'kernel'), ('norm', 'scale'))
    """
    module = name.removeprefix("model.").removesuffix(".weight").replace("layers.", "layers_")
    leaf = "scale" if module.endswith("norm") else "kernel"
    return (*module.split("."), "embedding" if module == "embed_tokens" else leaf)


def check_fit(
    given: Mapping[str, Any], config: LlamaConfig, name_of: Callable[[str], str] = str
) -> None:
    """Refuses tensors that are not those of a decoder.

    Args:
      given: name -> tensor, or what else has a shape and a dtype.
      config: the sizes of the decoder.
      name_of: Hugging Face's name -> that in ``given``.

    Raises:
      ValueError: tensors are unknown, missing, misshapen or of another dtype; one line.
    """
    # A count from a damaged file must not become as many names.
    if config.num_hidden_layers > len(given):
        raise ValueError(
            f"num_hidden_layers is {config.num_hidden_layers}, and there are {len(given)} tensors "
            "in all"
        )
    wanted = {name_of(name): {shape} for name, shape in shapes(config).items()}
    if problems := misfits(given, wanted, _DTYPES):
        more = len(problems) - _NAMED
        # Names from a damaged file may be anything.
        shown = [ascii(problem[:300])[1:-1] for problem in problems[:_NAMED]]
        named = "; ".join(shown) + (f"; and {more} more" if more > 0 else "")
        raise ValueError(f"the tensors are not those of the model: {named}")


def to_params(read: Callable[[str], np.ndarray], config: LlamaConfig) -> dict[str, Any]:
    """The parameters of a decoder, in float32.

    Args:
      read: Hugging Face's name -> a tensor of the right shape.
      config: the sizes of the decoder.

    Returns:
      What `Llama` takes as ``params``: NumPy arrays of their own.
    """
    flat = {
        path_of(name): np.array(_turned(read(name), name), np.float32, order="C")
        for name in shapes(config)
    }
    params: dict[str, Any] = traverse_util.unflatten_dict(flat)  # type: ignore[no-untyped-call]
    return params


def from_params(params: Mapping[str, Any], config: LlamaConfig) -> dict[str, np.ndarray]:
    """The tensors of a decoder by Hugging Face's names, with the dtypes of the parameters.

    Args:
      params: of `Llama`, of float16, bfloat16 or float32.
      config: the sizes of the decoder.

    Returns:
      Name -> NumPy array of its own.

    Raises:
      ValueError: arrays are unknown, missing, misshapen or of another dtype.
    """
    flat = traverse_util.flatten_dict(dict(params))  # type: ignore[no-untyped-call]
    named = {"/".join(path): to_numpy(array) for path, array in flat.items()}
    paths = {name: "/".join(path_of(name)) for name in shapes(config)}
    names = {path: name for name, path in paths.items()}
    # What has no name of Hugging Face's is unknown by its path.
    tensors = {names.get(path, path): _turned(array, path) for path, array in named.items()}
    check_fit(tensors, config)
    return {name: np.array(tensors[name], order="C") for name in paths}


def _turned(array: np.ndarray, name: str) -> np.ndarray:
    """Swaps inputs and outputs of a linear layer; embeddings and scales stay as they are."""
    return array if "embed_tokens" in name else array.T
