"""From the file of a model with dead channels to that of a smaller one with the same outputs."""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn

import lats_optax
from lats_optax import compaction
from lats_optax.files.storage import URL, as_path, has_room
from lats_optax.training.export import ModelFile, SavedModel, find_model, load_model, save_model

_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class CompactRequest:
    """Make a physically smaller model of one with dead channels; its outputs stay the same."""

    file: tyro.conf.Positional[Path | URL]
    """A model file of lats-train, or the work directory of a run."""
    out: Path | URL = Path("compact.safetensors")
    """The model file to write; --init-from of lats-train begins from it."""
    overwrite: bool = False
    """Replace a file of that name."""
    multiple_of: int = 1
    """Round the channels of each layer up to a multiple of this; hardware may be faster for it."""


@dataclasses.dataclass(frozen=True)
class Compaction:
    """A model and its smaller one, compared.

    Attributes:
      report: what was cut, and why the rest stays.
      small: the smaller model, ready to be saved.
      macs: MACs for one image, before and after.
      difference: the largest between their logits, as a fraction of the largest logit, on random
        images.
      before: the file that was read.
    """

    report: compaction.CompactReport
    small: SavedModel
    macs: tuple[int, int]
    difference: float
    before: ModelFile


def compact_file(request: CompactRequest) -> Compaction:
    """Reads the file, makes the smaller model and compares the two; writes nothing.

    Args:
      request: names the file, and where the smaller one shall be.

    Raises:
      FileExistsError: there is a file where one is to be written, and `overwrite` is False.
      FileNotFoundError: there is no such file, or no directory to write to.
      ValueError: the file is not one of a model; a layer would be left without a channel; or the
        outputs differ by more than rounding explains.
    """
    path, out = find_model(request.file), as_path(request.out, "out")
    if not has_room(out):
        raise FileNotFoundError(f"there is no directory {out.parent} to write to")
    if out.exists() and not request.overwrite:
        raise FileExistsError(f"{out} is there: --overwrite replaces it, --out names others")
    saved = load_model(path)
    model, variables, report = compaction.compact(
        saved.model, saved.variables, multiple_of=request.multiple_of
    )
    small = saved._replace(model=model, variables=variables)
    count = max(1, min(_IMAGES, 2**24 // math.prod(saved.image_shape)))  # within some memory
    images = np.random.default_rng(0).normal(size=(count, *saved.image_shape))
    logits = [_logits(which, jnp.asarray(images, jnp.float32)) for which in (saved, small)]
    difference = float(np.abs(logits[0] - logits[1]).max() / np.abs(logits[0]).max())
    # Sixteen bits are rounded again in every layer.
    limit = 1e-3 if jnp.dtype(saved.model.dtype).itemsize >= 4 else 0.1
    if not difference <= limit:
        raise ValueError(
            f"{path}: the outputs of the smaller model differ by {difference:.1e} of the largest, "
            f"which rounding does not explain (allowed: {limit:g})"
        )
    counts = (_macs(saved), _macs(small))
    return Compaction(report, small, counts, difference, ModelFile.written(path, saved.variables))


def write_model(found: Compaction, out: Path | URL) -> str:
    """Writes the file of the smaller model.

    Args:
      found: of `compact_file`.
      out: where to.

    Returns:
      The report and the sizes, as lines of plain text.
    """
    out = as_path(out, "out")
    save_model(out, *found.small)
    before, after = found.macs
    lines = [
        str(found.report),
        "",
        f"MACs           {before:,} -> {after:,} for an image, {after / before:.1%}",
        f"outputs        equal to {found.difference:.1e} of the largest, on random images",
        f"before         {found.before}",
        f"written        {ModelFile.written(out, found.small.variables)}",
    ]
    return "\n".join(lines)


def _logits(saved: SavedModel, images: jax.Array) -> np.ndarray:
    return np.asarray(jax.jit(_evaluation(saved.model))(saved.variables, images), np.float64)


def _macs(saved: SavedModel) -> int:
    image = jax.eval_shape(lambda: jnp.zeros((1, *saved.image_shape)))
    counted = lats_optax.count_macs(_evaluation(saved.model), saved.variables, image)
    return counted.dense


def _evaluation(model: nn.Module) -> Any:
    return partial(model.apply, train=False)
