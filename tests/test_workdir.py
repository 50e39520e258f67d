"""The work directory: one run at a time, and a line where it cannot be written."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from lats_optax import cli
from lats_optax.training import lock, loop, plots, workdir
from lats_optax.training.checkpoint import load_state
from lats_optax.training.parallel import PmapEngine, PrimaryError
from tests import tiny

ARGUMENTS = ["digits", "--data.batch-size", "8", "--checkpoint-every", "1", "--epochs"]


def prepared(directory, **changes):
    return workdir.prepared(tiny.config(directory, **changes), PmapEngine())


@pytest.fixture
def command(monkeypatch, capsys):
    """`lats-train` of a tiny run: its code, and what it writes to standard error."""
    tiny.install(monkeypatch)
    monkeypatch.setattr(plots, "write_plots", lambda result: [])

    def call(directory, *more, epochs=1):
        code = cli.train([*ARGUMENTS, str(epochs), "--workdir", str(directory), *more])
        lines = capsys.readouterr().err.splitlines()
        # Where it writes a line of its own, a progress bar is no longer there.
        return code, [line for line in lines if line.strip() and "step/s" not in line]

    return call


def assert_fails(done, *words):
    code, lines = done
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith("lats-train: error: ")
    for word in words:
        assert word in lines[0]


# One run at a time

HOLDER = """
import sys, time
from pathlib import Path
from lats_optax.training.lock import _flock
with _flock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        says = f"workdir {re.escape(str(tmp_path))} is in use by process {holder.pid} on .*"
        with pytest.raises(lock.WorkdirInUseError, match=says), prepared(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
    with prepared(tmp_path):
        pass


@pytest.mark.parametrize("more", [(), ("--resume",), ("--overwrite",)])
def test_a_second_run_is_one_line_and_changes_nothing(tmp_path, command, more):
    with prepared(tmp_path):
        (tmp_path / "metrics.jsonl").touch() if more else None
        before = sorted(tmp_path.iterdir())
        assert_fails(command(tmp_path, *more), str(tmp_path), f"by process {os.getpid()} on ")
        assert sorted(tmp_path.iterdir()) == before


def test_the_lock_is_no_run(tmp_path):
    for _ in range(2):
        with prepared(tmp_path):
            pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="has no locks"), prepared(tmp_path):
        pass


def test_one_process_of_a_run_locks(tmp_path):
    others = PmapEngine()
    others.process_index = 1
    config = tiny.config(tmp_path)
    with prepared(tmp_path), workdir.prepared(config, others):
        pass


def test_what_fails_in_process_0_fails_in_all(monkeypatch):
    parallel = PmapEngine()
    parallel.process_index = 1
    monkeypatch.setattr(parallel, "total", lambda count: count + 1)
    with pytest.raises(PrimaryError, match="process 0"):
        parallel.on_primary(lambda: pytest.fail("not in this process"))


def test_overwriting_is_not_taken_for_damage(tmp_path, monkeypatch):
    """Killed while it removes checkpoints, a run leaves none that is half there."""
    checkpoint = tmp_path / "checkpoints" / "6"
    checkpoint.mkdir(parents=True)

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt), prepared(tmp_path, overwrite=True):
            pass
    assert not (tmp_path / "checkpoints").exists()
    with prepared(tmp_path, resume=True):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


# Where it cannot be written


@contextlib.contextmanager
def mounted(directory, *options):
    """A small file system of its own, where this may make one."""
    directory.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(directory)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_whole_checkpoints(tmp_path, command):
    small = tmp_path / "small"
    with mounted(small, "size=300k"):
        run = small / "run"
        done = command(run, "--keep-checkpoints", "100", epochs=30)
        assert_fails(done, f"{run}/", "No space left on device")
        steps = {int(path.name) for path in (run / "checkpoints").iterdir()}
        assert len(steps) > 1
        for step in sorted(steps, reverse=True):
            assert load_state(run).step == step
            shutil.rmtree(run / "checkpoints" / str(step))
        assert not list(run.rglob("*.unfinished*"))


def fill(directory):
    with contextlib.suppress(OSError), (directory / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1000))


@pytest.mark.slow
@pytest.mark.parametrize("every", ["1", "50"])
def test_a_full_disk_at_a_log_is_one_line(tmp_path, command, monkeypatch, every):
    small = tmp_path / "small"
    with mounted(small, "size=300k"):
        run, log_every = small / "run", ("--log-every", every)
        assert command(run, *log_every)[0] == 0
        (small / "filler").unlink(missing_ok=True)
        with monkeypatch.context() as context:
            taken, advance = [], loop.MetricsLog.advance

            def filling(self):
                taken.append(1)
                if len(taken) == 3:
                    fill(small)
                advance(self)

            context.setattr(loop.MetricsLog, "advance", filling)
            done = command(run, *log_every, "--overwrite", epochs=2)
        assert_fails(done, "No space left on device", f"{run}/")
        # And where it is full from the beginning.
        assert_fails(command(run, "--resume"), "No space left on device", f"{run}/")
        (small / "filler").unlink()
        assert command(run, "--resume", epochs=2)[0] == 0


@pytest.mark.slow
def test_a_place_that_is_read_only_is_one_line(tmp_path, command):
    place = tmp_path / "place"
    with mounted(place, "size=1m"):
        assert command(place / "run")[0] == 0
        remount = ["mount", "-o", "remount,ro", str(place)]
        subprocess.run(remount, check=True, capture_output=True)
        for arguments in ((place / "other",), (place / "run", "--resume")):
            assert_fails(command(*arguments), "Read-only file system", str(arguments[0]))


def test_a_path_through_a_file_is_one_line(tmp_path, command):
    (tmp_path / "file").touch()
    assert_fails(command(tmp_path / "file" / "run"), "Not a directory", str(tmp_path / "file"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_missing_permission_is_one_line(tmp_path, command):
    assert command(tmp_path / "run")[0] == 0
    for path, mode in ((tmp_path / "run", 0o500), (tmp_path, 0o600)):
        path.chmod(mode)
        try:
            assert_fails(command(tmp_path / "run", "--resume"), "Permission denied", "run")
        finally:
            path.chmod(0o700)


def test_a_missing_permission_is_one_line_for_root_too(tmp_path, command, monkeypatch):
    def denied(path, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(lock.os, "open", denied)
    assert_fails(command(tmp_path / "run"), "Permission denied", str(tmp_path / "run"))


@pytest.mark.slow
def test_a_run_ends_as_before_where_a_lock_was_left(tmp_path, command):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("process 1 on nowhere\n")
    assert command(tmp_path / "run")[0] == 0
    first = load_state(tmp_path / "run")
    assert command(tmp_path / "run", "--overwrite")[0] == 0
    jax.tree.map(np.testing.assert_array_equal, first, load_state(tmp_path / "run"))
