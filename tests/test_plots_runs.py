"""The table against numbers written down here; the plot by what it draws and how it is saved."""

import dataclasses
import sys

import matplotlib
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure
from PIL import Image

import lats_optax
from lats_optax.analysis.runs import FinishedRun, comparison_table, implied_l1
from lats_optax.analysis.sparsity import LayerSparsity, SparsityReport
from lats_optax.plots.runs import draw_runs
from tests import matrix

STEPS, EPOCH = 600, 60
COSINE = optax.cosine_decay_schedule(0.1, STEPS)
RATES = np.asarray(COSINE(np.arange(STEPS)))


def sparsity_report(stem, classifier):
    return SparsityReport(
        (
            LayerSparsity("stem/kernel", (3, 3, 1, 16), 144, stem, prunable=True),
            LayerSparsity("norm/scale", (16,), 16, 0, prunable=False),
            LayerSparsity("classifier/kernel", (16, 10), 160, classifier, prunable=True),
        )
    )


def records(threshold=None, every=20):
    """What a trainer would have written: train records, and a test record every epoch."""
    written = []
    thresholds = None if threshold is None else threshold(np.arange(STEPS + 1))
    for step in range(1, STEPS + 1):
        record = {"split": "train", "step": step, "epoch": step / EPOCH}
        record["learning_rate_sum"] = float(RATES[:step].sum())
        if threshold is not None:
            record |= {"threshold": float(thresholds[step]), "sparsity": step / STEPS}
        if step % every == 0:
            written.append(record)
        if step % EPOCH == 0:
            accuracy = 1 - 0.5 / (step / EPOCH)
            written.append({**record, "split": "test", "accuracy": accuracy, "loss": 0.1})
    return written


DENSE = FinishedRun("dense", 0.9917, 12.34, sparsity_report(0, 0), records())
SPARSE = FinishedRun(
    "lats-95",
    0.98,
    1234.56,
    sparsity_report(72, 152),
    records(lats_optax.lats_threshold(COSINE, STEPS, final=0.3)),
)


def test_table_of_two_runs():
    assert comparison_table([DENSE, SPARSE]) == "\n".join(
        [
            "                     weights      dense    lats-95",
            "--------------------------------------------------",
            "stem/kernel              144      0.00%     50.00%",
            "classifier/kernel        160      0.00%     95.00%",
            "--------------------------------------------------",
            "prunable weights         304      0.00%     73.68%",
            "all parameters           320      0.00%     70.00%",
            "non-zero weights         304        304         80",
            "test accuracy                    99.17%     98.00%",
            "seconds                            12.3     1234.6",
        ]
    )


def test_table_of_runs_with_different_layers_and_a_long_name():
    other = SparsityReport((LayerSparsity("stem/kernel", (3, 3, 1, 8), 72, 36, prunable=True),))
    name = "half the width"
    lines = comparison_table([SPARSE, FinishedRun(name, 0.5, 1.0, other, [])]).splitlines()
    assert {len(line) for line in lines if line.startswith("--")} == {len(lines[0])}
    assert [line.split() for line in lines if not line.startswith("--")][1:5] == [
        ["stem/kernel", "varies", "50.00%", "50.00%"],
        ["classifier/kernel", "160", "95.00%"],
        ["prunable", "weights", "varies", "73.68%", "50.00%"],
        ["all", "parameters", "varies", "70.00%", "50.00%"],
    ]
    assert lines[3].index("95.00%") == lines[2].index("50.00%")


@pytest.mark.parametrize("draw", [comparison_table, lambda runs: draw_runs("x.png", runs)])
def test_no_runs(draw):
    with pytest.raises(ValueError, match="runs is empty; it must hold at least one run"):
        draw([])


@pytest.mark.parametrize("every", [7, 20, 50])
def test_lats_is_a_constant_l1_coefficient(every):
    threshold = lats_optax.lats_threshold(COSINE, STEPS, final=0.3)
    epochs, l1 = implied_l1(records(threshold, every))
    expected = 0.3 / RATES.sum()
    np.testing.assert_allclose(l1, expected, rtol=0.005)
    assert len(epochs) == len(l1) + 1 == STEPS // every
    assert epochs[0] == every / EPOCH


def test_l1_of_each_interval_is_the_mean_of_its_steps():
    threshold = lats_optax.pgh_threshold(STEPS, 0.2, 0.01)
    _, l1 = implied_l1(records(threshold))
    by_step = np.array(lats_optax.l1_from_threshold(threshold, COSINE)(np.arange(STEPS)))
    intervals = [slice(at, at + 20) for at in range(20, STEPS, 20)]
    expected = [np.average(by_step[i], weights=RATES[i]) for i in intervals]
    np.testing.assert_allclose(l1, expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("metrics", "intervals"), [(records(), 0), (SPARSE.metrics[:1], 0), (SPARSE.metrics[:2], 1)]
)
def test_l1_of_a_few_records(metrics, intervals):
    epochs, l1 = implied_l1(metrics)
    assert len(l1) == intervals
    assert len(epochs) == (intervals + 1 if intervals else 0)


def test_l1_is_undefined_where_the_learning_rate_is_zero():
    metrics = [record | {"learning_rate_sum": 0.5} for record in SPARSE.metrics]
    assert np.isnan(implied_l1(metrics)[1]).all()


CONSTANT = FinishedRun(
    "constant", 0.9, 1.0, sparsity_report(10, 20), records(lambda step: np.full(len(step), 0.1))
)
CASES = {
    "dense": [DENSE],
    "sparse": [SPARSE],
    "both": [DENSE, SPARSE],
    "nothing recorded": [FinishedRun("bare", 0.5, 1.0, sparsity_report(0, 10), [])],
    "one record": [FinishedRun("short", 0.5, 1.0, sparsity_report(0, 10), SPARSE.metrics[:1])],
    "threshold never moves": [CONSTANT],
    "more runs than colors": [DENSE, SPARSE, CONSTANT] * 4,
}


@pytest.mark.parametrize("runs", matrix.fast(CASES.values(), 1), ids=CASES)
def test_picture_is_a_png_of_its_size(tmp_path, monkeypatch, runs):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it is an error
    # To look at the back end is to choose it, which imports pyplot.
    names = set(matplotlib.rcParams) - {"backend"}
    settings = {name: matplotlib.rcParams[name] for name in names}
    draw_runs(tmp_path / "report.png", runs)
    with Image.open(tmp_path / "report.png") as image:
        assert (image.format, image.size) == ("PNG", (2100, 1200))
        assert len(image.convert("L").getcolors(256)) > 10, "something is drawn"
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]
    assert settings == {name: matplotlib.rcParams[name] for name in names}


@pytest.mark.slow
def test_picture_shows_what_was_recorded(tmp_path, monkeypatch):
    figures = []

    def catch(figure, path, **_):
        figures.append(figure)
        path.touch()

    monkeypatch.setattr(Figure, "savefig", catch)
    draw_runs(tmp_path / "report.png", [DENSE, SPARSE])
    axes = {ax.get_title(loc="left"): ax for ax in figures[0].axes}
    assert list(axes) == [
        "Threshold",
        "Implied L1 coefficient",
        "Zeros in each layer at the end",
        "Zeros among prunable weights",
        "Test accuracy",
    ]
    assert all(ax.get_xlabel() for ax in axes.values())

    dense, sparse = axes["Threshold"].get_lines()
    assert len(dense.get_xdata()) == 0
    expected = lats_optax.lats_threshold(COSINE, STEPS, final=0.3)(np.arange(20, STEPS + 1, 20))
    np.testing.assert_allclose(sparse.get_ydata(), expected, rtol=1e-3)
    np.testing.assert_allclose(sparse.get_xdata(), np.arange(20, STEPS + 1, 20) / EPOCH)

    for line in axes["Test accuracy"].get_lines():
        np.testing.assert_allclose(line.get_xdata(), np.arange(1, 11))
        np.testing.assert_allclose(line.get_ydata(), 100 - 50 / np.arange(1, 11))
    # All of the curve is to be seen, its beginning too.
    low, high = axes["Test accuracy"].get_ylim()
    assert 0 <= low < 50
    assert 95 < high < 100

    bars = axes["Zeros in each layer at the end"]
    assert [text.get_text() for text in bars.get_yticklabels()] == [
        "stem",
        "classifier",
        "all layers",
    ]
    # Of the dense run there is nothing to see.
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], [50, 95, 100 * 224 / 304])

    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == [
        "dense: test accuracy 99.17%, 0.00% zeros",
        "lats-95: test accuracy 98.00%, 73.68% zeros",
    ]


def test_one_evaluation_is_a_point(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path, **_: (figures.append(figure), path.touch())
    )
    once = [record for record in SPARSE.metrics if record["split"] == "test"][:1]
    draw_runs(tmp_path / "report.png", [dataclasses.replace(SPARSE, metrics=once)])
    (line,) = figures[0].axes[4].get_lines()
    assert (len(line.get_xdata()), line.get_marker()) == (1, "o")


def test_failed_drawing_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "report.png"
    path.write_text("old")

    def out_of_space(figure, path, **_):
        path.write_text("half a pic")
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", out_of_space)
    with pytest.raises(OSError, match="no space left"):
        draw_runs(path, [DENSE])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
