"""The demonstration, on a data set and a model that train in no time."""

import dataclasses
import json

import pytest
from PIL import Image

from lats_optax import cli
from lats_optax.training import demo, presets
from tests import tiny


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    tiny.install(monkeypatch)
    preset = presets.PRESETS["digits"]
    data = dataclasses.replace(preset.config.data, batch_size=8)
    config = dataclasses.replace(preset.config, data=data)
    monkeypatch.setitem(presets.PRESETS, "digits", preset._replace(config=config))


def arguments(workdir, *more):
    return ["--workdir", str(workdir), "--epochs", "2", "--target-sparsity", "0.75", *more]


def test_it_trains_both_and_says_where_everything_is(tmp_path, capsys):
    workdir = tmp_path / "demo"
    assert cli.demo(arguments(workdir)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary.keys() == {"dense", "sparse"}
    for run in summary.values():
        assert 0 <= run["test_accuracy"] <= 1
        assert run["seconds"] > 0
    assert summary["dense"]["sparsity"] == 0
    weights = summary["dense"]["nonzero_weights"]
    assert summary["sparse"]["nonzero_weights"] == weights - round(0.75 * weights)
    assert summary["sparse"]["sparsity"] == pytest.approx(0.75, abs=1 / weights)
    for name in ("report.png", "weights.png"):
        with Image.open(workdir / name) as plot:
            assert plot.format == "PNG"
    for words in ("Conv_0/kernel", "non-zero weights", "test accuracy", "75.00%"):
        assert words in out
    files = (
        "report.png",
        "weights.png",
        "summary.json",
        "dense/model.safetensors",
        "sparse/model.safetensors",
    )
    for path in (*files, "dense/checkpoints/12", "sparse/checkpoints/12"):
        assert str(workdir / path) in out
        assert (workdir / path).exists()


@pytest.mark.slow
def test_it_overwrites_only_when_told_to(tmp_path, capsys):
    workdir = tmp_path / "demo"
    workdir.mkdir()
    (workdir / demo.SUMMARY).write_text("mine")
    assert cli.demo(arguments(workdir)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"lats-demo: error: workdir {workdir} is not empty: --overwrite")
    assert (workdir / demo.SUMMARY).read_text() == "mine"
    assert cli.demo(arguments(workdir, "--overwrite")) == 0
    assert (workdir / demo.SUMMARY).read_text() != "mine"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--target-sparsity", "1"], ["target_sparsity", "1.0"]),
        (["--epochs", "0"], ["epochs", "1 or more"]),
        (["--nonsense"], ["--nonsense", "--help"]),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, more, words):
    assert cli.demo(["--workdir", str(tmp_path / "demo"), *more]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    for word in words:
        assert word in err
    assert not (tmp_path / "demo").exists()
