"""Sparse files: pytrees of arrays in safetensors that store only nonzeros.

Here belong the file format, its validation and the atomic write. safetensors is imported where it
is used.

An array is stored in the way that takes the fewest bytes, N its size, n how many entries have a bit
set (so that -0.0 and NaN are values), b the bytes of one:

    dense    NAME                          N·b
    bitmap   NAME:bitmap, NAME:values      ⌈N/8⌉ + n·b
    gaps     NAME:gaps, NAME:values        about n + n·b

Bits of a bitmap begin with the lowest of the first byte. A gap of 0 to 254 says how many zeros
stand before the next value; 255 stands for 255 zeros and no value. Fewer than 255 zeros may follow
the last gap, so that a file can ask for at most 255 entries for each of its bytes.

The metadata ``lats_optax`` is JSON: the tree, how each array is stored and its shape. The metadata
``sha256`` is that of the whole file with 64 zeros in its own place.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lats_optax.files.atomic import replacing
from lats_optax.files.storage import URL, as_path, has_room

_VERSION = 1
_DTYPES = {
    "BOOL": np.dtype(bool),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
_DIGEST = b'"sha256":"'
# What the header says of a second tensor; a smaller saving is none.
_HEADER_BYTES = 128

Tensors = dict[str, np.ndarray]


def save_sparse(
    path: str | os.PathLike[str], params: Any, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a pytree of arrays to a safetensors file that stores only nonzeros.

    At 95 % sparsity a float32 array takes 6.3 % of its bytes, at 99 % 1.3 %. What is not sparse is
    stored as it is, and readable by everything that reads safetensors.

    The file is written under another name beside ``path``, brought to the disk and then renamed:
    whatever interrupts that, a file that stood there before stays whole.

    Args:
      path: of the file; an existing one is replaced. It may be a URL of an object store, such as
        ``gs://bucket/model.safetensors``, and so it may where a file is read.
      params: dicts, lists and tuples, nested in any way, of JAX or NumPy arrays (and None). Keys
        are strings or integers. Of ``flax.nnx`` pass ``nnx.to_pure_dict(nnx.state(model))``, of
        other types of tree ``jax.tree.leaves(tree)``. Allowed are bool, integers of 8 to 64 bits,
        float8_e4m3fn, float8_e5m2, float16, bfloat16, float32, float64 and complex64.
      metadata: strings by name, such as which model it is; :func:`read_metadata` gives them back.

    Raises:
      FileNotFoundError: there is no directory to write to.
      ImportError: safetensors is missing.
      OSError: the file cannot be written.
      ValueError: a node, a key, a dtype or metadata of another kind; two arrays of one name.

    Example:
      >>> import os, tempfile, jax.numpy as jnp
      >>> params = {"kernel": jnp.zeros((300, 100)).at[::7, 3].set(-1.5), "bias": jnp.zeros(3)}
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = os.path.join(directory, "model.safetensors")
      ...     save_sparse(path, params, {"model": "mlp"})
      ...     loaded, size = load_sparse(path), os.path.getsize(path)
      >>> bool((loaded["kernel"] == params["kernel"]).all()), size < 120_000 / 100
      (True, True)
    """
    path = as_path(path)
    if not has_room(path):
        raise FileNotFoundError(f"there is no directory {path.parent}")
    tensors: Tensors = {}
    layout = {"version": _VERSION, "tree": _encode(params, "", tensors)}
    texts = dict(metadata or {})
    for key, value in texts.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise ValueError(f"metadata: {key!r} is {value!r}; allowed are strings")
        if key in ("lats_optax", "sha256"):
            raise ValueError(f"metadata: {key!r} is taken; allowed is any other key")
        _check_text("metadata", key, f"the key {key!a}")
        _check_text("metadata", value, f"{value[:80]!a} at {key!a}")
    texts |= {"lats_optax": json.dumps(layout, separators=(",", ":")), "sha256": "0" * 64}
    _import_safetensors()
    from safetensors.numpy import save

    data = bytearray(save(tensors, texts))
    at = data.index(_DIGEST) + len(_DIGEST)
    data[at : at + 64] = hashlib.sha256(data).hexdigest().encode()
    with replacing(path) as unfinished:
        unfinished.write_bytes(data)


def load_sparse(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> Any:
    """Read a file of :func:`save_sparse`: the same tree, bit for bit.

    Nothing is returned unless the checksum of the whole file and every field in it are right. The
    checksum finds damage; it is no signature, and who can write the file can write another.

    Args:
      path: of the file.
      max_bytes: how many bytes the arrays may take in memory, all together: a file of zeros alone
        can ask for 2,000 times its size. Unless given, 1 GiB or 100 times the size of the file,
        whichever is more.

    Returns:
      Dicts, lists, tuples and None as they were saved, with NumPy arrays of the dtypes that they
      had; ``jax.tree.map(jnp.asarray, ...)`` brings them to a device.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: safetensors is missing.
      ValueError: the file is truncated, changed, or not one of ``save_sparse``; or its arrays take
        more than ``max_bytes``, and then none is made.

    Example:
      >>> import os, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = os.path.join(directory, "model.safetensors")
      ...     save_sparse(path, {"layers": [np.arange(3), None]})
      ...     load_sparse(path)
      {'layers': [array([0, 1, 2]), None]}
    """
    if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 0):
        raise ValueError(
            f"max_bytes: {max_bytes!r} is not allowed; allowed are None and integers >= 0"
        )
    path = as_path(path)
    tensors, texts = _read(path)
    try:
        layout = _parse(texts["lats_optax"])
        if not isinstance(layout, dict) or layout.keys() != {"version", "tree"}:
            raise _DamagedError("its layout is not a version and a tree")
        if layout["version"] != _VERSION:
            raise _DamagedError(
                f"its version is {str(layout['version'])[:40]}; known is {_VERSION}"
            )
        needed = _bytes(layout["tree"], "", tensors)
        _check_bytes(path, needed, max_bytes)
        params = _decode(layout["tree"], "", tensors)
        if tensors:
            raise _DamagedError(f"{', '.join(sorted(tensors))}: in no place of the tree")
    except (_DamagedError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {str(error)[:300]}") from error
    return params


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata of a :func:`save_sparse` file and verify its checksum.

    Args:
      path: of the file.

    Returns:
      Strings by name.

    Raises:
      FileNotFoundError, ImportError, ValueError: as :func:`load_sparse`.

    Example:
      >>> import os, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = os.path.join(directory, "model.safetensors")
      ...     save_sparse(path, {}, {"model": "resnet50"})
      ...     read_metadata(path)
      {'model': 'resnet50'}
    """
    _, texts = _read(as_path(path))
    return {key: value for key, value in texts.items() if key not in ("lats_optax", "sha256")}


class _DamagedError(Exception):
    """A damaged file; the caller adds its name."""


# --- the file -----------------------------------------------------------------------------------


def _import_safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(f"safetensors is missing ({error}): pip install safetensors") from error
    return safetensors


def _read(path: Path | URL) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of a file whose checksum is right."""
    safetensors = _import_safetensors()
    data = bytearray(path.read_bytes())
    try:
        found = safetensors.deserialize(bytes(data))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    end = 8 + int.from_bytes(data[:8], "little")
    texts = json.loads(bytes(data[8:end])).get("__metadata__") or {}
    if "lats_optax" not in texts or data.count(_DIGEST, 8, end) != 1:
        raise ValueError(
            f"{path} is a safetensors file, but not one of save_sparse; "
            "safetensors.numpy.load_file reads others"
        )
    at = data.index(_DIGEST, 8, end) + len(_DIGEST)
    digest = bytes(data[at : at + 64])
    data[at : at + 64] = b"0" * 64
    if digest != hashlib.sha256(data).hexdigest().encode():
        raise ValueError(f"{path} is damaged: its bytes are not those of its checksum")
    try:
        return {name: _tensor(name, tensor) for name, tensor in found}, texts
    except _DamagedError as error:
        raise ValueError(f"{path} is damaged: {str(error)[:300]}") from error


def _parse(layout: str) -> Any:
    try:
        return json.loads(layout)
    except (ValueError, RecursionError) as error:
        raise _DamagedError(f"its layout cannot be read: {error}") from error


def _tensor(name: str, tensor: Mapping[str, Any]) -> np.ndarray:
    if tensor["dtype"] not in _DTYPES:
        raise _DamagedError(
            f"{name} is of type {tensor['dtype']}; allowed are {', '.join(_DTYPES)}"
        )
    dtype = _DTYPES[tensor["dtype"]]
    data = np.frombuffer(tensor["data"], np.uint8)
    if dtype.kind == "b" and data.size and data.max() > 1:
        raise _DamagedError(f"{name} has bools other than 0 and 1")
    shape = _check_shape(name, tensor["shape"])
    return data.view(dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(shape)


# --- trees --------------------------------------------------------------------------------------


def _encode(node: Any, name: str, tensors: Tensors) -> Any:
    """The layout of a tree; what its arrays are stored as goes into ``tensors``."""
    if node is None:
        return None
    if isinstance(node, Mapping):
        for key in node:
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise ValueError(f"params: {_at(name)} has the key {key!r}; allowed: str and int")
            _check_text("params", str(key), f"the key {key!a} of {_at(name)}")
        return {
            "dict": [
                [key, _encode(value, _join(name, key), tensors)] for key, value in node.items()
            ]
        }
    if type(node) in (list, tuple):
        kind = type(node).__name__
        return {kind: [_encode(v, _join(name, i), tensors) for i, v in enumerate(node)]}
    if not isinstance(node, np.ndarray | np.generic | jax.Array):
        raise ValueError(
            f"params: {_at(name)} is a {type(node).__qualname__}; allowed are dicts, lists, "
            "tuples, None and arrays"
        )
    allowed = [dtype.name for dtype in _DTYPES.values()]
    if node.dtype.name not in allowed:
        raise ValueError(f"params: {_at(name)} is {node.dtype}; allowed: {', '.join(allowed)}")
    form, stored = _smallest(_at(name), np.asarray(jax.device_get(node), order="C"))
    if taken := tensors.keys() & stored.keys() | stored.keys() & {"__metadata__"}:
        raise ValueError(f"params: the name {min(taken)} is taken; rename one of the two")
    tensors |= stored
    return {"array": form} if form == "dense" else {"array": form, "shape": list(node.shape)}


def _bytes(node: Any, name: str, tensors: Tensors) -> int:
    """What the arrays of a layout take in memory; `_decode` tells what else is wrong in it."""
    if not isinstance(node, dict):
        return 0
    at = _at(name)
    if node.get("array") in ("bitmap", "gaps") and "shape" in node:
        where, values = tensors.get(f"{at}:{node['array']}"), tensors.get(f"{at}:values")
        if where is None or values is None:
            return 0
        size = math.prod(_check_shape(at, node["shape"]))
        # A shape beyond that is damage, and not a matter of memory.
        return min(size, 255 * (where.size + 1)) * values.itemsize
    if node == {"array": "dense"} and at in tensors:
        return tensors[at].nbytes
    total = 0
    for kind, children in node.items():
        for number, child in enumerate(children if isinstance(children, list) else []):
            pair = kind == "dict" and isinstance(child, list) and len(child) == 2
            key, value = child if pair else (number, child)
            total += _bytes(value, _join(name, key), tensors)
    return total


def _check_bytes(path: Path | URL, needed: int, max_bytes: int | None) -> None:
    size = path.stat().st_size
    allowed = max(2**30, 100 * size) if max_bytes is None else max_bytes
    if needed > allowed:
        raise ValueError(
            f"{path} has {size:,} bytes and asks for arrays of {needed:,}; allowed are "
            f"{allowed:,}, or, where you trust the file, load_sparse(…, max_bytes={needed})"
        )


def _decode(node: Any, name: str, tensors: Tensors) -> Any:
    """The tree of a layout; what it uses is taken out of ``tensors``."""
    if node is None:
        return None
    if not isinstance(node, dict):
        raise _DamagedError(f"{_at(name)}: the layout has {str(node)[:40]!r} there")
    if node == {"array": "dense"}:
        return _take(_at(name), tensors).copy()
    if node.keys() == {"array", "shape"} and node["array"] in ("bitmap", "gaps"):
        return _spread(_at(name), node["array"], _check_shape(_at(name), node["shape"]), tensors)
    (kind, children) = next(iter(node.items())) if len(node) == 1 else ("", None)
    if kind not in ("dict", "list", "tuple") or not isinstance(children, list):
        raise _DamagedError(f"{_at(name)}: the layout has the fields {sorted(node)} there")
    if kind != "dict":
        values = [_decode(child, _join(name, i), tensors) for i, child in enumerate(children)]
        return tuple(values) if kind == "tuple" else values
    decoded: dict[str | int, Any] = {}
    for child in children:
        if not (isinstance(child, list) and len(child) == 2 and type(child[0]) in (str, int)):
            raise _DamagedError(f"{_at(name)}: the layout has a dict of {str(child)[:40]!r} there")
        if child[0] in decoded:
            raise _DamagedError(f"{_at(name)}: the layout has the key {child[0]!r} twice there")
        decoded[child[0]] = _decode(child[1], _join(name, child[0]), tensors)
    return decoded


def _check_text(argument: str, text: str, what: str) -> None:
    """Raises ValueError where a text has half of a surrogate pair, which no UTF-8 file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{argument}: {what} is not allowed; allowed is text without lone surrogates"
        ) from error


def _join(name: str, key: str | int) -> str:
    return f"{name}/{key}" if name else str(key)


def _at(name: str) -> str:
    """The name of an array that is a tree by itself, as `masks.paths` has it."""
    return name or "params"


def _take(name: str, tensors: Tensors) -> np.ndarray:
    if name not in tensors:
        raise _DamagedError(f"{name} is missing")
    return tensors.pop(name)


def _check_shape(name: str, shape: Any) -> tuple[int, ...]:
    whole = isinstance(shape, list | tuple) and all(type(n) is int and n >= 0 for n in shape)
    # NumPy counts the bytes of an empty array as if its axes of length 0 were not there.
    if not whole or len(shape) > 32 or math.prod(max(n, 1) for n in shape) >= 2**59:
        raise _DamagedError(f"{name} has the shape {str(shape)[:80]}")
    return tuple(shape)


# --- arrays -------------------------------------------------------------------------------------


def _smallest(name: str, array: np.ndarray) -> tuple[str, Tensors]:
    """How an array is stored in the fewest bytes, and as what."""
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    bits = _bits(array)
    positions = np.flatnonzero(bits)
    gaps = _gaps(positions, bits.size)
    sparse = positions.size * array.itemsize + _HEADER_BYTES
    sizes = {
        "dense": array.nbytes,
        "bitmap": sparse + -(-bits.size // 8),
        "gaps": sparse + gaps.size,
    }
    form = min(sizes, key=lambda form: sizes[form])
    if form == "dense":
        return form, {name: array}
    where = gaps if form == "gaps" else np.packbits(bits != 0, bitorder="little")
    return form, {f"{name}:{form}": where, f"{name}:values": array.reshape(-1)[positions]}


def _spread(name: str, form: str, shape: tuple[int, ...], tensors: Tensors) -> np.ndarray:
    """The array of that shape that is stored as a bitmap or gaps and values."""
    where, values = _take(f"{name}:{form}", tensors), _take(f"{name}:values", tensors)
    if where.dtype != np.uint8 or where.ndim != 1 or values.ndim != 1:
        raise _DamagedError(
            f"{name} is stored as {where.dtype}{list(where.shape)} and {list(values.shape)} values"
        )
    places = (_from_bitmap if form == "bitmap" else _from_gaps)(name, where, math.prod(shape))
    count = int(np.count_nonzero(places)) if form == "bitmap" else places.size
    if count != values.size:
        raise _DamagedError(f"{name} has {values.size} values for {count} places")
    array = np.zeros(shape, values.dtype)
    _bits(array)[places] = _bits(values)
    return array


def _bits(array: np.ndarray) -> np.ndarray:
    """The entries of a contiguous array as unsigned integers, which no arithmetic changes."""
    return array.reshape(-1).view(f"u{array.itemsize}")


def _gaps(positions: np.ndarray, size: int) -> np.ndarray:
    ends = np.append(positions, size)
    gaps = np.diff(ends, prepend=-1) - 1
    full, rest = np.divmod(gaps, 255)
    # Each place takes a byte of its own after those of 255; the end of the array takes none.
    coded = np.full(full.sum() + positions.size, 255, np.uint8)
    coded[np.cumsum(full + 1)[:-1] - 1] = rest[:-1]
    return coded


def _from_gaps(name: str, gaps: np.ndarray, size: int) -> np.ndarray:
    advance = np.where(gaps == 255, 255, gaps.astype(np.int64) + 1)
    ends = np.cumsum(advance)
    end = int(ends[-1]) if ends.size else 0
    if not end <= size < end + 255:
        raise _DamagedError(f"{name} has {size} entries, and its gaps reach {end}")
    return ends[gaps != 255] - 1


def _from_bitmap(name: str, bitmap: np.ndarray, size: int) -> np.ndarray:
    if bitmap.size != -(-size // 8):
        raise _DamagedError(f"{name} has {size} entries and a bitmap of {bitmap.size} bytes")
    bits = np.unpackbits(bitmap, bitorder="little").astype(bool)
    if bits[size:].any():
        raise _DamagedError(f"{name} has places behind its end")
    return bits[:size]
