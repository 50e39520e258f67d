"""The command line: what a user types, right and wrong, and what comes back."""

import json
import os
import subprocess
import sys

import pytest

from lats_optax import cli
from tests import tiny

TINY = ["--data.batch-size", "8", "--epochs", "1", "--eval-every", "1"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    tiny.install(monkeypatch)


def test_a_run_prints_its_table_and_where_things_are(tmp_path, capsys):
    workdir = tmp_path / "run"
    code = cli.train(["digits", *TINY, "--prune.target-sparsity", "0.5", "--workdir", str(workdir)])
    out, err = capsys.readouterr()
    assert code == 0
    assert "Conv_0/kernel" in out
    assert "prunable weights" in out
    assert "50.00%" in out
    assert "test accuracy" in out
    assert str(workdir / "metrics.jsonl") in out
    assert str(workdir / "checkpoints" / "6") in out
    assert (workdir / "checkpoints" / "6").is_dir()
    model = workdir / "model.safetensors"
    assert f"model         {model} ({model.stat().st_size:,} bytes, " in out
    for plot in ("report.png", "weights.png"):
        assert str(workdir / plot) in out
        assert (workdir / plot).read_bytes().startswith(b"\x89PNG")
    assert err == ""  # No progress bar where nobody looks at one.
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["split"] == "test"


def test_a_run_that_is_there_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.train(["digits", *TINY, "--workdir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert str(tmp_path) in err
    assert "--resume" in err
    assert "--overwrite" in err
    assert cli.train(["digits", *TINY, "--workdir", str(tmp_path / "file")]) == 2
    assert "a directory" in capsys.readouterr().err


def test_an_error_that_nobody_foresaw_is_one_line(monkeypatch, capsys):
    def fail(experiment):
        raise RuntimeError("of a library\nover lines")

    monkeypatch.setattr(cli.loop, "fit", fail)
    assert cli.train(["digits", *TINY]) == 1
    line = "lats-train: error: RuntimeError: of a library over lines"
    assert capsys.readouterr().err == f"{line}; --debug shows where\n"
    assert cli.train(["digits", "--debug", *TINY]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert "raise RuntimeError" in err
    assert err.endswith(f"{line}\n")


@pytest.mark.parametrize("command", [cli.train, cli.demo, cli.prepare, cli.inspect, cli.compact])
def test_debug_shows_the_traceback_of_a_mistake(command, capsys):
    assert command(["--no-such-option", "--debug"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert "ValueError" in err
    with pytest.raises(SystemExit, match="0"):
        command(["--help"])
    assert "--debug shows the traceback" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_run_that_diverges_is_one_line(tmp_path, capsys):
    arguments = ["--optimizer.learning-rate", "1e30", "--workdir", str(tmp_path / "run")]
    assert cli.train(["digits", *TINY, *arguments]) == 1
    err = capsys.readouterr().err
    assert err.startswith("lats-train: error: the loss is ")
    assert err.count("\n") == 1


def test_help_names_every_preset_and_field(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.train(["--help"])
    out = capsys.readouterr().out
    assert "digits-lats" in out
    with pytest.raises(SystemExit, match="0"):
        cli.train(["digits", "--help"])
    out = capsys.readouterr().out
    for field in ("--prune.target-sparsity", "--optimizer.learning-rate", "--resume", "--workdir"):
        assert field in out


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_the_command_exits_with_a_line_and_its_code(encoding):
    # tyro draws its boxes differently where standard output is not UTF-8.
    command = [
        sys.executable,
        "-c",
        "import sys; from lats_optax import cli; sys.exit(cli.train())",
    ]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [*command, "digits", "--prune.target-sparity", "0.9"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "lats-train: error: Unrecognized options: --prune.target-sparity, 0.9; "
        "perhaps you meant --prune.target-sparsity or --prune.layer-sparsity\n"
    )
