"""Runs of two phases: early pruning and pruning at initialization, and what is resumed of them."""

import dataclasses
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lats_optax
from lats_optax.training import assembly
from lats_optax.training.config import PruneConfig, TrainConfig
from lats_optax.training.config_json import prune_from_json, to_json
from lats_optax.training.optimizer import cosine, make_optimizer, schedule_to
from tests import matrix, tiny
from tests.runs import BEFORE, EARLY, assert_equal_runs, at_step, events, plain_steps

STEPS = 6  # an epoch of tests.tiny


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["early", "at-initialization"])
def test_a_run_is_the_plain_loop(tmp_path, mode):
    early = mode == "early"
    prune = dataclasses.replace(EARLY, mode=mode)
    config = tiny.config(tmp_path / "run", prune=prune)
    result = tiny.train(config, jax.devices()[:1])
    total = 18 if early else 24
    assert int(result.state.step) == result.metrics[-1]["step"] == total
    assert result.sparsity.zeros == round(0.75 * result.sparsity.size)
    # From the search on, no weight dies or revives, and there are no latent ones.
    searched, *frozen = [r for r in result.metrics if r["split"] == "weights"]
    zeros = result.sparsity.zeros
    assert [searched[key] for key in ("step", "zeros", "pruned", "revived")] == [6, zeros, zeros, 0]
    assert len(frozen) == total / 6 - 1
    assert {(r["zeros"], r["pruned"], r["revived"]) for r in frozen} == {(zeros, 0, 0)}
    tags = events(config.workdir)
    assert tags["latent/Conv_0/kernel"].keys() == {6}
    assert len(tags["sparse/Conv_0/kernel"]) == total / 6
    assert all(layer.latent is layer.threshold is None for layer in result.weights.values())

    # The oracle: one transform that freezes by itself; or a search, and masked sgd from scratch.
    batches = [b for _, b in zip(range(total), tiny.make_dataset().train_batches(8, seed=0))]
    key, image = jax.random.key(0), jnp.zeros((1, *tiny.SHAPE))
    first = tiny.Model().init(key, image, train=False)
    rate = optax.cosine_decay_schedule(0.05, 3 * STEPS)
    decay, sgd = optax.add_decayed_weights(1e-3), optax.sgd(rate, momentum=0.9)
    if early:
        target = lats_optax.target_sparsity(0.75, rate, STEPS)
        tx = lats_optax.soft_threshold(target, inner=optax.chain(decay, sgd), freeze_after=STEPS)
        params, stats = first["params"], first["batch_stats"]
        params, stats = plain_steps(params, stats, tx, tx.init(params), batches)
    else:
        quick = lambda count: rate(3 * count)  # noqa: E731
        target = lats_optax.target_sparsity(0.75, quick, STEPS)
        tx = lats_optax.soft_threshold(
            target, inner=optax.chain(decay, optax.sgd(quick, momentum=0.9))
        )
        params, stats = first["params"], first["batch_stats"]
        found, _ = plain_steps(params, stats, tx, tx.init(params), batches[:STEPS])
        alive = jax.tree.map(lambda w: (w != 0) if w.ndim > 1 else jnp.ones(w.shape), found)
        params = jax.tree.map(lambda w, kept: w * kept, params, alive)
        tx = optax.chain(
            decay,
            sgd,
            optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, alive)),
        )
        params, stats = plain_steps(params, stats, tx, tx.init(params), batches[STEPS:])
    state = jax.device_get(result.state)
    for got, expected in ((state.params, params), (state.batch_stats, stats)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


@pytest.mark.slow
def test_two_programs_and_a_threshold_while_there_is_one(tmp_path, monkeypatch):
    traces = tiny.count_calls(monkeypatch, assembly, "train_step")
    result = tiny.train(tiny.config(tmp_path / "run", prune=EARLY))
    assert len(traces) == 2
    train = [r for r in result.metrics if r["split"] == "train"]
    assert [r["step"] for r in train if "threshold" in r] == [4, 6]
    # From the end of the search on, the zeros stay what they are.
    assert {r["sparsity"] for r in train if r["step"] >= 6} == {result.sparsity.sparsity}


@pytest.mark.slow
@pytest.mark.parametrize("prune", [EARLY, BEFORE], ids=["early", "at-initialization"])
@pytest.mark.parametrize("step", [4, 6, 9], ids=["searching", "at-the-end", "frozen"])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, monkeypatch, prune, step):
    # Of the two programs only that after the search takes nine steps.
    watched = {"prune": prune, "ema_decay": 0.9, "log_every": 1}
    straight = tiny.train(tiny.config(tmp_path / "straight", **watched), jax.devices()[:2])
    config = tiny.config(tmp_path / "stopped", **watched)
    stopped_at = step if step <= 6 else 6 + step
    with monkeypatch.context() as context:
        at_step(context, step, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match=f"after step {stopped_at};"):
            tiny.train(config, jax.devices()[:2])
    resumed = tiny.train(dataclasses.replace(config, resume=True), jax.devices()[:2])
    assert_equal_runs(straight, resumed)


@pytest.mark.slow
def test_averages_begin_anew_with_the_weights(tmp_path):
    """After the first step from scratch an average is 9/10 new and 1/10 initial, as in any run."""
    config = tiny.config(tmp_path / "run", prune=BEFORE, ema_decay=0.999, epochs=1)
    ready = tiny.build(config, jax.devices()[:1])
    state = ready.initial_state()
    first = jax.device_get(state.params)
    batches = tiny.make_dataset().train_batches(8, seed=0)
    state = ready.parallel.place(state)
    for step in range(STEPS + 1):
        if step == STEPS:
            state = ready.parallel.place(ready.begin(ready.optimizer.phases[1], state))
            started = jax.device_get(state.params)
        state, _ = ready.updates[step >= STEPS](state, ready.parallel.shard(next(batches)))
    for start, initial in zip(jax.tree.leaves(started), jax.tree.leaves(first)):
        np.testing.assert_array_equal(start, np.where(start != 0, initial, 0))
    jax.tree.map(
        lambda average, new, old: np.testing.assert_allclose(
            average, 0.9 * new + 0.1 * old, atol=1e-6
        ),
        *jax.device_get((state.average.params, state.params)),
        started,
    )


@pytest.mark.parametrize(
    ("distribution", "layers"),
    matrix.fast(
        [("uniform", ()), ("erk", ()), ("er", ()), ("uniform", (("^Dense", 0.25),))], [("er", ())]
    ),
)
def test_layers_have_targets_of_their_own(distribution, layers):
    prune = PruneConfig(0.75, distribution=distribution, layer_sparsity=layers)
    config = TrainConfig(prune=prune, epochs=1)
    tx = make_optimizer(config, steps_per_epoch=3).phases[0].transform
    keys = jax.random.split(jax.random.key(0))
    params = {
        "Conv_0": {"kernel": jax.random.normal(keys[0], (3, 3, 4, 8))},
        "Dense_0": {"kernel": jax.random.normal(keys[1], (8, 20))},
    }
    expected = {
        "uniform": lambda: lats_optax.uniform(0.75)(params),
        "erk": lambda: lats_optax.erdos_renyi(0.75)(params),
        "er": lambda: lats_optax.erdos_renyi(0.75, kernel=False)(params),
    }[distribution]()
    if layers:
        expected["Dense_0"]["kernel"] = 0.25
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    for layer, target in zip(lats_optax.sparsity(params).layers, jax.tree.leaves(expected)):
        assert layer.zeros == round(target * layer.size), layer.path


def test_early_homotopy_is_exact_for_the_learning_rate_of_the_run():
    prune = PruneConfig(
        final_threshold=0.1, schedule="pgh", beta=0.01, mode="early", search_epochs=2
    )
    config = TrainConfig(prune=prune, epochs=10)
    rate = cosine(config, steps_per_epoch=50)
    threshold = schedule_to(config, rate, 50, 0.1)
    assert float(threshold(100)) == pytest.approx(0.1)
    counts = np.arange(100)
    l1 = lats_optax.l1_from_threshold(threshold, rate)(counts)
    np.testing.assert_allclose(l1 / l1[0], 0.01 ** (counts / 100), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PruneConfig(mode="early"), ["prune.mode", "early", "during-training"]),
        (lambda: PruneConfig(0.9, mode="early"), ["prune.search_epochs", "None", "early"]),
        (
            lambda: PruneConfig(0.9, mode="at-initialization", search_epochs=0),
            ["prune.search_epochs", "0", "1 or more"],
        ),
        (lambda: PruneConfig(0.9, search_epochs=2), ["prune.search_epochs", "2", "None"]),
        (
            lambda: TrainConfig(prune=PruneConfig(0.9, mode="early", search_epochs=5), epochs=5),
            ["prune.search_epochs", "5", "less than epochs"],
        ),
        (
            lambda: PruneConfig(final_threshold=0.1, distribution="erk"),
            ["prune.distribution", "erk", "global"],
        ),
        (
            lambda: PruneConfig(0.9, layer_sparsity=(("stem", 0.5),)),
            ["prune.layer_sparsity", "stem", "uniform"],
        ),
        (
            lambda: PruneConfig(0.9, distribution="uniform", layer_sparsity=(("stem", 1.0),)),
            ["prune.layer_sparsity", "1.0", "< 1"],
        ),
    ],
)
def test_a_value_that_is_not_allowed_is_named(make, words):
    tiny.assert_refused(make, words)


def test_what_was_pruned_comes_back_from_json():
    prune = PruneConfig(0.9, distribution="uniform", layer_sparsity=(("stem", 0.5),))
    assert prune_from_json(json.loads(json.dumps(to_json(TrainConfig(prune=prune))))) == prune


def test_layers_that_do_not_exist_are_refused(tmp_path):
    prune = PruneConfig(0.75, distribution="uniform", layer_sparsity=(("Dens_0", 0.5),))
    with pytest.raises(ValueError, match="Dens_0"):
        tiny.build(tiny.config(tmp_path / "run", prune=prune))
    assert not (tmp_path / "run").exists()
