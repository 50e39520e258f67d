"""Batch statistics that are estimated again: against NumPy, and that nothing else changes."""

import contextlib
import dataclasses
import itertools

import jax
import numpy as np
import pytest

from lats_optax.training.config import PruneConfig, TrainConfig
from tests import tiny

BATCHES = 4
CHANNELS = PruneConfig(
    target_sparsity=0.5, granularity="output-channels", include=("Conv_0/kernel",)
)


def statistics_of(params, seed):
    """Means over the first batches of the mean and the variance of what is normalized."""
    model, found = tiny.Model(), []
    batches = tiny.make_dataset().train_batches(8, seed=seed, shard_index=0, shard_count=1)
    with contextlib.closing(batches):
        for batch in itertools.islice(batches, BATCHES):
            _, sown = model.apply(
                {"params": params},
                batch["image"],
                train=True,
                mutable=["batch_stats", "intermediates"],
                capture_intermediates=lambda module, _: module.name == "Conv_0",
            )
            maps = np.asarray(sown["intermediates"]["Conv_0"]["__call__"][0], np.float64)
            found.append((maps.mean(axis=(0, 1, 2)), maps.var(axis=(0, 1, 2))))
    mean, var = (np.mean(each, axis=0) for each in zip(*found))
    return {"BatchNorm_0": {"mean": mean, "var": var}}


@pytest.mark.slow
@pytest.mark.parametrize("devices", [8, 1])
def test_statistics_are_those_of_the_weights(tmp_path, devices):
    config = tiny.config(
        tmp_path / "run", prune=CHANNELS, bn_recalibration_batches=BATCHES, ema_decay=0.9
    )
    found = tiny.train(config, jax.devices()[:devices]).state
    # Averages are evaluated where the weights are not zero.
    averages = jax.tree.map(lambda a, w: a * (w != 0), found.average.params, found.params)
    averages["Dense_0"] = found.average.params["Dense_0"]
    for params, stats in (
        (found.params, found.batch_stats),
        (averages, found.average.batch_stats),
    ):
        expected = statistics_of(params, config.seed)
        jax.tree.map(
            lambda own, wanted: np.testing.assert_allclose(own, wanted, rtol=2e-5, atol=1e-6),
            stats,
            expected,
        )
    # What is trained does not depend on statistics that training does not look at.
    plain = dataclasses.replace(config, bn_recalibration_batches=0, workdir=tmp_path / "plain")
    without = tiny.train(plain, jax.devices()[:devices]).state
    jax.tree.map(np.testing.assert_array_equal, found.params, without.params)
    running = jax.tree.leaves(without.batch_stats)
    assert not all(map(np.array_equal, jax.tree.leaves(found.batch_stats), running))


def test_how_many_batches():
    assert TrainConfig().recalibration_batches == 0
    assert TrainConfig(prune=PruneConfig(0.5)).recalibration_batches == 50
    assert TrainConfig(prune=CHANNELS).recalibration_batches == 50
    assert TrainConfig(prune=CHANNELS, bn_recalibration_batches=0).recalibration_batches == 0
    assert TrainConfig(bn_recalibration_batches=7).recalibration_batches == 7
    with pytest.raises(
        ValueError, match=r"bn_recalibration_batches is -1; allowed: None, or 0 or more\."
    ):
        TrainConfig(bn_recalibration_batches=-1)
