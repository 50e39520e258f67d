"""The command line: what a user types, right and wrong, and what comes back."""

import json
import os
import re
import subprocess
import sys

import pytest

from lats_optax import cli
from tests import tiny

JOIN = ["--distributed", "--coordinator", "host:1", "--process-count", "2"]
TINY = ["--data.batch-size", "8", "--epochs", "1", "--eval-every", "1"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch, compile_once):
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
    for picture in ("report.png", "weights.png"):
        assert str(workdir / picture) in out
        assert (workdir / picture).read_bytes().startswith(b"\x89PNG")
    assert err == ""  # No progress bar where nobody looks at one.
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["split"] == "test"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["digits"]),
        (["digts"], ["digts", "digits, "]),
        (["digits", "--prune.target-sparity", "0.9"], ["sparity", "--prune.target-sparsity"]),
        (["digits", "extra"], ["extra"]),
        (["digits", "--epochs", "many"], ["--epochs", "many"]),
        (["digits", "--epochs", "0"], ["epochs", "0", "1 or more"]),
        (["digits", "--prune.schedule", "linear"], ["linear", "lats", "pgh"]),
        (["digits", "--prune.target-sparsity", "95"], ["prune.target_sparsity", "95"]),
        (["digits", "--prune.final-threshold", "-1"], ["prune.final_threshold", "-1"]),
        (["digits-lats", "--prune.final-threshold", "1"], ["prune.target_sparsity", "one of"]),
        (["digits", "--data.batch-size", "12"], ["data.batch_size", "12", "8 devices"]),
        (["digits-lats", *TINY, "--prune.include", "Cnv"], ["'Cnv'", "Conv_0/kernel"]),
        (["digits-lats", "--prune.structure", "rows"], ["rows", "output-channels", "blocks"]),
        (["digits", "--prune.structure", "filters"], ["prune.structure", "'filters'", "none"]),
        (["digits-lats", "--prune.block", "4", "4"], ["prune.block", "(4, 4)", "blocks"]),
        (["digits-lats", "--prune.structure", "blocks"], ["prune.block", "two numbers"]),
        (["digits", "--resume", "--overwrite"], ["resume", "overwrite"]),
        (["digits", "--prune.mode", "fine-tuning"], ["prune.mode", "with initial"]),
        (["digits", *TINY, "--initial", "no"], ["initial is 'no'", "that is there"]),
        (
            ["digits-lats", "--initial", "no", "--prune.mode", "fine-tuning"],
            ["prune.target_sparsity", "0.95", "None with mode fine-tuning"],
        ),
        (
            ["digits-lats", "--prune.mode", "early", "--prune.search-epochs", "20"],
            ["prune.search_epochs", "20", "less than epochs, 20"],
        ),
        (["digits", "--distributed"], ["distributed", "SLURM"]),
        (["digits", "--coordinator", "host:1"], ["coordinator", "'host:1'", "distributed"]),
        (["digits", "--process-count", "2"], ["process_count", "2", "with coordinator"]),
        (["digits", *JOIN, "--coordinator", "host"], ["coordinator", "'host'", "HOST:PORT"]),
        (["digits", *JOIN, "--process-index", "2"], ["process_index", "2", "0 to 1"]),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert cli.train(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lats-train: error: ")
    assert err.count("\n") == 1
    assert not re.search("[-─]{3}", err)
    for word in words:
        assert word in err
    assert not any(tmp_path.iterdir())


def test_a_run_that_is_there_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.train(["digits", *TINY, "--workdir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert str(tmp_path) in err
    assert "--resume" in err
    assert "--overwrite" in err
    assert cli.train(["digits", *TINY, "--workdir", str(tmp_path / "file")]) == 2
    assert "a directory" in capsys.readouterr().err


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
