"""What `lats-inspect model` is asked for, and what comes of it."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn

import lats_optax
from lats_optax import models
from lats_optax.analysis.macs import MacsReport
from lats_optax.analysis.model import ModelReport, in_short, inspect_model
from lats_optax.files.storage import URL
from lats_optax.plots import style
from lats_optax.plots.model import draw_model
from lats_optax.training.export import differences, find_model, load_model, variables_of


@dataclasses.dataclass(frozen=True)
class ModelRequest:
    """Inspect a sparse model: its layers, zeros and MACs, as a table and a plot."""

    file: tyro.conf.Positional[Path | URL]
    """A model file of lats-train, the work directory of a run, or any file of save_sparse."""
    model: str | None = None
    """The model of the zoo that the parameters belong to, for a file without that description."""
    image_shape: tuple[int, int, int] | None = None
    """Height, width and channels of the image that MACs are counted for; None: the file's."""
    out: Path | URL | None = None
    """The plot to write; one that is there is replaced. None: model.png beside the model."""

    def __post_init__(self) -> None:
        if self.out is not None:
            style.check_path(self.out)
        if self.image_shape is not None and min(self.image_shape) < 1:
            raise ValueError(f"image_shape is {self.image_shape}; allowed: three of 1 or more.")
        if self.model is not None and self.image_shape is None:
            raise ValueError(
                f"model is {self.model!r} and image_shape is None; allowed: both, as in "
                "--model resnet50 --image-shape 224 224 3."
            )


@dataclasses.dataclass(frozen=True)
class Inspected:
    """A file that was asked for, read and measured.

    Attributes:
      path: of the file.
      report: what is in it.
      call: what was counted, or why nothing was.
      file_bytes: of the file.
      dense_bytes: of its arrays, zeros included.
    """

    path: Path | URL
    report: ModelReport
    call: str
    file_bytes: int
    dense_bytes: int


def plot_path(request: ModelRequest) -> Path | URL:
    """Where the plot goes.

    Raises:
      FileNotFoundError: there is no such file beside which it would be.
    """
    return request.out or find_model(request.file).parent / "model.png"


def inspect_file(request: ModelRequest) -> Inspected:
    """Reads and measures the file; writes nothing.

    Args:
      request: the file, and what it does not say of itself.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged or foreign, or not of the model that is named.
    """
    path = find_model(request.file)
    found = _read(path, request)
    if not jax.tree.leaves(found.params):
        raise ValueError(f"{path} holds no parameters")
    macs = None
    call = "not counted: the file does not name its model; --model and --image-shape do"
    if found.model is not None:
        macs = _count(found)
        dense, effective = macs.dense, macs.effective or 0
        call = (
            f"{_short(dense)} dense, {_short(effective)} effective ({_share(effective, dense)}), "
            f"for an image of {'×'.join(map(str, found.image_shape))}"
        )
    return Inspected(
        path,
        inspect_model(found.params, macs),
        call,
        path.stat().st_size,
        sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(found.tree)),
    )


def write_report(inspected: Inspected, out: Path | URL) -> str:
    """Writes the plot.

    Args:
      inspected: of :func:`inspect_file`.
      out: where to.

    Returns:
      The table, and where the plot is, as lines of plain text.
    """
    size, dense = inspected.file_bytes, inspected.dense_bytes
    share = _share(size, dense)
    sizes = f"{_short(size, 'B')}, {share} of the {_short(dense, 'B')} that its arrays take dense"
    draw_model(out, inspected.report, f"{inspected.path}: {sizes}")
    lines = [
        str(inspected.report),
        "",
        f"MACs           {inspected.call}",
        f"file           {sizes}",
        f"plot           {out}",
    ]
    return "\n".join(lines)


def _short(number: int, unit: str = "") -> str:
    value, prefix = in_short(number)
    return f"{value:.3g} {prefix}{unit}".rstrip()


def _share(part: int, whole: int) -> str:
    return f"{part / whole if whole else 1:.1%}"


class _Found(NamedTuple):
    """The contents of a file: its arrays, its model and the shape of its images."""

    tree: Any
    params: Any
    batch_stats: Any = None
    model: nn.Module | None = None
    image_shape: tuple[int, ...] = ()


def _read(path: Path | URL, request: ModelRequest) -> _Found:
    if request.model is None and {"model", "image_shape"} <= lats_optax.read_metadata(path).keys():
        saved = load_model(path)
        tree, image_shape = saved.variables, request.image_shape or saved.image_shape
        return _Found(tree, tree["params"], tree["batch_stats"], saved.model, image_shape)
    tree = lats_optax.load_sparse(path)
    variables = tree if isinstance(tree, Mapping) and "params" in tree else {"params": tree}
    params = variables["params"]
    if request.model is None:
        return _Found(tree, params)
    assert request.image_shape is not None
    try:
        classes = params["classifier"]["kernel"].shape[-1]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} has no classifier/kernel, as the models of the zoo do") from error
    model = models.create(request.model, num_classes=classes)
    with _explained(request.image_shape):
        expected = variables_of(model, request.image_shape)
    if wrong := differences({"batch_stats": expected["batch_stats"], **variables}, expected):
        raise ValueError(f"{path}: its arrays are not those of {request.model}: {wrong}")
    return _Found(tree, params, expected["batch_stats"], model, request.image_shape)


def _count(found: _Found) -> MacsReport:
    model = found.model
    assert model is not None
    images = jax.eval_shape(lambda: jnp.zeros((1, *found.image_shape)))

    def call(params: Any, batch_stats: Any, images: Any) -> Any:
        return model.apply({"params": params, "batch_stats": batch_stats}, images, train=False)

    with _explained(found.image_shape):
        return lats_optax.count_macs(call, found.params, found.batch_stats, images)


@contextlib.contextmanager
def _explained(image_shape: tuple[int, ...]) -> Iterator[None]:
    """Turns a layer's error about images into one line."""
    try:
        yield
    except Exception as error:
        shape = "×".join(map(str, image_shape))
        problem = " ".join(str(error).split()).partition(" (https:")[0]
        raise ValueError(f"the model takes no images of {shape}: {problem[:300]}") from error
