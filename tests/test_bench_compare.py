"""Figures of benchmarks: written, read back, and what moved between two files of them."""

import json

import numpy as np
import pytest

from benchmarks import compare, records


def write(path, values, **settings):
    records.write(
        path, "program", values, unit="ms", lower_is_better=True, settings=settings, machine="this"
    )
    return str(path)


def rounds(middle, spread, seed, number=15):
    return np.random.default_rng(seed).normal(middle, spread, number).tolist()


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "figures.jsonl"
    write(path, {"a": [1.0, 2.0], "b": [3.0]}, batch=4)
    write(path, {"a": [5.0]}, batch=4)
    write(path, {"a": [6.0]}, batch=8)
    found = records.read(path)
    assert [(f.name, f.settings["batch"], f.values) for f in found.values()] == [
        ("a", 4, (5.0,)),
        ("b", 4, (3.0,)),
        ("a", 8, (6.0,)),
    ]
    (figure, *_) = found.values()
    assert figure.machine == "this"
    assert {"python", "jax", "numpy"} <= figure.versions.keys()


@pytest.mark.parametrize("line", ["x", "{}", "[1]", json.dumps({"values": ["a"]})])
def test_a_line_that_is_no_figure_is_named(tmp_path, capsys, line):
    path = tmp_path / "figures.jsonl"
    write(path, {"a": [1.0]})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(SystemExit, match="2"):
        compare.main([str(path), str(path)])
    assert "line 2 is not a figure" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("after", "verdict"),
    [(10.0, "same"), (10.05, "same"), (12.0, "worse"), (8.0, "better")],
)
def test_what_is_beyond_the_spread_of_the_rounds_has_moved(tmp_path, capsys, after, verdict):
    first = write(tmp_path / "a.jsonl", {"step": rounds(10, 0.5, 0)})
    second = write(tmp_path / "b.jsonl", {"step": rounds(after, 0.5, 1)})
    assert compare.main([first, second]) == (verdict == "worse")
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "program: step" in line]
    assert row.endswith(verdict)


def test_noise_alone_is_seldom_taken_for_a_change():
    figures = [
        records.Figure("p", "n", "ms", True, tuple(rounds(10, 1, seed, 9))) for seed in range(400)
    ]
    changes = [compare.compare(a, b) for a, b in zip(figures[::2], figures[1::2])]
    assert sum(change.verdict != "same" for change in changes) <= 10
    # A change as large as the spread of 25 rounds is seen.
    slower = [
        records.Figure("p", "n", "ms", True, tuple(rounds(12, 1, seed, 25)))
        for seed in range(1000, 1050)
    ]
    base = [
        records.Figure("p", "n", "ms", True, tuple(rounds(10, 1, seed, 25)))
        for seed in range(2000, 2050)
    ]
    verdicts = [compare.compare(a, b).verdict for a, b in zip(base, slower)]
    assert verdicts.count("worse") >= 40


def test_few_rounds_tell_nothing_and_other_settings_are_not_compared(tmp_path, capsys):
    first = write(tmp_path / "a.jsonl", {"step": [1.0, 1.0]}, batch=4)
    second = write(tmp_path / "b.jsonl", {"step": [9.0, 9.0]}, batch=4)
    assert compare.main([first, second]) == 0
    assert "too few rounds" in capsys.readouterr().out
    third = write(tmp_path / "c.jsonl", {"step": [9.0, 9.0]}, batch=8)
    with pytest.raises(SystemExit, match="2"):
        compare.main([first, third])
    assert "no figure of one name" in capsys.readouterr().err


def test_another_machine_is_said(tmp_path, capsys):
    first = write(tmp_path / "a.jsonl", {"step": [1.0] * 5})
    second = tmp_path / "b.jsonl"
    second.write_text((tmp_path / "a.jsonl").read_text().replace('"this"', '"that"'))
    assert compare.main([first, str(second)]) == 0
    assert capsys.readouterr().out.startswith("machine differ: this before, that after")
