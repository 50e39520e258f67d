"""Runs that end in a model file, runs that begin from one, and fine-tuning on its support."""

import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lats_optax
from lats_optax.training import assembly, workdir
from lats_optax.training.checkpoint import load_state, load_variables
from lats_optax.training.config import PruneConfig, TrainConfig
from lats_optax.training.config_json import check_resumable, to_json
from lats_optax.training.export import load_model, save_model
from lats_optax.training.optimizer import make_optimizer
from lats_optax.training.parallel import PmapEngine
from lats_optax.training.step import create_state
from tests import tiny
from tests.runs import BEFORE, EARLY, assert_equal_runs, at_step, plain_steps
from tests.tiny import variables

FINE = PruneConfig(mode="fine-tuning")
TARGET = PruneConfig(target_sparsity=0.75)
WATCHED = {"ema_decay": 0.9, "log_every": 1}  # as other tests have it: compiled once


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    tiny.add_to_zoo(monkeypatch)


@pytest.fixture
def initial(tmp_path):
    path = tmp_path / "initial" / "model.safetensors"
    path.parent.mkdir()
    save_model(path, tiny.Model(), variables(), tiny.SHAPE, {"data": "tiny"})
    return path


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def zeros(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf) == 0, params)


# What a run leaves


@pytest.mark.parametrize(
    "prune", [TARGET, pytest.param(EARLY, marks=pytest.mark.slow)], ids=["during", "early"]
)
def test_a_run_ends_in_files_of_its_weights(tmp_path, prune):
    config = tiny.config(tmp_path / "run", prune=prune, **WATCHED)
    result = tiny.train(config, jax.devices()[: 8 if prune is TARGET else 2])
    state = jax.device_get(result.state)
    saved = load_model(tmp_path / "run" / "model.safetensors")
    exact = state.params
    if prune is TARGET:
        # What the latent weights and the threshold stand for, in NumPy.
        latent = load_state(tmp_path / "run").opt_state["latent"]
        d = float(optax.tree.get(state.opt_state, "threshold"))
        for layer in ("Conv_0", "Dense_0"):
            theta = np.asarray(latent[layer]["kernel"])
            # At the end the annealed threshold is the second power threshold.
            size = np.sqrt(np.maximum(theta.astype(float) ** 2 - d**2, 0))
            w = np.sign(theta) * np.where(np.abs(theta) > d, size, 0)
            exact[layer]["kernel"] = w * min(np.sum(theta * w) / np.sum(w * w), 2)
    for got, want in zip(
        jax.tree.leaves(saved.variables),
        jax.tree.leaves({"batch_stats": state.batch_stats, "params": exact}),
    ):
        np.testing.assert_allclose(got, want, rtol=2e-5)
    equal(zeros(saved.variables["params"]), zeros(state.params))
    assert saved.metadata == {
        "data": "tiny",
        "step": "18",
        "test_accuracy": f"{result.test_accuracy:.4f}",
    }
    average = load_model(tmp_path / "run" / "model_averaged.safetensors")
    equal(average.variables, load_variables(tmp_path / "run", averaged=True))
    assert average.metadata["test_accuracy"] == f"{result.test_accuracy_averaged:.4f}"
    for written, name in ((result.model, "model"), (result.model_averaged, "model_averaged")):
        assert written.path == tmp_path / "run" / f"{name}.safetensors"
        assert written.size == written.path.stat().st_size
        assert written.dense_size == sum(x.nbytes for x in jax.tree.leaves(saved.variables))


def test_overwrite_removes_the_files_of_a_run(tmp_path):
    for name in ("model", "model_averaged", "initial", "mine"):
        (tmp_path / f"{name}.safetensors").touch()
    with workdir.prepared(tiny.config(tmp_path, overwrite=True), PmapEngine()):
        names = {path.name for path in tmp_path.iterdir()}
    assert names == {"mine.safetensors", workdir.LOCK}


# What a run begins from


@pytest.mark.slow
def test_fine_tuning_is_masked_sgd(tmp_path, initial):
    """The zeros are exactly the file's and the survivors move, as in a loop of another's."""
    config = tiny.config(tmp_path / "run", prune=FINE, init_from=initial)
    first = tiny.train(config, jax.devices()[:1])
    # Once more, from the copy of the file in the run that this one throws away.
    copy = config.workdir / "initial.safetensors"
    again = dataclasses.replace(config, overwrite=True, init_from=copy)
    result = tiny.train(again, jax.devices()[:1])
    equal(first.state, result.state)
    start = variables()
    alive = jax.tree.map(lambda w: (w != 0) if w.ndim > 1 else np.ones(w.shape), start["params"])
    rate = optax.cosine_decay_schedule(0.05, 18)
    tx = optax.chain(
        optax.add_decayed_weights(1e-3),
        optax.sgd(rate, momentum=0.9),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, alive)),
    )
    batches = [b for _, b in zip(range(18), tiny.make_dataset().train_batches(8, seed=0))]
    params = jax.tree.map(jnp.asarray, start["params"])
    expected = plain_steps(params, start["batch_stats"], tx, tx.init(params), batches)
    state = jax.device_get(result.state)
    for got, want in zip((state.params, state.batch_stats), expected):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)

    saved = load_model(result.model.path)
    equal(zeros(saved.variables["params"]), zeros(start["params"]))
    moved = jax.tree.map(lambda a, b: (a != b)[b != 0].mean(), state.params, start["params"])
    assert min(jax.tree.leaves(moved)) > 0.9
    assert float(saved.metadata["test_accuracy"]) == pytest.approx(result.test_accuracy, abs=1e-4)
    train = [r for r in result.metrics if r["split"] == "train"]
    assert {r["sparsity"] for r in train} == {result.sparsity.sparsity}
    assert not any("threshold" in r for r in train)


def test_a_fine_tuning_step_is_the_step_of_the_frozen_phase(tmp_path, initial):
    """The same program, so that it costs the same."""
    programs = []
    for prune in (FINE, EARLY):
        config = tiny.config(tmp_path / "run", prune=prune, init_from=initial)
        model, phase = tiny.Model(), make_optimizer(config, steps_per_epoch=6).phases[-1]
        step, tx = assembly.bind_step(config, model, phase), phase.transform
        state = jax.eval_shape(lambda model=model, tx=tx: create_state(model, tx, tiny.SHAPE, 0))
        batch = next(iter(tiny.make_dataset().train_batches(8, seed=0)))
        taken = lambda state, batch, step=step: step(state, batch, lambda tree: tree)  # noqa: E731
        programs.append(jax.jit(taken).lower(state, batch).as_text())
    assert programs[0] == programs[1]


@pytest.mark.filterwarnings("ignore:init_from is .* do not stay zero")
@pytest.mark.parametrize("prune", [PruneConfig(), TARGET], ids=["dense", "during-training"])
def test_any_run_can_begin_from_a_file(tmp_path, initial, prune):
    config = tiny.config(tmp_path / "run", prune=prune, init_from=initial, ema_decay=0.9)
    ready = tiny.build(config, jax.devices()[:1])
    state = ready.initial_state()
    equal({"params": state.params, "batch_stats": state.batch_stats}, variables())
    equal(tuple(state.average), (state.params, state.batch_stats))
    if prune is TARGET:
        # No threshold yet: what is zero in the file may come to life.
        equal(optax.tree.get(state.opt_state, "threshold"), np.float32(0))
        kernel = variables()["params"]["Dense_0"]["kernel"]
        equal(optax.tree.get(state.opt_state, "latent")["Dense_0"]["kernel"], kernel)


@pytest.mark.slow
@pytest.mark.parametrize(
    "prune",
    [FINE, pytest.param(BEFORE, marks=pytest.mark.slow)],
    ids=["fine-tuning", "at-initialization"],
)
def test_a_resumed_run_needs_its_work_directory_alone(tmp_path, monkeypatch, initial, prune):
    fine = prune is FINE
    watched, devices = ({}, 1) if fine else (WATCHED, 2)
    watched |= {"prune": prune, "init_from": initial}
    straight = tiny.train(tiny.config(tmp_path / "straight", **watched), jax.devices()[:devices])
    config = tiny.config(tmp_path / "stopped", **watched)
    with monkeypatch.context() as context:
        at_step(context, 4, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match="after step 4;"):
            tiny.train(config, jax.devices()[:devices])
    assert not (config.workdir / "model.safetensors").exists()
    initial.unlink()
    resumed = tiny.train(dataclasses.replace(config, resume=True), jax.devices()[:devices])
    assert_equal_runs(straight, resumed)
    equal(*(load_model(run.model.path).variables for run in (straight, resumed)))


@pytest.mark.slow
def test_what_a_run_began_from_is_not_exchanged(tmp_path, initial):
    config = tiny.config(tmp_path / "run", prune=FINE, init_from=initial)
    # Where there is no checkpoint yet, the run begins again, from the file that is named now.
    config.workdir.mkdir()
    (config.workdir / "initial.safetensors").write_bytes(b"of a run that was killed")
    tiny.train(dataclasses.replace(config, resume=True), jax.devices()[:1])
    other = dataclasses.replace(config, resume=True, init_from=tmp_path / "other")
    with pytest.raises(ValueError, match=r"init_from is '.*other' and was '.*initial/model"):
        tiny.build(other)


def test_a_checkpoint_that_is_older_than_a_field_can_be_resumed(tmp_path):
    config = tiny.config(tmp_path)
    older = to_json(config)
    del older["init_from"], older["prune"]["mode"], older["prune"]["search_epochs"]
    check_resumable(older, config)
    with pytest.raises(ValueError, match=r"prune\.mode is 'early' and was 'during-training'"):
        check_resumable(older, dataclasses.replace(config, prune=EARLY))


def spoilt(change):
    def write(path):
        spoilt_variables = variables()
        change(spoilt_variables)
        save_model(path, tiny.Model(), spoilt_variables, tiny.SHAPE)

    return write


def not_finite(variables):
    variables["batch_stats"]["BatchNorm_0"]["mean"][0] = np.inf


def dense(variables):
    for layer in variables["params"].values():
        if "kernel" in layer:
            layer["kernel"][...] = 1


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: None, ["init_from is", "a model file that is there"]),
        (lambda path: path.write_bytes(b"x"), ["not a safetensors file"]),
        (
            lambda path: lats_optax.save_sparse(path, variables()),
            ["metadata has no image_shape and no model"],
        ),
        (
            lambda path: save_model(path, tiny.Model(5), variables(5), tiny.SHAPE),
            ["its model's num_classes is 5 and the run's is 3"],
        ),
        (spoilt(not_finite), ["not finite"]),
        (spoilt(dense), ["no weight of it that is pruned is zero"]),
    ],
    ids=["missing", "foreign", "no-model", "classes", "not-finite", "dense"],
)
def test_a_file_that_a_run_cannot_begin_from_is_named(tmp_path, write, words):
    path = tmp_path / "file"
    write(path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        tiny.build(tiny.config(tmp_path / "run", prune=FINE, init_from=path))
    for word in [str(path), *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_images_of_another_shape_are_named_with_the_arrays(tmp_path, initial):
    wider = dataclasses.replace(tiny.make_dataset(), image_shape=(4, 8, 1))
    misfit = r"\[4, 8, 1\]: params/Dense_0/kernel is \(128, 3\), wanted \(256, 3\)"
    with pytest.raises(ValueError, match=misfit):
        tiny.build(tiny.config(tmp_path / "run", init_from=initial), dataset=wider)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TrainConfig(prune=FINE), ["prune.mode", "fine-tuning", "with init_from"]),
        (
            lambda: PruneConfig(0.9, mode="fine-tuning"),
            ["prune.target_sparsity", "0.9", "None with mode fine-tuning"],
        ),
        (
            lambda: PruneConfig(final_threshold=0.1, mode="fine-tuning"),
            ["prune.final_threshold", "0.1", "None with mode fine-tuning"],
        ),
        (
            lambda: PruneConfig(mode="fine-tuning", search_epochs=1),
            ["prune.search_epochs", "early and at-initialization"],
        ),
    ],
)
def test_a_value_that_is_not_allowed_is_named(make, words):
    tiny.assert_refused(make, words)
