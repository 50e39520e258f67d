"""What a run begins from in the place of random weights: a model file, checked against the run."""

import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

import lats_optax
from lats_optax import models
from lats_optax.files.storage import URL
from lats_optax.masks import MaskOrFunction
from lats_optax.training.config import TrainConfig
from lats_optax.training.export import SavedModel, differences, load_model, variables_of

_STRAY = 0.01
"""Zeros up to this part of the weights are nobody's work: those of a dead unit, or of chance."""


def load_initial(
    path: Path | URL,
    config: TrainConfig,
    wanted: nn.Module,
    image_shape: tuple[int, ...],
    mask: MaskOrFunction,
) -> SavedModel:
    """The model file that a run begins from.

    Args:
      path: of the file.
      config: the run.
      wanted: the model that the config names. That of the file is taken: it may have options that
        no config can name, such as the channels of a compacted one. Those that the config does
        name are the same, and so are the model's name and the number of classes.
      image_shape: (height, width, channels) of the run's images.
      mask: the weights whose zeros stay in mode fine-tuning.

    Returns:
      The file's model, with the dtype and axis of the wanted one, and its variables in the types
      that a run trains.

    Warns:
      UserWarning: it has zeros that the run does not keep.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no model file; its model or arrays are not those of the run (the message
        names the options, or the paths and shapes); an array is not finite; or fine-tuning finds
        no zeros in it.
    """

    def require(holds: bool, problem: str) -> None:
        if not holds:
            raise ValueError(f"init_from is {str(config.init_from)!r}: {problem}.")

    if not path.is_file():
        raise FileNotFoundError(f"init_from is {str(path)!r}; allowed: a model file that is there.")
    saved = load_model(path)
    has, wants = models.describe(saved.model), models.describe(wanted)
    given = ("name", "num_classes", *config.model.options)
    differing = [
        f"its model's {option} is {has.get(option)!r} and the run's is {wants[option]!r}"
        for option in given
        if has.get(option) != wants[option]
    ]
    require(not differing, ", ".join(differing))
    model = saved.model.clone(
        dtype=wanted.dtype,
        axis_name=wanted.axis_name,
    )
    expected = variables_of(model, image_shape)
    problem = differences(saved.variables, expected)
    require(not problem, f"its arrays do not fit images of shape {[*image_shape]}: {problem}")
    variables: dict[str, Any] = jax.tree.map(
        lambda array, like: array.astype(like.dtype), saved.variables, expected
    )
    finite = all(bool(np.isfinite(array).all()) for array in jax.tree.leaves(variables))
    require(finite, "it holds numbers that are not finite")
    report = lats_optax.sparsity(variables["params"], mask)
    if config.prune.mode == "fine-tuning":
        zeros = report.zeros
        require(zeros > 0, "no weight of it that is pruned is zero, so nothing would stay zero")
    elif report.sparsity > max(config.prune.target_sparsity or 0, _STRAY):
        warnings.warn(
            f"init_from is {str(config.init_from)!r}, of whose weights {report.sparsity:.2%} are "
            "zero: this run trains them too, and they do not stay zero. --prune.mode fine-tuning, "
            "without a target_sparsity or final_threshold, keeps them zero",
            UserWarning,
            stacklevel=2,
        )
    return saved._replace(model=model, variables=variables)
