"""The seeded weights that the recorded logits were computed with, as Flax variables.

How they are drawn is described in `tests/reference/README.md`. There, names and layouts are those
of PyTorch; here, of the zoo; every name of a recording must find its place.
"""

import json
import re
import zlib

import numpy as np
from flax import traverse_util

# Path of a PyTorch module -> path of the layer in the zoo, first match wins.
RESNET = [
    (r"conv1", "stem"),
    (r"bn1", "stem_norm"),
    (r"fc", "classifier"),
    (r"layer(\d)\.(\d+)\.conv(\d)", lambda m: f"stage{m[1]}_block{int(m[2]) + 1}/conv{m[3]}"),
    (r"layer(\d)\.(\d+)\.bn(\d)", lambda m: f"stage{m[1]}_block{int(m[2]) + 1}/norm{m[3]}"),
    (r"layer(\d)\.0\.downsample\.0", r"stage\1_block1/shortcut"),
    (r"layer(\d)\.0\.downsample\.1", r"stage\1_block1/shortcut_norm"),
]
MOBILENET = [
    (r"model\.0\.0", "stem"),
    (r"model\.0\.1", "stem_norm"),
    (r"fc", "classifier"),
    (r"model\.(\d+)\.0", r"block\1/depthwise"),
    (r"model\.(\d+)\.1", r"block\1/depthwise_norm"),
    (r"model\.(\d+)\.3", r"block\1/pointwise"),
    (r"model\.(\d+)\.4", r"block\1/pointwise_norm"),
]


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


def path_of(module, names):
    for pattern, path in names:
        if match := re.fullmatch(pattern, module):
            return path(match) if callable(path) else match.expand(path)
    raise AssertionError(f"{module} has no place")


def placed(name, value, names):
    """Path in the variables and the array in Flax's layout."""
    module, _, leaf = name.rpartition(".")
    path = path_of(module, names)
    if path == "classifier" and leaf == "weight":
        return f"params/{path}/kernel", value.reshape(value.shape[:2]).T
    if value.ndim == 4:
        return f"params/{path}/kernel", value.transpose(2, 3, 1, 0)
    collection, leaf = {
        "weight": ("params", "scale"),
        "bias": ("params", "bias"),
        "running_mean": ("batch_stats", "mean"),
        "running_var": ("batch_stats", "var"),
    }[leaf]
    return f"{collection}/{path}/{leaf}", value


def variables_of(recording, names):
    """Flax variables, float64, from the list of names and shapes of a recording."""
    params, seed = json.loads(str(recording["params"])), int(recording["seed"])
    flat = dict(placed(name, drawn(name, shape, seed), names) for name, shape in params)
    assert len(flat) == len(params)
    return traverse_util.unflatten_dict(flat, sep="/")


def images_of(recording):
    """Images (batch, height, width, channels), float64."""
    rng = np.random.default_rng(int(recording["seed"]) + 7)
    return rng.normal(size=recording["image_shape"]).transpose(0, 2, 3, 1)
