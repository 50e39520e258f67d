"""The seeded weights that the recorded logits were computed with, as Flax variables.

How they are drawn is described in `tests/reference/README.md`. There, names and layouts are those
of PyTorch, which `lats_optax.torch.weights` turns into the zoo's.
"""

import json
import zlib

import numpy as np

from lats_optax.torch import weights


def drawn(name, shape, seed):
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if len(shape) > 1:
        return rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
    if "running_var" in name:
        return rng.uniform(0.5, 1.5, size=shape)
    if "running_mean" in name:
        return rng.normal(size=shape) * 0.1
    if name.endswith("weight"):
        return rng.uniform(0.5, 1.5, size=shape)
    return rng.normal(size=shape) * 0.1


def state_dict_of(recording):
    """Name -> array, float64, from the list of names and shapes of a recording."""
    params, seed = json.loads(str(recording["params"])), int(recording["seed"])
    return {name: drawn(name, shape, seed) for name, shape in params}


def variables_of(recording, model):
    """Flax variables, float64; every tensor of the recording must find its place."""
    return weights.variables_from_torch(state_dict_of(recording), model)


def images_of(recording):
    """Images (batch, height, width, channels), float64."""
    rng = np.random.default_rng(int(recording["seed"]) + 7)
    return rng.normal(size=recording["image_shape"]).transpose(0, 2, 3, 1)
