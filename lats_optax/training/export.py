"""Model files: the weights of a model of the zoo and its description.

They are sparse files (`lats_optax.save_sparse`) of the tree ``{"params": …, "batch_stats": …}``,
whose metadata has `models.describe` and the shape of an image, both as JSON.
"""

import json
import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import unfreeze

import lats_optax
from lats_optax import masks, models
from lats_optax.checks.arrays import FLOATS, misfits
from lats_optax.files.storage import URL, as_path
from lats_optax.training.workdir import MODEL

_MODEL, _IMAGE_SHAPE = "model", "image_shape"
_COLLECTIONS = {"params", "batch_stats"}


class SavedModel(NamedTuple):
    """What a model file holds.

    Attributes:
      model: a model of the zoo, without an ``axis_name``.
      variables: ``params`` and ``batch_stats``, NumPy arrays as they were saved, for
        ``model.apply(variables, images, train=False)``.
      image_shape: (height, width, channels) of the images that it was trained on.
      metadata: what else `save_model` was given, strings by name.
    """

    model: nn.Module
    variables: dict[str, Any]
    image_shape: tuple[int, int, int]
    metadata: dict[str, str]


class ModelFile(NamedTuple):
    """A model file, and how large it is.

    Attributes:
      path: of the file.
      size: in bytes.
      dense_size: of its arrays, in bytes.
    """

    path: Path | URL
    size: int
    dense_size: int

    @staticmethod
    def written(path: Path | URL, arrays: Any) -> "ModelFile":
        """The file at a path, which holds a pytree of arrays."""
        dense = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(arrays))
        return ModelFile(path, path.stat().st_size, dense)

    def __str__(self) -> str:
        """The path, the size, and what part of the dense size that is."""
        return f"{self.path} ({self.size:,} bytes, {self.size / self.dense_size:.1%} of dense)"


def save_model(
    path: str | os.PathLike[str],
    model: nn.Module,
    variables: Mapping[str, Any],
    image_shape: tuple[int, ...],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a model of the zoo and its weights to a sparse file.

    The file appears whole or not at all: whatever interrupts that, one that stood there before
    stays as it was.

    Args:
      path: of the file; an existing one is replaced.
      model: of `models.create`.
      variables: ``params``, and ``batch_stats`` where the model has any: arrays of the shapes that
        ``model.init`` gives, of any float type.
      image_shape: (height, width, channels).
      metadata: strings by name, such as the accuracy; ``model`` and ``image_shape`` are taken.

    Raises:
      OSError: the file cannot be written.
      ValueError: the model is not one of the zoo; the variables are not its own; or the metadata
        is not of strings, or has a name that is taken.

    Example:
      >>> import tempfile
      >>> model = models.create("digits-cnn", num_classes=10, width=0.25)
      >>> images = jnp.zeros((1, 8, 8, 1))
      >>> key = jax.random.key(0, impl="rbg")
      >>> variables = jax.tree.map(jnp.zeros_like, model.init(key, images, train=False))
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = os.path.join(directory, "model.safetensors")
      ...     save_model(path, model, variables, (8, 8, 1), {"data": "digits"})
      ...     saved = load_model(path)
      >>> saved.model.width, saved.image_shape, saved.metadata
      (0.25, (8, 8, 1), {'data': 'digits'})
    """
    texts = dict(metadata or {})
    for key in (_MODEL, _IMAGE_SHAPE):
        if key in texts:
            raise ValueError(f"metadata: {key!r} is taken; allowed is any other key")
    shape = _check_image_shape(list(image_shape))
    tree = {"batch_stats": {}, **unfreeze(dict(variables))}
    if differing := differences(tree, variables_of(model, shape)):
        raise ValueError(f"variables: they are not those of the model: {differing}")
    texts |= {_MODEL: json.dumps(models.describe(model)), _IMAGE_SHAPE: json.dumps(shape)}
    lats_optax.save_sparse(path, tree, texts)


def find_model(path: Path | URL) -> Path | URL:
    """The model file that a path names: itself, or that of the run in a directory.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is a URL of a store that cannot be used here.
    """
    path = as_path(path, "file")
    file = path / MODEL if path.is_dir() else path
    if not file.is_file():
        hint = "" if file is path else ", which lats-train writes when a run ends"
        raise FileNotFoundError(f"there is no file {file}{hint}")
    return file


def load_model(path: str | os.PathLike[str], *, max_image_size: int = 2**24) -> SavedModel:
    """Reads a file of `save_model`.

    Nothing is returned unless the model that the file describes exists and the arrays in it are
    those of that model; until then no array is made but those that the file holds.

    Args:
      path: of the file.
      max_image_size: the most that height × width × channels may be: whoever makes an image of the
        shape that a file asks for should not run out of memory.

    Returns:
      The model and its weights.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: safetensors is missing.
      ValueError: the file is damaged, or not one of `save_model`; there is no such model; the
        arrays are not its own (the message lists paths and shapes); or its arrays or images are
        beyond the limits of `load_sparse` and ``max_image_size``.
    """
    texts = lats_optax.read_metadata(path)
    if missing := {_MODEL, _IMAGE_SHAPE} - texts.keys():
        raise ValueError(
            f"{path} is a sparse file, but not one of a model: its metadata has no "
            f"{' and no '.join(sorted(missing))}; allowed are model files, as lats-train writes "
            "them"
        )
    tree = lats_optax.load_sparse(path)
    # A model may raise anything when it is made with options that it was not made for.
    try:
        model = _rebuild(texts.pop(_MODEL))
        image_shape = _check_image_shape(json.loads(texts.pop(_IMAGE_SHAPE)))
        if (size := math.prod(image_shape)) > max_image_size:
            raise ValueError(
                f"image_shape is {[*image_shape]}, {size:,} numbers; allowed are {max_image_size:,}"
                f", or, where you trust the file, load_model(…, max_image_size={size})"
            )
        expected = variables_of(model, image_shape)
    except Exception as error:
        raise ValueError(f"{path}: its description of the model: {_in_short(error)}") from error
    try:
        differing = differences(tree, expected)
    except Exception as error:
        raise ValueError(f"{path}: its arrays: {_in_short(error)}") from error
    if differing:
        raise ValueError(f"{path}: its arrays are not those of its model: {differing}")
    return SavedModel(model, tree, image_shape, texts)


def variables_of(model: nn.Module, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Shapes and dtypes of ``params`` and ``batch_stats`` of a model; nothing is computed."""
    images = jax.eval_shape(lambda: jnp.zeros((1, *image_shape)))
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    return {"batch_stats": {}, **unfreeze(shapes)}


def differences(variables: Any, expected: Mapping[str, Any]) -> str:
    """How variables differ from those that a model has, by path and shape; empty if they do not.

    >>> have = {"params": {"head": jnp.zeros((2, 3))}, "batch_stats": {}}
    >>> want = {"params": {"head": jnp.zeros((2, 4)), "bias": jnp.zeros(4)}, "batch_stats": {}}
    >>> differences(have, want)
    'params/bias is missing, wanted (4,), params/head is (2, 3), wanted (2, 4)'
    """
    if not isinstance(variables, Mapping) or variables.keys() != _COLLECTIONS:
        return f"they are not a dict of {' and '.join(sorted(_COLLECTIONS))}"
    have, want = (
        dict(zip(jax.tree.leaves(masks.paths(tree)), jax.tree.leaves(tree)))
        for tree in (variables, expected)
    )
    found = misfits(have, {name: {leaf.shape} for name, leaf in want.items()}, FLOATS)
    containers: list[Any] = [jax.tree.structure(dict(tree)) for tree in (variables, expected)]
    if not found and containers[0] != containers[1]:
        return "they are in other containers than dicts"
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return ", ".join(item[:120] for item in found[:5]) + more


def _rebuild(description: str) -> nn.Module:
    """The model of a description that anyone may have written."""
    given = json.loads(description)
    if not (isinstance(given, dict) and isinstance(given.get("name"), str)):
        raise ValueError(f"it is {description[:80]!r}, not what models.describe gives")
    dtype, classes = given.get("dtype"), given.get("num_classes")
    if not isinstance(dtype, str) or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is {dtype!r}; allowed: the name of a float type")
    if type(classes) is not int or classes < 1:
        raise ValueError(f"num_classes is {classes!r}; allowed: 1 or more")
    usual = models.describe(models.create(given["name"], num_classes=classes))
    for option, value in given.items():
        if option not in usual:
            raise ValueError(f"{option!r} is no option of {given['name']!r}")
        # A model tests a flag for its truth, which a number or a text has too.
        if isinstance(usual[option], bool) != isinstance(value, bool):
            raise ValueError(f"{option} is {str(value)[:80]}; usual is {usual[option]}")
    return models.create(**given)


def _check_image_shape(shape: Any) -> tuple[int, int, int]:
    whole = isinstance(shape, list) and all(type(n) is int and n >= 1 for n in shape)
    # XLA counts bytes in 64 bits.
    if not whole or len(shape) != 3 or math.prod(shape) >= 2**59:
        raise ValueError(
            f"image_shape is {str(shape)[:80]}; allowed: height, width and channels, 1 or more"
        )
    return (shape[0], shape[1], shape[2])


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
