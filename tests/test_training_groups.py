"""Structured runs of the trainer: what they zero, what they leave alone, and what is refused."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

import lats_optax
from lats_optax import prox
from lats_optax.training import checkpoint
from lats_optax.training.config import PruneConfig
from lats_optax.training.config_json import check_resumable, prune_from_json, to_json
from lats_optax.training.optimizer import group_operator, pruned_mask
from tests import tiny
from tests.properties import GROUPS

OUTPUTS = PruneConfig(0.5, granularity="output-channels")
BLOCKS = PruneConfig(0.5, granularity="blocks", block=(4, 3))
PATTERN = PruneConfig(0.5, granularity="n-of-m", pattern=(2, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prune", "groups"),
    [
        (dataclasses.replace(OUTPUTS, include=("^Conv_0",)), "output_channels"),
        (dataclasses.replace(BLOCKS, mode="early", search_epochs=1), "blocks"),
        (
            PruneConfig(
                0.5, granularity="input-channels", mode="at-initialization", search_epochs=1
            ),
            "input_channels",
        ),
    ],
    ids=["output-channels", "early-blocks", "at-initialization-input-channels"],
)
def test_a_run_ends_with_whole_groups_at_zero(tmp_path, prune, groups):
    config = tiny.config(tmp_path / "run", prune=prune, epochs=2, eval_every=2, checkpoint_every=2)
    result = tiny.train(config, jax.devices()[:1])
    report, params = result.sparsity, jax.device_get(result.state.params)
    arrays = {"/".join(k.key for k in path): w for path, w in jax.tree.leaves_with_path(params)}
    total, dead, largest, zeros = 0, 0, 0, 0
    pruned = [layer for layer in report.layers if layer.prunable]
    for layer in pruned:
        kernel = arrays[layer.path]
        for where in GROUPS[groups](kernel.shape):
            group = kernel[where]
            assert np.all(group == 0) or np.all(group != 0)
            total, dead = total + 1, dead + int(np.all(group == 0))
            largest, zeros = max(largest, group.size), zeros + int((group == 0).sum())
    assert (report.groups, report.zero_groups, report.zeros) == (total, dead, zeros)
    assert 0 < dead < total
    assert round(0.5 * report.size) <= zeros < round(0.5 * report.size) + largest
    assert f"{dead:,} of {total:,}" in str(report)
    for layer in set(report.layers) - set(pruned):
        assert np.all(arrays[layer.path] != 0) or "bias" in layer.path

    if prune.mode == "during-training":
        state = checkpoint.load_state(config.workdir)
        operator = group_operator(prune, prox.prox_power(math.inf))
        found = lats_optax.finalize(state.params, state.opt_state, operator=operator)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a == 0, b == 0), found, params)


@pytest.mark.slow
def test_a_run_ends_with_two_of_every_four(tmp_path):
    config = tiny.config(tmp_path / "run", prune=PATTERN, epochs=2, eval_every=2)
    result = tiny.train(config, jax.devices()[:1])
    report, state = result.sparsity, result.state
    assert report.zero_groups == report.groups == report.size // 4 > 0
    assert report.zeros == report.size / 2
    assert "2:4 groups" in str(report)
    operator = group_operator(PATTERN, prox.prox_l1)
    found = lats_optax.finalize(state.params, state.opt_state, operator=operator)
    for exact, w in zip(jax.tree.leaves(found), jax.tree.leaves(state.params)):
        np.testing.assert_array_equal(exact == 0, w == 0)


NETWORK = {
    "classifier/kernel": (64, 10),
    "depthwise/kernel": (3, 3, 1, 64),
    "norm/scale": (64,),
    "pointwise/kernel": (1, 1, 64, 64),
    "stem/kernel": (3, 3, 3, 64),
}


@pytest.mark.parametrize(
    ("prune", "left_out"),
    [
        (PruneConfig(0.5), set()),
        (OUTPUTS, {"classifier"}),
        (BLOCKS, set()),
        (PruneConfig(0.5, granularity="input-channels"), {"depthwise"}),
        (PruneConfig(0.5, granularity="filters"), {"classifier"}),
        (PATTERN, {"depthwise", "stem"}),
        (dataclasses.replace(OUTPUTS, exclude=("^stem",)), {"classifier", "stem"}),
        (
            dataclasses.replace(OUTPUTS, include=("^(classifier|stem)/kernel",)),
            {"depthwise", "pointwise"},
        ),
    ],
)
def test_what_a_structure_leaves_alone_by_default(prune, left_out):
    layers = {name.split("/")[0]: name for name in NETWORK}
    params = {
        layer: {name.split("/")[1]: jax.ShapeDtypeStruct(NETWORK[name], "float32")}
        for layer, name in layers.items()
    }
    mask = pruned_mask(prune)(params)
    chosen = {layer for layer in layers if all(mask[layer].values())}
    assert chosen == set(layers) - left_out - {"norm"}


def test_a_layer_without_such_groups_is_one_line(tmp_path):
    prune = PruneConfig(0.5, granularity="filters", include=("kernel$",))
    config = tiny.config(tmp_path / "run", prune=prune)
    with pytest.raises(ValueError, match=r"^operator: it does not fit Dense_0/kernel") as caught:
        tiny.train(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_from_before_there_were_structures_goes_on(tmp_path):
    plain = tiny.config(tmp_path, prune=PruneConfig(0.5))
    saved = json.loads(json.dumps(to_json(plain)))
    for newer in ("granularity", "block", "pattern", "operator", "reach"):
        del saved["prune"][newer]
    check_resumable(saved, plain)
    assert prune_from_json(saved) == plain.prune
    with pytest.raises(ValueError, match=r"prune\.granularity is 'output-channels' and was 'none'"):
        check_resumable(saved, dataclasses.replace(plain, prune=OUTPUTS))
    restored = json.loads(json.dumps(to_json(dataclasses.replace(plain, prune=BLOCKS))))
    assert prune_from_json(restored) == BLOCKS
