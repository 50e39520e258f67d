"""`lats-inspect`: its numbers against finite differences and hand counts, and what it draws."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure
from PIL import Image

import lats_optax
from lats_optax import cli, masks, models
from lats_optax.analysis import curves as analysis
from lats_optax.analysis import model, runs
from lats_optax.inspection import columns, compare_schedules, model_file
from lats_optax.plots.curves import draw_thresholds
from lats_optax.plots.model import draw_model
from lats_optax.training.export import save_model, variables_of
from lats_optax.training.presets import PRESETS
from tests import matrix

EPOCHS, EPOCH = 10, 20
STEPS = EPOCHS * EPOCH
COUNTS = np.arange(STEPS)
X = np.arange(STEPS + 1) / STEPS
COSINE = 0.1 * (1 + np.cos(np.pi * COUNTS / STEPS)) / 2
RUN = {"epochs": EPOCHS, "steps_per_epoch": EPOCH, "final": 0.3}
SHORT = ["--epochs", "2", "--steps-per-epoch", "5"]

MODULE = """
import math
import optax

ramp = optax.linear_schedule(0.0, 0.2, 200)
branches = lambda count: 0.1 if count < 100 else 0.2
wave = lambda count: 0.1 * (1 + math.sin(count / 10))
steep = lambda x: 1 + 99 * x
halves = lambda x: 1.0 if x < 0.5 else 3.0
tail = lambda count: 0.1 * (count < 150)
number = 3
falling = lambda count: 0.1 - count
pair = lambda count: (1.0, 2.0)


class Namespace:
    constant = staticmethod(lambda count: 0.05)


def fails(count):
    raise RuntimeError("two\\nlines")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current directory, with a module of the user's in it."""
    monkeypatch.chdir(tmp_path)
    # A name that no other test has imported.
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    return name


def curves(*schedules, **settings):
    return compare_schedules.compare_schedules(
        compare_schedules.ScheduleRequest(schedules, **(RUN | settings))
    ).curves


def catch_figures(monkeypatch):
    figures = []

    def catch(figure, path, **_):
        figures.append(figure)
        path.touch()

    monkeypatch.setattr(Figure, "savefig", catch)
    return figures


# --- schedules: the numbers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "threshold"),
    [
        ("lats", np.append(0, np.cumsum(COSINE)) / COSINE.sum()),
        ("s-lats", X + np.sin(np.pi * X) / np.pi),
        ("constant", np.ones(STEPS + 1)),
        ("linear", X),
        ("sine", (1 - np.cos(np.pi * X)) / 2),
        ("cubic", 1 - (1 - X) ** 3),
        ("lats:100", np.append(0, np.cumsum(COSINE * 100 ** X[:-1])) / (COSINE @ 100 ** X[:-1])),
    ],
)
def test_l1_is_the_finite_difference_over_the_learning_rate(name, threshold):
    found = curves(name)[name]
    np.testing.assert_allclose(found.threshold, 0.3 * threshold, atol=1e-12)
    np.testing.assert_allclose(found.learning_rate, COSINE, rtol=1e-6)
    expected = np.diff(0.3 * threshold) / COSINE
    np.testing.assert_allclose(found.l1, expected, rtol=1e-5, atol=1e-9)
    mean = (0.3 - 0.3 * threshold[0]) / COSINE.sum()
    assert found.mean == pytest.approx(mean, rel=1e-6)
    expected = np.ptp(expected) / mean if mean else 0.0
    assert found.deviation == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("name", ["pgh:0.01", "lats:0.01"])
def test_pgh_falls_by_its_base(name):
    l1 = curves(name)[name].l1
    np.testing.assert_allclose(l1[:150] / l1[0], 0.01 ** X[:150], rtol=0.02)


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"learning_rate": "0.3"}, 3 * COSINE),
        ({"lr_update": "epoch"}, COSINE[COUNTS // EPOCH * EPOCH]),
        ({"shape": "constant"}, np.full(STEPS, 0.1)),
        (
            {"shape": "milestones", "milestones": (5, 8), "factor": 0.5},
            np.select([COUNTS < 100, COUNTS < 160], [0.1, 0.05], 0.025),
        ),
        (
            {"shape": "constant", "warmup_epochs": 2},
            0.1 * np.minimum((COUNTS + 1) / 40, 1),
        ),
        ({"learning_rate": "MINE:tail"}, 0.1 * (COUNTS < 150)),
        ({"learning_rate": "MINE:Namespace.constant"}, np.full(STEPS, 0.05)),
    ],
)
def test_lats_is_constant_under_every_learning_rate(here, settings, rates):
    if "learning_rate" in settings:
        settings = {"learning_rate": settings["learning_rate"].replace("MINE", here)}
    found = curves("lats", **settings)["lats"]
    np.testing.assert_allclose(found.learning_rate, rates, rtol=1e-5, atol=1e-12)
    assert found.deviation < 1e-12
    np.testing.assert_allclose(found.defined, 0.3 / rates.sum(), rtol=1e-5)
    np.testing.assert_array_equal(np.isnan(found.l1), rates == 0)


def test_warm_up_is_that_of_the_trainer():
    # In its step, then the cosine over what is left.
    found = curves("lats", warmup_epochs=2)["lats"].learning_rate
    np.testing.assert_allclose(found[:40], 0.1 * np.arange(1, 41) / 40, rtol=1e-6)
    falling = 0.05 * (1 + np.cos(np.pi * np.arange(160) / 160))
    np.testing.assert_allclose(found[40:], falling, rtol=1e-6)


@pytest.mark.parametrize(
    "name", [n for n, preset in PRESETS.items() if preset.config.prune.has_threshold]
)
def test_a_preset_gives_its_own_schedule(name):
    config = PRESETS[name].config
    found = compare_schedules.compare_schedules(
        compare_schedules.ScheduleRequest(preset=name, epochs=10, steps_per_epoch=10)
    )
    prune = config.prune
    label = f"pgh:{prune.beta}" if prune.schedule == "pgh" else prune.schedule
    assert list(found.curves) == [label]
    assert found.curves[label].final == pytest.approx(1.0)
    peak = max(found.curves[label].learning_rate)
    assert peak == pytest.approx(config.optimizer.learning_rate, rel=0.01)


@pytest.mark.parametrize(
    ("name", "epochs", "steps_per_epoch"),
    matrix.fast(
        [
            ("imagenet-resnet50-lats", 6, 5004),
            ("cifar10-vgg16-lats", 2, 390),
            ("digits-lats", 2, 22),
        ],
        1,
    ),
)
def test_a_preset_gives_its_length(name, epochs, steps_per_epoch):
    found = compare_schedules.compare_schedules(
        compare_schedules.ScheduleRequest(preset=name, epochs=epochs)
    )
    assert (found.steps_per_epoch, found.steps) == (steps_per_epoch, epochs * steps_per_epoch)


@pytest.mark.slow
def test_schedules_of_the_users_own(here):
    names = ("ramp", "branches", "wave", "Namespace.constant")
    found = curves(*(f"{name}={here}:{name}" for name in names), f"{here}:ramp")
    assert list(found) == [*names, f"{here}:ramp"]
    after = np.arange(STEPS + 1)
    expected = {
        "ramp": 0.2 * X,
        "branches": np.where(after < 100, 0.1, 0.2),
        "wave": 0.1 * (1 + np.sin(after / 10)),
        "Namespace.constant": np.full(STEPS + 1, 0.05),
    }
    for name, threshold in expected.items():
        np.testing.assert_allclose(found[name].threshold, threshold, rtol=1e-6)
        np.testing.assert_allclose(
            found[name].l1, np.diff(threshold) / COSINE, rtol=1e-4, atol=1e-7
        )


def test_profiles_of_the_users_own(here, tmp_path):
    np.save("profile.npy", np.array([1.0, 100.0]))
    (tmp_path / "profile.csv").write_text("step,mu,note\n0,1,a\n10,1,b\n20,3,c\n")
    profiles = {
        f"lats:{here}:steep": 1 + 99 * X[:-1],
        f"lats:{here}:halves": np.where(X[:-1] < 0.5, 1.0, 3.0),
        "lats:profile.npy": 1 + 99 * X[:-1],
        "lats:profile.csv:mu": 1 + np.maximum(4 * X[:-1] - 2, 0),
    }
    for name, found in curves(*profiles).items():
        np.testing.assert_allclose(found.l1 / found.l1[0], profiles[name], rtol=1e-9)


def records(threshold, rates, every=7):
    sums = np.append(0, np.cumsum(rates))
    return [
        {"split": split, "step": t, "epoch": t / EPOCH, "learning_rate_sum": sums[t]}
        | ({"threshold": threshold[t]} if split == "train" else {"accuracy": 0.5})
        for t in range(every, STEPS, every)
        for split in ("train", "test")
    ]


def write_run(path, written):
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in written))


@pytest.mark.parametrize("source", ["lr=0.1", "lr=0.1/metrics.jsonl", "run=lr=0.1"])
def test_a_recorded_threshold_comes_with_its_own_learning_rate(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    metrics = records(0.3 * X**2, 7 * COSINE)
    write_run(tmp_path / "lr=0.1", metrics)
    if source == "run=lr=0.1":
        shutil.move("lr=0.1", "0.1")
    ((label, found),) = curves(source).items()
    assert label == ("run=lr" if source.startswith("run=") else source)
    np.testing.assert_array_equal(found.steps, np.arange(7, STEPS, 7))
    np.testing.assert_array_equal(found.l1, runs.implied_l1(metrics)[1])
    rates = [7 * COSINE[t : t + 7].mean() for t in found.steps[:-1].astype(int)]
    np.testing.assert_allclose(found.learning_rate, rates)


def test_columns_of_files_are_thresholds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("each.npy", 0.3 * X**2)
    rows = [f"{t},{0.3 * X[t] ** 2}" for t in (0, 10, 50, STEPS)]
    (tmp_path / "log.csv").write_text("\n".join(["step,threshold", *rows]))
    np.save("table.npy", np.stack([X, 0.3 * X**2], 1))
    found = curves("each.npy", "log.csv", "table.npy:1")
    np.testing.assert_allclose(found["each.npy"].l1, np.diff(0.3 * X**2) / COSINE, rtol=1e-4)
    np.testing.assert_array_equal(found["each.npy"].l1, found["table.npy:1"].l1)
    expected = 0.3 * X[10] ** 2 / COSINE[:10].sum()
    assert found["log.csv"].l1[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("text", "column", "steps", "values"),
    [
        ("1\n2\n", None, None, [1, 2]),
        ("a,b\n1,2\n3,4\n", "b", None, [2, 4]),
        ("1,2\n3,4\n", "1", None, [2, 4]),
        ("\ufeffstep, threshold\n0, 0.5\n\n9, 1\n", None, [0, 9], [0.5, 1]),
    ],
)
def test_columns_of_csv_files(tmp_path, text, column, steps, values):
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    found = columns.read_column(path, column)
    assert (None if found[0] is None else found[0].tolist()) == steps
    assert found[1].tolist() == values


# --- schedules: the table and the plot -------------------------------------------------------


def test_the_table_says_where_l1_is_undefined(here):
    found = curves("lats", "linear", learning_rate=f"{here}:tail")
    lines = analysis.summary_table(list(found.values())).splitlines()
    cells = lines[2].split()
    assert cells[:1] + [float(c) for c in cells[1:6]] == ["lats", 0.3, 0.02, 0.02, 0.02, 0.02]
    assert float(cells[6]) < 1e-12
    zero = "mu is undefined at 50 of 200 steps, where the learning rate is zero"
    assert lines[-2:] == [f"lats: {zero}", f"linear: {zero} and the threshold moves all the same"]


@pytest.mark.slow
def test_picture_shows_each_schedule(tmp_path, monkeypatch):
    figures = catch_figures(monkeypatch)
    rate = optax.cosine_decay_schedule(0.1, STEPS)
    thresholds = {
        "lats": lats_optax.lats_threshold(rate, STEPS, final=0.3),
        "s-lats": lats_optax.s_lats_threshold(STEPS, final=0.3),
        "linear": lambda t: 0.3 * t / STEPS,
    }
    draw_thresholds(tmp_path / "a.png", thresholds, rate, STEPS, steps_per_epoch=EPOCH)
    panels = {axes.get_title(loc="left"): axes for axes in figures[0].axes}
    rates, l1, threshold, slope = panels.values()
    assert [axes.get_xlabel() for axes in (rates, l1, threshold)] == ["epoch"] * 3
    assert all(axes.get_ylabel() for axes in panels.values())
    (line,) = rates.get_lines()
    np.testing.assert_allclose(line.get_ydata()[:-1], COSINE, rtol=1e-6)
    lats, s_lats, linear = threshold.get_lines()
    np.testing.assert_allclose(linear.get_ydata(), 0.3 * X, rtol=1e-6)
    np.testing.assert_allclose(linear.get_xdata(), EPOCHS * X)
    assert lats.get_linewidth() > s_lats.get_linewidth() == linear.get_linewidth()
    assert l1.get_yscale() == "log"
    np.testing.assert_allclose(l1.get_lines()[0].get_ydata(), 0.3 / COSINE.sum(), rtol=1e-6)
    # Over what has been spent of the learning rate, LATS is straight.
    straight = slope.get_lines()[0]
    np.testing.assert_allclose(straight.get_ydata(), 0.3 * straight.get_xdata(), atol=1e-9)
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels[0] == "lats: μ = 0.0299"
    assert labels[2].startswith("linear: μ = 0.015 … 24")


def test_long_runs_are_thinned_and_keep_their_extremes(tmp_path, monkeypatch):
    figures = catch_figures(monkeypatch)
    steps, jumps = 100_000, np.arange(1, 100_000, 1000)

    table = np.zeros(steps + 1)
    table[jumps] = 1e-3
    threshold = lats_optax.ThresholdSchedule(np.cumsum(table))
    draw_thresholds(tmp_path / "a.png", {"jumps": threshold}, 0.1, steps)
    line = figures[0].axes[1].get_lines()[0]
    assert len(line.get_xdata()) < 10_000
    np.testing.assert_allclose(np.sum(line.get_ydata() > 0.0099), len(jumps), atol=1)


PICTURES = {
    "one that stands still": {"constant": 0.1},
    "both signs, and more than there are colors": {
        f"{n}": (lambda t, n=n: 0.1 * (1.1 + np.sin(t / (n + 1)))) for n in range(9)
    },
    "names that matplotlib takes for something else": {
        "_hidden": 0.1,
        "half $ a formula": lambda t: 0.1 * t,
        "long" * 50: lambda t: 0.2 * t,
    },
    "recorded": {"run": analysis.recorded_curve("_r$", COUNTS, X[:-1], X[:-1], own_rate=True)},
}


@pytest.mark.parametrize("thresholds", matrix.fast(PICTURES.values(), 1), ids=PICTURES)
def test_picture_is_a_png_of_its_size(tmp_path, thresholds):
    path = tmp_path / "schedules.png"
    path.write_text("old")
    draw_thresholds(path, thresholds, lambda t: 0.1 * (t < 150), STEPS)
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (2100, 1350))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({}, 0.1, 10), "no thresholds"),
        (({"a": 0.1}, 0.1, 0), "steps: 0"),
        (({"a": -1.0}, 0.1, 10), "a: -1.0"),
        (({"a": lambda t: t - 5.0}, 0.1, 10), "a: the threshold is -5 after 0 steps"),
        (({"a": 0.1}, 0.0, 10), "learning_rate: it is zero"),
    ],
)
def test_library_errors_name_the_argument(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        draw_thresholds(tmp_path / "a.png", *arguments)
    assert not list(tmp_path.iterdir())


# --- models -------------------------------------------------------------------------------------

# Positions of the output that each part of digits-cnn computes for 8×8 images.
POSITIONS = {"stem": 64, "block1": 16, "block2": 16, "classifier": 1}


@pytest.fixture(scope="module")
def digits():
    """The model, its shapes filled with numbers, 90 % of each kernel and a channel zero."""
    net = models.create("digits-cnn", num_classes=10)
    rng = np.random.default_rng(0)

    def fill(shape):
        values = rng.normal(size=shape.shape).astype(np.float32)
        if values.ndim >= 2:
            values[rng.random(shape.shape) < 0.9] = 0
            values[..., 3] = 0
        return values

    return net, jax.tree.map(fill, variables_of(net, (8, 8, 1)))


@pytest.fixture(scope="module")
def made(tmp_path_factory, digits):
    """A directory of files to look at."""
    net, variables = digits
    made = tmp_path_factory.mktemp("made")
    save_model(made / "model.safetensors", net, variables, (8, 8, 1))
    lats_optax.save_sparse(made / "params.safetensors", variables["params"])
    lats_optax.save_sparse(made / "variables.safetensors", variables)
    lats_optax.save_sparse(made / "mlp.safetensors", {"w": np.eye(3, dtype=np.float32)})
    lats_optax.save_sparse(made / "empty.safetensors", {})
    data = bytearray((made / "model.safetensors").read_bytes())
    (made / "cut.safetensors").write_bytes(data[:-10])
    data[-10] ^= 1
    (made / "flipped.safetensors").write_bytes(data)
    (made / "foreign.safetensors").write_text("no such thing")
    (made / "void").mkdir()
    (made / "log.csv").write_text("step,threshold\n0,0.1\n900,0.2\n")
    (made / "ragged.csv").write_text("1,2\n3\n")
    (made / "words.csv").write_text("threshold\nhigh\n")
    np.save(made / "pickle.npy", np.array([{}], object), allow_pickle=True)
    np.save(made / "cut.npy", X)
    (made / "cut.npy").write_bytes((made / "cut.npy").read_bytes()[:200])
    write_run(made / "dense", [{"split": "train", "step": 1, "epoch": 1}])
    write_run(made / "broken", [{"step": 1}])
    for plot in ("schedule.png", "model.png"):
        (made / plot).write_text("old")
    return made


@pytest.fixture
def files(here, made, tmp_path):
    """These files in the current directory, with the module of `here`, which it names."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return here


def by_hand(variables):
    """Entries, entries that are not zero, and MACs of each kernel."""
    names, leaves = jax.tree.leaves(masks.paths(variables["params"])), variables["params"]
    return {
        path: (v.size, np.count_nonzero(v), POSITIONS[path.split("/")[0]] * v.size)
        for path, v in zip(names, jax.tree.leaves(leaves))
        if v.ndim >= 2
    }


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("model.safetensors", {}),
        (".", {}),
        ("params.safetensors", {"model": "digits-cnn", "image_shape": (8, 8, 1)}),
        ("variables.safetensors", {"model": "digits-cnn", "image_shape": (8, 8, 1)}),
    ],
)
def test_macs_and_zeros_are_those_counted_by_hand(files, tmp_path, digits, file, settings):
    found = model_file.inspect_file(model_file.ModelRequest(tmp_path / file, **settings))
    rows = {la.path: la for la in found.report.shown}
    expected = by_hand(digits[1])
    assert rows.keys() == expected.keys()
    for path, (size, nonzero, dense) in expected.items():
        assert (rows[path].size, rows[path].size - rows[path].zeros) == (size, nonzero)
        assert (rows[path].dense, rows[path].effective) == (dense, dense * nonzero // size)
    total = sum(dense for _, _, dense in expected.values())
    assert f"{total:,}" in str(found.report)
    assert found.call.startswith("1.62 M dense, ")
    arrays = digits[1]["params"] if file.startswith("params") else digits[1]
    assert found.dense_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    assert found.file_bytes < found.dense_bytes / 5


def test_macs_of_other_images(files, digits):
    request = model_file.ModelRequest(Path("model.safetensors"), image_shape=(16, 16, 1))
    found = {la.path: la.dense for la in model_file.inspect_file(request).report.shown}
    for path, (_, _, dense) in by_hand(digits[1]).items():
        assert found[path] == (1 if path.startswith("classifier") else 4) * dense


@pytest.mark.parametrize("file", ["params.safetensors", "mlp.safetensors"])
def test_a_file_that_does_not_say_its_model_has_no_macs(files, monkeypatch, capsys, file):
    catch_figures(monkeypatch)
    assert cli.inspect(["model", file]) == 0
    out = capsys.readouterr().out
    assert "not counted: the file does not name its model" in out
    assert "MACs" not in out.splitlines()[0]
    assert "effective" not in out


def test_the_table_of_a_model():
    kernel = np.zeros((3, 3, 4, 5), np.float32)
    kernel[1, 1, 2, :3] = [0.5, -2.0, 1.0]
    bias, nothing = np.ones(5, np.float32), np.zeros((2, 2), np.float16)
    odd = np.array([[np.nan, 1.0], [0.0, np.inf]], np.float32)
    found = model.inspect_model({"a": kernel, "b": bias, "c": nothing, "d": odd})
    assert str(found).splitlines() == [
        "layer               shape  weights  non-zero  sparsity",
        "------------------------------------------------------",
        "a                 3×3×4×5      180         3    98.33%",
        "c                     2×2        4         0   100.00%",
        "d                     2×2        4         3    25.00%",
        "------------------------------------------------------",
        "prunable weights               188         6    96.81%",
        "all parameters                 193        11    94.30%",
        "wholly zero: 4 of 9 output channels, 5 of 8 input channels",
        "nothing is left of: c",
        "not finite: d",
    ]
    a, b, c, d = found.layers
    assert (a.outputs, a.zero_outputs, a.inputs, a.zero_inputs) == (5, 2, 4, 3)
    assert (d.outputs, d.zero_outputs, d.inputs, d.zero_inputs) == (2, 0, 2, 0)
    np.testing.assert_allclose(a.magnitudes, [0.55, 1.0, 1.9])
    assert (b.outputs, b.magnitudes) == (0, (1.0, 1.0, 1.0))
    assert c.magnitudes is None
    # 0.5, -2 and twice 1, of which the edges are where their bins are.
    assert found.histogram.sum() == 4
    middles = (found.edges[1:] + found.edges[:-1]) / 2
    expected = [-2, 0.5, 1]
    np.testing.assert_allclose(middles[found.histogram > 0], expected, atol=np.diff(found.edges)[0])


def test_macs_without_a_parameter_are_in_the_total():
    w = np.array([[1.0, 0.0], [0.0, 0.0]], np.float32)
    counted = lats_optax.count_macs(lambda w, x: (x @ x) @ w, w, np.ones((2, 2), np.float32))
    lines = str(model.inspect_model(w, counted)).splitlines()
    assert lines[-3].split() == ["no", "parameter", "8", "8"]
    assert lines[-2].split() == ["MACs", "16", "10"]


@pytest.mark.parametrize("counted", [True, False])
def test_picture_shows_each_layer(tmp_path, monkeypatch, counted):
    figures = catch_figures(monkeypatch)
    params = {"kernel": np.array([[0.5, 0.0, -2.0], [0.0, 0.0, 0.0]]), "bias": np.ones(3)}
    macs = None
    if counted:
        call = lambda params, x: x @ params["kernel"]  # noqa: E731
        macs = lats_optax.count_macs(call, params, np.ones((7, 2)))
    draw_model(tmp_path / "a.png", model.inspect_model(params, macs), "two layers")
    zeros, size, channels, magnitudes, histogram = figures[0].axes
    assert figures[0].get_suptitle() == "two layers"
    assert [text.get_text() for text in zeros.get_yticklabels()] == ["kernel"]
    np.testing.assert_allclose([bar.get_width() for bar in zeros.patches], [100 * 4 / 6])
    assert [bar.get_width() for bar in size.patches] == ([42, 14] if counted else [6, 2])
    assert size.get_xlabel() == ("MACs" if counted else "weights")
    np.testing.assert_allclose([bar.get_width() for bar in channels.patches], [100 / 3, 50])
    np.testing.assert_allclose(magnitudes.get_lines()[0].get_xdata(), [1.25])
    assert histogram.patches[0].get_data().values.sum() == 2
    assert all(axes.get_xlabel() for axes in figures[0].axes)


@pytest.mark.parametrize(
    "params",
    matrix.fast(
        [
            {"bias": np.zeros(3, np.float32)},
            {"half $ a formula": np.zeros((3, 3), np.float32), "long" * 50: np.ones((3, 3))},
            {f"layer{n:03}": np.full((2, 3), 10.0**n, np.float32) for n in range(-10, 11)},
        ],
        1,
    ),
    ids=["nothing is prunable", "names", "many layers of many magnitudes"],
)
def test_picture_of_a_model_is_a_png(tmp_path, params):
    path = tmp_path / "model.png"
    draw_model(path, model.inspect_model(params))
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 2400
        assert image.height > 30 * len(params)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_resnet50_has_its_published_macs(here, tmp_path):
    net, rng = models.create("resnet50", num_classes=1000), np.random.default_rng(0)

    def a_tenth(shape):
        return rng.permuted(np.arange(shape.size) % 10 == 0).reshape(shape.shape).astype(np.float32)

    variables = jax.tree.map(a_tenth, variables_of(net, (224, 224, 3)))
    save_model("model.safetensors", net, variables, (224, 224, 3))
    found = model_file.inspect_file(model_file.ModelRequest(tmp_path))
    assert found.call == "4.09 G dense, 409 M effective (10.0%), for an image of 224×224×3"


# --- the commands -------------------------------------------------------------------------------


@pytest.mark.slow
def test_schedule_prints_its_table_and_writes_its_picture(here, tmp_path, capsys):
    assert cli.inspect(["schedule", "lats", "pgh:0.1", "--final", "0.05", *SHORT]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["lats", "pgh:0.1"]
    assert "a cosine from 0.1 to 0, moved at every step; 2 epochs of 5 steps" in out
    assert out.endswith("plot           schedule.png\n")
    with Image.open(tmp_path / "schedule.png") as image:
        assert image.format == "PNG"


@pytest.mark.slow
def test_model_prints_its_table_and_writes_its_picture(files, tmp_path, capsys):
    assert cli.inspect(["model", ".", "--out", "digits.png"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "block1/conv1/kernel" in out
    assert "MACs           1.62 M dense" in out
    assert out.endswith("plot           digits.png\n")
    with Image.open(tmp_path / "digits.png") as image:
        assert image.format == "PNG"


@pytest.mark.slow
def test_pictures_are_beside_the_run_that_they_are_of(files, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    write_run(
        tmp_path / "run",
        [
            {"split": "train", "step": n, "epoch": n, "learning_rate_sum": n, "threshold": n}
            for n in (1, 2)
        ],
    )
    shutil.copy("model.safetensors", "run")
    for request, plot in (
        (["schedule", "linear", "mine=run", *SHORT], "run/schedule.png"),
        (["model", "run"], "run/model.png"),
        (["model", "run/model.safetensors"], "run/model.png"),
    ):
        Path(plot).unlink(missing_ok=True)
        assert cli.inspect(request) == 0
        assert capsys.readouterr().out.endswith(f"plot           {plot}\n")
        assert Path(plot).is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["schedule", "model"]),
        (["shedule"], ["shedule", "schedule", "model"]),
        (["schedule", "--finl", "1"], ["--finl", "--final"]),
        (["schedule", "lts"], ["'lts'", "lats, ", "epoch-lats", "MODULE:ATTRIBUTE"]),
        (["schedule", "linear:3"], ["'linear:3'"]),
        (["schedule", "pgh"], ["'pgh'", "pgh:0.01"]),
        (["schedule", "pgh:0"], ["beta", "0.0", "numbers of float32"]),
        (["schedule", "lats:-1"], ["beta", "-1", "above 0"]),
        (["schedule", "lats", "lats"], ["'lats'", "twice", "LABEL=lats"]),
        (["schedule", "--epochs", "0"], ["epochs is 0", "1 or more"]),
        (["schedule", "--steps-per-epoch", "-1"], ["steps_per_epoch is -1"]),
        (["schedule", "--final", "-1"], ["final", "-1.0", ">= 0"]),
        (["schedule", "--final", "nan"], ["final", "nan"]),
        (["schedule", "--learning-rate", "0"], ["learning_rate", "0.0"]),
        (["schedule", "--learning-rate", "fast"], ["learning_rate", "'fast'", "MODULE:ATTRIBUTE"]),
        (["schedule", "--learning-rate", "MINE:falling"], ["learning_rate", "at step 1"]),
        (
            ["schedule", "--learning-rate", "MINE:tail", "--shape", "constant"],
            ["shape", "MINE:tail"],
        ),
        (["schedule", "--shape", "milestones"], ["milestones", "()"]),
        (["schedule", "--milestones", "3"], ["shape", "'cosine'", "(3,)"]),
        (["schedule", "--shape", "constant", "--lr-update", "epoch"], ["lr_update", "'epoch'"]),
        (["schedule", "--factor", "2"], ["factor is 2.0"]),
        (["schedule", "--warmup-epochs", "9"], ["warmup_epochs", "9"]),
        (["schedule", "--preset", "digts"], ["'digts'", "digits-lats"]),
        (["schedule", "--preset", "digits"], ["'digits'", "dense"]),
        (["schedule", "nowhere:f"], ["nowhere", "import"]),
        (["schedule", "MINE:nothing"], ["MINE", "no attribute nothing"]),
        (["schedule", "MINE:number"], ["int", "function"]),
        (["schedule", "MINE:fails"], ["MINE:fails", "RuntimeError: two lines"]),
        (["schedule", "MINE:pair"], ["MINE:pair", "shape (2,)"]),
        (["schedule", "lats:MINE:fails"], ["MINE:fails", "RuntimeError"]),
        (["schedule", "MINE:falling"], ["threshold is -0.9 after 1 steps"]),
        (["schedule", "lats:half"], ["'half'"]),
        (["schedule", "none.csv"], ["there is no file none.csv"]),
        (["schedule", "log.csv:loss"], ["log.csv", "'loss'", "step, threshold"]),
        (["schedule", "log.csv"], ["log.csv", "0 to 900", "from 0 to 10"]),
        (["schedule", "ragged.csv"], ["ragged.csv", "line 2"]),
        (["schedule", "words.csv"], ["words.csv", "row 0"]),
        (["schedule", "pickle.npy"], ["pickle.npy", "allow_pickle"]),
        (["schedule", "cut.npy"], ["cut.npy"]),
        (["schedule", "void"], ["there is no file void/metrics.jsonl"]),
        (["schedule", "dense"], ["dense/metrics.jsonl", "no threshold"]),
        (["schedule", "broken"], ["broken/metrics.jsonl", "split"]),
        (["schedule", "--out", "nowhere/a.png"], ["no directory nowhere"]),
        (["schedule", "--out", "MINE.py"], ["MINE.py", ".png"]),
        (["model"], ["Missing", "PATH"]),
        (["model", "none.safetensors"], ["there is no file none.safetensors"]),
        (["model", "void"], ["void/model.safetensors", "lats-train"]),
        (["model", "cut.safetensors"], ["cut.safetensors is damaged"]),
        (["model", "flipped.safetensors"], ["flipped.safetensors is damaged", "checksum"]),
        (["model", "foreign.safetensors"], ["foreign.safetensors"]),
        (["model", "empty.safetensors"], ["empty.safetensors holds no parameters"]),
        (["model", "params.safetensors", "--model", "resnet18"], ["'resnet18'", "image_shape"]),
        (["model", "model.safetensors", "--image-shape", "8", "8", "0"], ["(8, 8, 0)"]),
        (["model", "model.safetensors", "--image-shape", "8", "8", "3"], ["8×8×3", "/stem"]),
        (
            [
                "model",
                "mlp.safetensors",
                *["--model", "resnet18", "--image-shape", "32", "32", "3"],
            ],
            ["classif"],
        ),
        (
            [
                "model",
                "params.safetensors",
                *["--model", "resnet20", "--image-shape", "8", "8", "1"],
            ],
            ["resnet20"],
        ),
        (["model", "model.safetensors", "--out", "model.safetensors"], [".png"]),
        (["model", "model.safetensors", "--out", "nowhere/a.png"], ["no directory nowhere"]),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(files, tmp_path, capsys, arguments, words):
    arguments = [argument.replace("MINE", files) for argument in arguments]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    path = list(sys.path)
    if arguments[:1] == ["schedule"] and not {"--epochs", "--steps-per-epoch"} & {*arguments}:
        arguments = [*arguments, *SHORT]
    assert cli.inspect(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lats-inspect: error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word.replace("MINE", files) in err
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert before == after
    assert sys.path == path


@pytest.mark.parametrize("of", matrix.fast([["schedule"], ["model", "model.safetensors"]], 1))
def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(
    files, tmp_path, monkeypatch, capsys, of
):
    def out_of_space(figure, path, **_):
        path.write_text("half a pic")
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", out_of_space)
    (tmp_path / "a.png").write_text("old")
    listed = sorted(tmp_path.iterdir())
    assert cli.inspect([*of, "--out", "a.png"]) == 2
    assert capsys.readouterr().err == "lats-inspect: error: no space left on device\n"
    assert (tmp_path / "a.png").read_text() == "old"
    assert sorted(tmp_path.iterdir()) == listed


def test_help_says_what_can_be_looked_at(capsys):
    for arguments, words in (
        (["--help"], ["schedule", "model"]),
        (["schedule", "--help"], ["lats:PROFILE", "--preset", "--learning-rate", "--out"]),
        (["model", "--help"], ["--image-shape", "--out"]),
    ):
        with pytest.raises(SystemExit, match="0"):
            cli.inspect(arguments)
        out = capsys.readouterr().out
        assert all(word in out for word in words)
