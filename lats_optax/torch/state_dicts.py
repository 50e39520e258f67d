"""Files that hold state dicts, by their suffix: names and NumPy arrays in and out.

Here belongs what needs safetensors or torch, which are imported where they are used.
"""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lats_optax.checks.options import check_choice
from lats_optax.files.atomic import replacing


def read(path: Path) -> Any:
    """What a file holds: a state dict, its values arrays or tensors, perhaps within other things.

    Args:
      path: ``.safetensors``, or a file of ``torch.save`` that ends with ``.pt``, ``.pth``, ``.th``
        or ``.state``. Of the latter tensors and plain Python values are read, never code.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: the package that reads it is missing.
      ValueError: the suffix is another; the file is damaged or holds something else.
    """
    reads, _ = _format(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    return reads(path)


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict. The file appears whole or not at all; one of that name is replaced.

    Args:
      path: as `read` takes it.
      tensors: name -> contiguous array that may be written to.

    Raises:
      FileNotFoundError: there is no directory to write to.
      ImportError: the package that writes it is missing.
      ValueError: the suffix is another.
    """
    _, writes = _format(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent}.")
    with replacing(path) as unfinished:
        writes(tensors, unfinished)


def to_numpy(value: Any) -> np.ndarray:
    """An array of any kind, or a tensor of PyTorch, as a NumPy array with its dtype and bits.

    >>> to_numpy(jnp.ones(2, jnp.bfloat16)).dtype
    dtype(bfloat16)
    """
    if type(value).__module__.partition(".")[0] != "torch":
        return np.asarray(value)
    value = value.detach().cpu()
    if str(value.dtype) != "torch.bfloat16":  # of which torch makes no NumPy array
        return np.asarray(value.numpy())
    return np.asarray(value.view(optional_module("torch").int16).numpy().view(jnp.bfloat16))


def optional_module(name: str) -> Any:
    """A module of a package that may be missing.

    Raises:
      ImportError: it is missing; the message says what to install.

    Example:
      >>> optional_module("no_such_package.part")
      Traceback (most recent call last):
      ImportError: no_such_package is missing (No module named 'no_such_package'): pip install
      no_such_package
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f"{package} is missing ({error}): pip install {package}") from error


def _read_safetensors(path: Path) -> Any:
    library = optional_module("safetensors.numpy")
    try:
        return library.load_file(path)
    except optional_module("safetensors").SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}.") from error


def _write_safetensors(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    # Its save_file would make a file that its owner alone can read.
    path.write_bytes(optional_module("safetensors.numpy").save(tensors))


def _read_torch(path: Path) -> Any:
    torch = optional_module("torch")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many types: whatever the bytes of another file lead to
        raise ValueError(
            f"{path} is damaged, or not a PyTorch file of tensors and plain values alone "
            f"({type(error).__name__}). Where it holds more, write the state dict alone: "
            "torch.save(model.state_dict(), path)."
        ) from error


def _write_torch(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    torch = optional_module("torch")

    def tensor(array: np.ndarray) -> Any:
        if array.dtype.name != "bfloat16":
            return torch.from_numpy(array)
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)

    torch.save({name: tensor(array) for name, array in tensors.items()}, path)


_FORMATS: dict[str, tuple[Callable[[Path], Any], Callable[[Mapping[str, np.ndarray], Path], None]]]
_FORMATS = {
    ".safetensors": (_read_safetensors, _write_safetensors),
    **dict.fromkeys((".pt", ".pth", ".th", ".state"), (_read_torch, _write_torch)),
}


def _format(path: Path) -> Any:
    check_choice(f"suffix of {path}", path.suffix, _FORMATS)
    return _FORMATS[path.suffix]
