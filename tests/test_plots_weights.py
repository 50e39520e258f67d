"""The plot of a run's weights, by what it draws and how it is saved."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lats_optax.analysis.weight_summary import BINS, Histogram, WeightSummary
from lats_optax.plots.weights import draw_weights
from tests import matrix

RNG = np.random.default_rng(0)
SIZE = 1000


def layer(zeros=600, threshold=0.2, latent=True):
    def histogram(count):
        return Histogram(RNG.multinomial(count, np.full(BINS, 1 / BINS)), 0.5)

    return WeightSummary(
        zeros, 3, 2, histogram(SIZE - zeros), histogram(SIZE) if latent else None, threshold
    )


def record(step, paths, pruned=10, revived=5):
    each = {path: {"zeros": 600, "pruned": pruned, "revived": revived} for path in paths}
    totals = {"zeros": 0, "pruned": pruned * len(each), "revived": revived * len(each)}
    return {"split": "weights", "step": step, "epoch": step / 10, "layers": each, **totals}


LAYERS = {"stem/kernel": layer(), "head/kernel": layer(threshold=0.3)}
MANY = {f"block{index}/kernel": layer() for index in range(54)}
TRAIN = {"split": "train", "step": 20, "epoch": 2.0}
RECORDS = [record(10, LAYERS, revived=0), TRAIN, record(20, LAYERS), record(30, LAYERS, 0, 0)]
CASES = {
    "layers": (RECORDS, LAYERS),
    "many layers": ([record(10, MANY), record(20, MANY)], MANY),
    "frozen": (RECORDS[:1], {"stem/kernel": layer(threshold=None, latent=False)}),
    "nothing recorded, nothing left": ([], {"stem/kernel": layer(zeros=SIZE)}),
}


@pytest.mark.parametrize(("metrics", "layers"), matrix.fast(CASES.values(), 1), ids=CASES)
def test_picture_is_a_png_of_its_size(tmp_path, metrics, layers):
    draw_weights(tmp_path / "weights.png", metrics, layers)
    with Image.open(tmp_path / "weights.png") as image:
        assert (image.format, image.size) == ("PNG", (2100, 1650))
    assert [path.name for path in tmp_path.iterdir()] == ["weights.png"]


def drawn(tmp_path, monkeypatch, metrics, layers):
    figures = []

    def catch(figure, path, **_):
        figures.append(figure)
        path.touch()

    monkeypatch.setattr(Figure, "savefig", catch)
    draw_weights(tmp_path / "weights.png", metrics, layers)
    return figures[0]


def test_picture_shows_what_was_recorded(tmp_path, monkeypatch):
    figure = drawn(tmp_path, monkeypatch, RECORDS, LAYERS)
    totals, pruned, revived, _, *ends = figure.axes
    for steps, numbers in zip(totals.patches, ([20, 20, 0], [0, 10, 0])):
        values, edges, _ = steps.get_data()
        assert (values.tolist(), edges.tolist()) == (numbers, [0, 1, 2, 3])
    assert [text.get_text() for text in pruned.get_yticklabels()] == ["stem", "head"]
    for axes, percents in ((pruned, [1, 1, None]), (revived, [None, 0.5, None])):
        (mesh,) = axes.collections
        assert mesh.get_array().tolist() == [percents, percents]

    for axes, (path, expected) in zip(ends, LAYERS.items()):
        assert axes.get_title(loc="left") == f"{path.removesuffix('/kernel')}, 60.0% zeros"
        latent, weights = axes.patches
        np.testing.assert_array_equal(latent.get_data().values, expected.latent.counts)
        np.testing.assert_array_equal(weights.get_data().values, expected.weights.counts)
        np.testing.assert_allclose(weights.get_data().edges, np.linspace(-0.5, 0.5, BINS + 1))
        marks = [line.get_xdata()[0] for line in axes.get_lines()]
        assert marks == [-expected.threshold, expected.threshold]
    assert not any(axes.axison for axes in ends[2:])


def test_where_nothing_changes_that_is_said(tmp_path, monkeypatch):
    still = [record(10, LAYERS, 0, 0), record(20, LAYERS, 0, 0)]
    totals, pruned, revived, *_ = drawn(tmp_path, monkeypatch, still, LAYERS).axes
    assert totals.get_ylim() == (0, 10)
    for axes in (pruned, revived):
        assert [text.get_text() for text in axes.texts] == ["none"]


def test_of_many_layers_some_are_shown_to_the_end(tmp_path, monkeypatch):
    figure = drawn(tmp_path, monkeypatch, [record(10, MANY)], MANY)
    ends = figure.axes[4:]
    titles = [axes.get_title(loc="left").split(",")[0] for axes in ends]
    assert titles == [f"block{index}" for index in (0, 8, 15, 23, 30, 38, 45, 53)]
    assert figure.subfigs[1].get_suptitle() == "The weights of 8 of the 54 layers at the end"


def test_no_layers(tmp_path):
    with pytest.raises(ValueError, match="layers is empty; it must hold at least one layer"):
        draw_weights(tmp_path / "weights.png", RECORDS, {})
    assert not list(tmp_path.iterdir())
