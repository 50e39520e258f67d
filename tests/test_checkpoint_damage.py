"""Damaged checkpoints: each is named, none is restored, and the one before it is taken."""

import errno
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest

from lats_optax import cli
from lats_optax.training import manifest, plots
from lats_optax.training.checkpoint import Checkpoints, load_state, load_variables
from lats_optax.training.config import TrainConfig
from lats_optax.training.config_json import to_json
from lats_optax.training.parallel import PmapEngine
from lats_optax.training.recovery import CheckpointError, DamagedCheckpointWarning
from lats_optax.training.step import TrainState
from tests import tiny

FLIPS = 120


def state_at(step, seed=0):
    rng = np.random.default_rng(seed)
    kernels = {f"layer_{i}": rng.normal(size=(8, 6)).astype(np.float32) for i in range(4)}
    # What JAX has and NumPy has not.
    kernels["half"] = np.asarray(jax.numpy.ones(3, "bfloat16"))
    return TrainState(
        step=np.asarray(step, np.int32),
        params=kernels,
        batch_stats={},
        opt_state=((), (np.asarray(0.5, np.float32), {"trace": kernels["layer_0"]})),
    )


SUPPORT = [np.arange(5, dtype=np.uint8)]


def save(workdir, state, step=None, keep=None):
    step = int(state.step) if step is None else step
    position = {"next_index": step, "skipped": 0}
    config = to_json(TrainConfig())
    Checkpoints(workdir, PmapEngine(), keep).save(state, position, config, SUPPORT)


def restore(workdir, check=lambda state: None):
    checkpoints = Checkpoints(workdir, PmapEngine())
    return checkpoints.restore(lambda step: state_at(step), SUPPORT, check)


def assert_is(checkpoint, step):
    assert checkpoint.data_state == {"next_index": step, "skipped": 0}
    jax.tree.map(np.testing.assert_array_equal, checkpoint.state, state_at(step, seed=step))
    jax.tree.map(np.testing.assert_array_equal, checkpoint.support, SUPPORT)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of the steps 6 and 12, to be copied."""
    workdir = tmp_path_factory.mktemp("saved")
    for step in (6, 12):
        save(workdir, state_at(step, seed=step))
    return workdir


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_what_was_saved_is_restored(run):
    assert_is(restore(run), 12)
    loaded = load_state(run)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, state_at(12, seed=12).params)


@pytest.mark.slow
def test_no_flipped_bit_is_restored(run):
    rng = np.random.default_rng(0)
    newest, aside = run / "checkpoints" / "12", run / "checkpoints" / "12.damaged"
    paths = files(newest)
    assert len(paths) > 5
    for index in range(FLIPS):
        path = paths[index % len(paths)]
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        name = path.relative_to(newest).as_posix()
        with pytest.warns(DamagedCheckpointWarning, match=re.escape(name)):
            found = restore(run)
        assert_is(found, 6)
        aside.rename(newest)
        path.write_bytes(whole)
    assert_is(restore(run), 12)


@pytest.mark.parametrize("what", ["removed", "empty", "cut", "longer"])
def test_no_file_may_be_missing_or_of_another_size(run, what):
    newest = run / "checkpoints" / "12"
    for path in files(newest):
        whole = path.read_bytes()
        changed = {"empty": b"", "cut": whole[: len(whole) // 2], "longer": whole + b"\0"}
        if what == "removed":
            path.unlink()
        else:
            path.write_bytes(changed[what])
        name = path.relative_to(newest).as_posix()
        with pytest.warns(DamagedCheckpointWarning, match=re.escape(name)):
            assert load_state(run).step == 6
        path.write_bytes(whole)
    assert load_state(run).step == 12


def signed(directory, change):
    """A manifest that says something else, and is whole."""
    path = directory / manifest.MANIFEST
    content = json.loads(path.read_bytes().splitlines()[1])
    change(content)
    del content["files"]
    path.unlink()
    manifest.write(directory, content)


def position(**values):
    return lambda content: content["data_state"].update(values)


WRONG = {
    "no config": (lambda c: c.pop("config"), r"config in MANIFEST is None"),
    "no section": (lambda c: c["config"].pop("prune"), r"config\.prune in MANIFEST is None"),
    "a section of another type": (
        lambda c: c["config"].update(data=[1]),
        r"config\.data in MANIFEST is \[1\]",
    ),
    "no position": (lambda c: c.pop("data_state"), r"data_state in MANIFEST is None"),
    "no next_index": (lambda c: c["data_state"].clear(), r"next_index in MANIFEST is None"),
    "next_index below": (position(next_index=-1), r"next_index .* is -1; allowed: the step, 12"),
    "next_index above": (position(next_index=13), r"next_index .* is 13; allowed: the step, 12"),
    "next_index a string": (position(next_index="12"), r"next_index .* is '12'"),
    "skipped below": (position(skipped=-1), r"skipped .* is -1; allowed: 0 or more"),
    "no step": (lambda c: c.pop("step"), r"step in MANIFEST is None; allowed: 12"),
    "another step": (lambda c: c.update(step=6), r"step in MANIFEST is 6; allowed: 12"),
    "no arrays": (lambda c: c.pop("arrays"), r"arrays in MANIFEST is None"),
    "an array more": (
        lambda c: c["arrays"].update({"state/params/x": "float32[1] 00000000"}),
        r"array state/params/x is float32\[1\], and missing in the run",
    ),
    "another shape": (
        lambda c: c["arrays"].update({"state/params/layer_1": "float32[6,8] 00000000"}),
        r"array state/params/layer_1 is float32\[6,8\], and float32\[8,6\] in the run",
    ),
    "another value": (
        lambda c: c["arrays"].update({"state/params/layer_1": "float32[8,6] 00000000"}),
        r"array state/params/layer_1 is float32\[8,6\] .* and was float32\[8,6\] 00000000",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_manifest_says_is_checked(run, case):
    change, says = WRONG[case]
    signed(run / "checkpoints" / "12", change)
    with pytest.warns(DamagedCheckpointWarning, match=says):
        assert_is(restore(run), 6)


def test_a_directory_of_another_step_is_damaged(run):
    (run / "checkpoints" / "12").rename(run / "checkpoints" / "18")
    with pytest.warns(DamagedCheckpointWarning, match="step in MANIFEST is 12; allowed: 18"):
        assert_is(restore(run), 6)


def test_a_state_that_is_none_of_the_run_is_damaged(run):
    def check(state):
        if state.step == 12:
            raise ValueError("its zeros differ")

    with pytest.warns(DamagedCheckpointWarning, match=r"12 is damaged \(its zeros differ\)"):
        assert_is(restore(run, check), 6)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_kept_and_makes_room(run):
    newest = run / "checkpoints" / "12"
    for count in ("", "-2"):
        (newest / manifest.MANIFEST).unlink()
        with pytest.warns(DamagedCheckpointWarning, match=f"is now .*12.damaged{count}$"):
            assert_is(restore(run), 6)
        save(run, state_at(12, seed=12))
        assert_is(restore(run), 12)
    save(run, state_at(18, seed=18), keep=1)
    names = {path.name for path in newest.parent.iterdir()}
    assert names == {"18", "12.damaged", "12.damaged-2"}


def test_evaluation_leaves_a_damaged_checkpoint_where_it_is(run):
    (run / "checkpoints" / "12" / manifest.MANIFEST).unlink()
    with pytest.warns(DamagedCheckpointWarning, match="MANIFEST is missing"):
        variables = load_variables(run)
    np.testing.assert_array_equal(variables["params"]["layer_1"], state_at(6, 6).params["layer_1"])
    assert (run / "checkpoints" / "12").is_dir()


def test_without_a_whole_checkpoint_there_is_one_error(run):
    before = files(run)
    for step in (6, 12):
        (run / "checkpoints" / str(step) / manifest.MANIFEST).write_bytes(b"")
    for act in (restore, load_state, lambda run: Checkpoints(run, PmapEngine()).config()):
        with pytest.raises(CheckpointError, match=r"is whole \(12: .*; 6: .*--overwrite") as error:
            act(run)
        assert "\n" not in str(error.value)
    assert files(run) == before


# One that cannot be written


@pytest.mark.cover
@pytest.mark.parametrize(("name", "at"), [("mkdir", 2), ("fsync", 1), ("fsync", 9), ("rename", 1)])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_checkpoint_that_cannot_be_written_leaves_the_others(run, monkeypatch, name, at, number):
    original, calls = getattr(os, name), []

    def failing(*arguments, **keywords):
        calls.append(1)
        if len(calls) == at:
            raise OSError(number, os.strerror(number))
        return original(*arguments, **keywords)

    with monkeypatch.context() as context:
        context.setattr(os, name, failing)
        says = rf"18 cannot be written: {os.strerror(number)}\. .*--resume"
        with pytest.raises(CheckpointError, match=says):
            save(run, state_at(18, seed=18), keep=1)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["12", "6"]
    assert_is(restore(run), 12)
    save(run, state_at(18, seed=18), keep=2)
    assert_is(restore(run), 18)


def test_removing_an_old_checkpoint_is_not_taken_for_damage(run, monkeypatch):
    def killed(path, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(run, state_at(18, seed=18), keep=1)
    assert "6" not in {path.name for path in (run / "checkpoints").iterdir()}
    assert_is(restore(run), 18)


# The command

ARGUMENTS = ["digits", "--data.batch-size", "8", "--epochs", "2", "--checkpoint-every", "1"]


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """`lats-train` of a tiny run: its code, and the lines that it writes to standard error."""
    tiny.install(monkeypatch)
    monkeypatch.setattr(plots, "write_plots", lambda result: [])

    def call(*more):
        workdir = ("--workdir", str(tmp_path / "run"))
        sparse = ("--prune.target-sparsity", "0.75")
        code = cli.train([*ARGUMENTS, *sparse, *workdir, *more])
        lines = capsys.readouterr().err.splitlines()
        return code, [line for line in lines if line.startswith("lats-train: ")]

    return call


@pytest.mark.slow
@pytest.mark.filterwarnings("default::lats_optax.training.recovery.DamagedCheckpointWarning")
def test_a_run_goes_on_from_the_checkpoint_before(command, tmp_path):
    assert command()[0] == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    straight = load_state(tmp_path / "run")
    (checkpoints / "12" / manifest.MANIFEST).unlink()
    code, (warning, *_) = command("--resume")
    assert code == 0
    assert warning.startswith(f"lats-train: warning: checkpoint {checkpoints / '12'} is damaged (")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["12", "12.damaged", "6"]
    resumed = load_state(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)

    # Whole to the bit, but not sparse where its latent weights are.
    shutil.rmtree(checkpoints / "12")
    kernel = resumed.params["Conv_0"]["kernel"]
    spoilt = {**resumed.params, "Conv_0": {"kernel": np.where(kernel == 0, 1, kernel)}}
    content = manifest.read(checkpoints / "6")
    support = [np.zeros(9, np.uint8), np.zeros(48, np.uint8)]
    parallel, position = PmapEngine(), {"next_index": 12, "skipped": 0}
    state = resumed._replace(params=spoilt)
    Checkpoints(tmp_path / "run", parallel).save(state, position, content["config"], support)
    code, (warning, *_) = command("--resume")
    assert code == 0
    assert "12 is damaged (params: their zeros are not those of the state: Conv_0/kernel" in warning
    jax.tree.map(np.testing.assert_array_equal, straight, load_state(tmp_path / "run"))

    # Of one the arrays are damaged, of the other what `build` looks at first.
    for name in ("6", "12"):
        shutil.rmtree(checkpoints / name / "arrays")
    for _ in range(2):
        code, lines = command("--resume")
        assert code == 1
        assert len(lines) == 1
        assert lines[0].startswith(f"lats-train: error: no checkpoint in {checkpoints} is whole")
        assert "--overwrite" in lines[0]
        for name in ("6", "12"):
            (checkpoints / name / manifest.MANIFEST).write_bytes(b"")
