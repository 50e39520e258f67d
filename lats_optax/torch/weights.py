"""Weights in and out of PyTorch: state dicts, and the files that hold them, to variables and back.

Here belongs how arrays are laid out, checked and thresholded on their way. What they are called is
in `names.py`, the file formats in `state_dicts.py`. Dtypes are kept and, where nothing is
thresholded, bits.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from lats_optax.checks.arrays import FLOATS, Shape, misfits
from lats_optax.checks.numbers import check_threshold
from lats_optax.checks.options import check, check_choice
from lats_optax.compatibility import enable_x64
from lats_optax.prox import prox_l1
from lats_optax.torch import state_dicts
from lats_optax.torch.names import Form, form_of
from lats_optax.torch.state_dicts import to_numpy

# What training scripts wrap a state dict in: the published LATS and STR code, and torchvision's.
_WRAPPERS = ("state_dict", "model")
_EPOCH = "epoch"  # how many epochs a checkpoint of those two was trained for
_COUNTER, _OWN_THRESHOLD = "num_batches_tracked", "sparseThreshold"


def variables_from_torch(
    state_dict: Mapping[str, Any],
    model: nn.Module,
    *,
    threshold: float | Callable[[int], Any] | None = None,
    epoch: int | None = None,
    channels: int = 3,
) -> dict[str, Any]:
    """The variables of a model of the zoo, from a PyTorch state dict.

    Published checkpoints of soft threshold pruning hold latent weights θ; the weights that the
    network ran on are ``S_d(θ) = sign(θ) max(|θ| − d, 0)``. LATS has one number d, which is not in
    the checkpoint; STR has ``d = σ(sparseThreshold)`` of each layer, which is. LATS raises d in
    every epoch, to D in the last; ``model_best.pth`` is of the most accurate epoch, often an
    earlier one, whose d is lower.

    Args:
      state_dict: name -> array (a NumPy or JAX array or a tensor of PyTorch), of float16, bfloat16,
        float32 or float64. The names may all begin with ``module.``, and the whole may be wrapped
        as ``{"state_dict": …}`` or ``{"model": …}``. ``num_batches_tracked`` is passed over.
      model: a `ResNet`, `CifarResNet`, `MobileNetV1`, `VGG16BN`, `SEWResNet` or
        `VisionTransformer`; its classifier may be given as a linear layer or as a 1×1 convolution
        where the published code has either.
      threshold: d ≥ 0, in the units of the weights, where they are latent ones of LATS: all
        convolutions are thresholded, and a classifier without a bias (one with a bias is dense in
        the published code). Or a function of the epochs done, such as `s_lats_threshold` or
        `epoch_lats_threshold` with steps of an epoch each: ``epoch_lats_threshold(100, 1, D)``.
        ``None``: weights as they are, or thresholded as their ``sparseThreshold`` says.
      epoch: how many epochs were done when the checkpoint was written: that at which a function is
        taken, and with a number, that which the number is of. Unless given, it is the ``epoch``
        beside ``state_dict``, where the published code keeps it.
      channels: of the images.

    Returns:
      ``{"params": …, "batch_stats": …}``, the latter where the model has any: NumPy arrays of
      their own, with the dtypes of ``state_dict``; pruned entries are +0.0.

    Raises:
      ValueError: tensors are unknown, missing, misshapen or of another dtype (all of them are
        named); a threshold is given and they have their own; it is a function and no epoch is
        known; the model has no PyTorch form.

    Warns:
      UserWarning: the threshold is a number, and the checkpoint names its epoch, which
        ``epoch`` does not confirm.

    Example:
      >>> from lats_optax import models
      >>> model = models.create("resnet20", num_classes=10)
      >>> init, images = partial(model.init, train=False), np.zeros((1, 32, 32, 3), np.float32)
      >>> shapes = jax.eval_shape(init, jax.random.key(0), images)
      >>> variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), shapes)
      >>> latent = variables_to_torch(variables, model)
      >>> latent["layer1.0.conv1.weight"].shape, latent["linear.weight"].shape
      ((16, 16, 3, 3), (10, 64))
      >>> sparse = variables_from_torch(latent, model, threshold=0.25)
      >>> float(sparse["params"]["classifier"]["kernel"].max())
      0.25

    Source: Chen et al., "A Unified Framework for Soft Threshold Pruning" (ICLR 2023); Kusupati et
    al., "Soft Threshold Weight Reparameterization for Learnable Sparsity" (ICML 2020).
    """
    strength = _strength(threshold, epoch, _own_epoch(state_dict))
    form = form_of(model)
    tensors = _arrays(_unwrapped(state_dict))
    places = _places(model, form, channels, tensors)
    kernels = {name for name, place in places.items() if place.path.endswith("/kernel")}
    own = {f"{name.removesuffix('weight')}{_OWN_THRESHOLD}": name for name in kernels}
    wanted = {
        **{name: set(place.shapes.values()) for name, place in places.items()},
        **{name: {(1, 1), (1,), ()} for name in own if name in tensors},
    }
    counters = set(_counters(places))
    given = {name: tensor for name, tensor in tensors.items() if name not in counters}
    _check_fit("the state dict", given, wanted, model)

    strengths: dict[str, Any] = {
        places[kernel].path: _sigmoid(tensors[name].item())
        for name, kernel in own.items()
        if name in tensors
    }
    if strength is not None:
        if strengths:
            names = ", ".join(sorted(own.keys() & tensors.keys()))
            allowed = f"None, since the state dict has its own: {names}"
            check(False, "threshold", threshold, allowed)
        paths = {place.path for place in places.values()}
        dense = {"params/classifier/kernel"} if "params/classifier/bias" in paths else set()
        pruned = {places[name].path for name in kernels} - dense
        strengths = dict.fromkeys(pruned, strength)
    flat = {place.path: _to_flax(tensors[name], place.path) for name, place in places.items()}
    sparse = _thresholded(flat, strengths)
    return traverse_util.unflatten_dict(sparse, sep="/")  # type: ignore[no-untyped-call]


def variables_to_torch(
    variables: Mapping[str, Any], model: nn.Module, *, layout: str | None = None, channels: int = 3
) -> dict[str, np.ndarray]:
    """The PyTorch state dict of a model's variables; `variables_from_torch` is its inverse.

    Args:
      variables: ``{"params": …, "batch_stats": …}``: arrays of float16, bfloat16, float32 or
        float64.
      model: what they are the variables of.
      layout: whose names and shapes. Of a `ResNet` ``"torchvision"``, the default, or ``"lats"``,
        whose classifier is a 1×1 convolution, (classes, features, 1, 1). The others have one each:
        a `MobileNetV1` ``"lats"``; a `VGG16BN` ``"torchvision"`` (its features; the classifier is
        one linear layer); a `CifarResNet` ``"akamaster"`` (pytorch_resnet_cifar10); a `SEWResNet`
        ``"spikingjelly"``; a `VisionTransformer` ``"timm"``.
      channels: of the images.

    Returns:
      Name -> array of its own, with the dtype it had, and ``num_batches_tracked``, int64 zero, of
      every normalization: what ``load_state_dict(strict=True)`` takes once they are tensors.

    Raises:
      ValueError: arrays are unknown, missing, misshapen or of another dtype (all of them are
        named); the model has no such layout, or no PyTorch form.

    Example: see `variables_from_torch`.
    """
    form = form_of(model)
    layout = form.layouts[0] if layout is None else layout
    check_choice(f"layout of {type(model).__name__}", layout, form.layouts)
    known = isinstance(variables, Mapping)
    check(known, "variables", variables, "a mapping with 'params' and 'batch_stats'")
    arrays = _arrays(_flat(variables))
    places = _places(model, form, channels, arrays)
    flax_shapes = {place.path: {place.shape} for place in places.values()}
    _check_fit("the variables", arrays, flax_shapes, model)
    tensors = {
        name: _to_torch(arrays[place.path], place.shapes[layout]) for name, place in places.items()
    }
    return tensors | {name: np.zeros((), np.int64) for name in _counters(places)}


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    threshold: float | Callable[[int], Any] | None = None,
    epoch: int | None = None,
    channels: int = 3,
) -> dict[str, Any]:
    """The variables of a model of the zoo, from a file that holds a PyTorch state dict.

    Args:
      path: ``.safetensors``, which takes the package safetensors; or ``.pt``, ``.pth``, ``.th`` or
        ``.state`` (as the LATS code calls its checkpoints), which take torch, and of which tensors
        and plain Python values are read, never code.
      model: as in `variables_from_torch`, and so are ``threshold``, ``epoch`` and ``channels``.
      threshold: of latent weights, or a function of the epochs done.
      epoch: of the checkpoint, where the file does not say it or a number is the threshold then.
      channels: of the images.

    Returns:
      What ``model.apply(variables, images, train=False)`` takes.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: the package that reads it is missing.
      ValueError: the suffix is another; the file is damaged or holds something else; as
        `variables_from_torch`. Each message names the file.

    Warns:
      UserWarning: as `variables_from_torch`.

    Example: of the published ``model_best.pth``, whose run had 100 epochs and ended at D = 0.01::

      threshold = lats_optax.epoch_lats_threshold(100, 1, final=0.01)
      variables = weights.load("model_best.pth", model, threshold=threshold)
    """
    state_dict = state_dicts.read(Path(path))
    try:
        return variables_from_torch(
            state_dict, model, threshold=threshold, epoch=epoch, channels=channels
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save(
    path: str | os.PathLike[str],
    variables: Mapping[str, Any],
    model: nn.Module,
    *,
    layout: str | None = None,
    channels: int = 3,
) -> None:
    """Writes the PyTorch state dict of a model's variables; `load` is its inverse.

    The file appears whole or not at all; one of that name is replaced.

    Args:
      path: as in `load`.
      variables: as in `variables_to_torch`, and so are ``model``, ``layout`` and ``channels``.
      model: what they are the variables of.
      layout: whose names and shapes.
      channels: of the images.

    Raises:
      FileNotFoundError: there is no directory to write to.
      ImportError: the package that writes it is missing.
      ValueError: the suffix is another; as `variables_to_torch`.

    Example::

      model = models.create("resnet50", num_classes=1000, classifier_bias=True)
      weights.save("resnet50.safetensors", checkpoint.load_variables("runs/mine"), model)
      variables = weights.load("resnet50.safetensors", model)
    """
    tensors = variables_to_torch(variables, model, layout=layout, channels=channels)
    state_dicts.write(Path(path), tensors)


# --- what a model has ---------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a tensor lies in the variables, its shape there, and that in each layout."""

    path: str
    shape: Shape
    shapes: dict[str, Shape]


def _places(
    model: nn.Module, form: Form, channels: int, arrays: Mapping[str, np.ndarray]
) -> dict[str, _Place]:
    """Name in the state dict -> place, of everything but the counters."""
    check(channels >= 1, "channels", channels, "1 or more")
    size = form.image(model, {name: array.shape for name, array in arrays.items()})
    images = np.broadcast_to(np.float32(0), (1, size, size, channels))
    # A model may compute in float64, at which JAX else warns.
    with enable_x64(True):
        shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    return {
        form.name(path): _Place(
            path, leaf.shape, {of: _torch_shape(path, leaf.shape, of) for of in form.layouts}
        )
        for path, leaf in _flat(shapes).items()
    }


def _flat(variables: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = traverse_util.flatten_dict(  # type: ignore[no-untyped-call]
        dict(variables), sep="/"
    )
    return flat


def _torch_shape(path: str, shape: Shape, layout: str) -> Shape:
    if not path.endswith("/kernel"):
        return shape
    *window, inputs, outputs = shape
    return (outputs, inputs, *(window or ([1, 1] if layout == "lats" else [])))


def _counters(places: Iterable[str]) -> Iterable[str]:
    ending = "running_mean"
    return (name.removesuffix(ending) + _COUNTER for name in places if name.endswith(ending))


def _check_fit(
    what: str, given: Mapping[str, Any], wanted: Mapping[str, set[Shape]], model: nn.Module
) -> None:
    """Raises ValueError, naming each array that is too many, too few or not as it should be."""
    problems = misfits(given, wanted, FLOATS)
    if not problems:
        return
    form = form_of(model)
    bias = (form.name("params/classifier/bias"), "params/classifier/bias")
    if any((name in given) != (name in wanted) for name in bias):
        problems.append("The model's classifier_bias says whether its classifier has a bias.")
    if form.note:
        problems.append(form.note)
    raise ValueError("\n  ".join([f"{what} and {type(model).__name__} do not fit:", *problems]))


# --- thresholds ---------------------------------------------------------------------------------


def _own_epoch(checkpoint: Any) -> int | None:
    """The epochs that a checkpoint says it was trained for, if it says so."""
    wrapped = isinstance(checkpoint, Mapping) and any(key in checkpoint for key in _WRAPPERS)
    found = checkpoint.get(_EPOCH) if wrapped else None
    return found if type(found) is int else None


def _strength(
    threshold: float | Callable[[int], Any] | None, epoch: int | None, own: int | None
) -> float | None:
    """The threshold of a checkpoint, of an epoch that is given or that it says itself."""
    if epoch is not None:
        whole = type(epoch) is int and epoch >= 0
        check(whole, "epoch", epoch, "None, or an integer of 0 or more")
    if threshold is None:
        return None
    if callable(threshold):
        at = own if epoch is None else epoch
        if at is None:
            raise ValueError(
                "epoch is None; allowed: an integer of 0 or more, since the state dict does not "
                "name its epoch."
            )
        # A schedule holds its last value, and so would answer for a longer run than its own.
        steps = getattr(threshold, "steps", math.inf)
        check(at <= steps, "epoch", at, f"0 to {steps}, the steps of the threshold's schedule")
        return check_threshold(f"threshold at epoch {at}", threshold(at))
    strength = check_threshold("threshold", threshold)
    if own is not None and epoch != own:
        warnings.warn(
            f"threshold: {strength:g} is taken, and the checkpoint is of epoch {own}; unless that "
            "was the last, the threshold was lower then. Pass a function of the epoch, such as "
            f"epoch_lats_threshold(epochs, 1, {strength:g}), or, where {strength:g} is that of "
            f"epoch {own}, epoch={own}",
            UserWarning,
            stacklevel=3,
        )
    return strength


# --- arrays -------------------------------------------------------------------------------------


def _unwrapped(state_dict: Any) -> Mapping[str, Any]:
    """A state dict without what training scripts and DataParallel put around it."""
    for key in _WRAPPERS:
        if isinstance(state_dict, Mapping) and isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    if not isinstance(state_dict, Mapping) or not all(isinstance(name, str) for name in state_dict):
        kind = type(state_dict).__name__
        raise ValueError(f"the state dict is a {kind}; allowed: a mapping from names to arrays.")
    if all(name.startswith("module.") for name in state_dict):
        return {name.removeprefix("module."): value for name, value in state_dict.items()}
    return state_dict


def _arrays(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    arrays, problems = {}, []
    for name, value in values.items():
        try:
            arrays[name] = to_numpy(value)
        except (TypeError, ValueError, RuntimeError) as error:  # ragged, sparse, eight bits
            problems.append(f"{name} is no dense array: {error}")
    if problems:
        raise ValueError("\n  ".join(["these cannot be taken:", *problems]))
    return arrays


def _to_flax(tensor: np.ndarray, path: str) -> np.ndarray:
    if not path.endswith("/kernel"):
        return tensor.copy()
    # A classifier may be a 1×1 convolution.
    if tensor.ndim == 2 or path == "params/classifier/kernel":
        return tensor.reshape(tensor.shape[:2]).T.copy()
    return tensor.transpose(2, 3, 1, 0).copy()


def _to_torch(array: np.ndarray, shape: Shape) -> np.ndarray:
    outputs_first = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim, range(array.ndim))
    return array.transpose(outputs_first).reshape(shape).copy()


def _thresholded(
    flat: dict[str, np.ndarray], strengths: Mapping[str, float]
) -> dict[str, np.ndarray]:
    latent = {path: flat[path] for path in strengths}
    # Compiled at once, for one by one it takes seconds; x64 keeps what is float64.
    with enable_x64(True):
        sparse = jax.device_get(jax.jit(prox_l1)(latent, dict(strengths)))
    return flat | {path: np.array(kernel) for path, kernel in sparse.items()}


def _sigmoid(x: float) -> float:
    # In the form whose exponential cannot overflow: STR begins at -12800 for some networks.
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
