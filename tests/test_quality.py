"""The quality benchmark on a made-up task: what is run, what is written, what the tables say."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import lats_optax
from benchmarks.quality import fashion_mnist, intervals, plan, plot, run, search, table, workers
from benchmarks.quality.image_models import as_matrix_product
from benchmarks.quality.methods import Method, default, dense
from benchmarks.quality.peers.base import Setting
from benchmarks.quality.results import Key, Rate, Result, Results, read, reported
from benchmarks.quality.search import Search, Tried
from benchmarks.quality.tasks import Task, all_tasks
from benchmarks.quality.training import Outcome, Problem, fit
from tests import matrix

SPLITS = []


def run_made_up(make, target, seed, rate, split):
    """What a method makes is the sparsity that it ends at."""
    SPLITS.append(split)
    setting = Setting(target, 10, lambda count: rate, lats_optax.prunable, seed)
    sparsity = make(optax.sgd(rate), setting)
    return Outcome(0.9 - 0.2 * sparsity - rate / 10 + seed / 1000, round(1000 * sparsity), 1000)


def final_threshold(optimizer, setting, knob):
    return knob / (0.3 + 0.01 * setting.seed + knob)


def broken(optimizer, setting):
    raise RuntimeError("no such thing\nand more")


def load(directory):
    task = Task(
        "tiny",
        "accuracy",
        sparsities=(0.5, 0.75, 0.9),
        tuned_at=(0.75,),
        learning_rates=(0.2, 0.05),
        default_rate=0.1,
        make_optimizer=optax.sgd,
        run=run_made_up,
        seconds=1,
    )
    methods = (
        Method("dense", "", lambda optimizer, setting: 0.0, prunes=False),
        Method("lats_optax", "", lambda optimizer, setting: setting.target),
        Method("searched", "", final_threshold, search=Search(1e-3, 10.0)),
        Method("broken", "", broken),
    )
    return workers.Registry({"tiny": task}, {method.name: method for method in methods})


@pytest.fixture
def go(tmp_path):
    """Runs the command on the made-up task: its exit code and the file's lines."""

    def command(*arguments, methods=("dense", "lats_optax"), load=load):
        path = tmp_path / "new" / "quality.jsonl"
        options = ["--out", str(path), *arguments]
        code = run.main([*options, "--methods", *methods], load)
        return code, [json.loads(line) for line in path.read_text().splitlines()], path

    SPLITS.clear()
    return command


# --- running ------------------------------------------------------------------------------------


def test_a_finished_run_is_not_run_again(go, capsys):
    code, lines, path = go("--seeds", "2", "--sparsities", "0.75", "0.9")
    assert code == 0
    assert [(line["seed"], line["method"], line["target"]) for line in lines] == [
        (seed, method, target)
        for seed in (0, 1)
        for method, target in (("dense", 0.0), ("lats_optax", 0.75), ("lats_optax", 0.9))
    ]
    assert all(line["zeros"] == round(1000 * line["target"]) for line in lines)
    assert all(line["sparsity"] == line["target"] for line in lines)
    assert all(result.counts for result in read(path)[0].runs.values())
    before = path.read_bytes()
    assert len(SPLITS) == 6
    go("--seeds", "2", "--sparsities", "0.75", "0.9")
    assert path.read_bytes() == before
    assert len(SPLITS) == 6
    _, lines, _ = go("--seeds", "3", "--sparsities", "0.9")
    assert len(lines) == 8
    assert "about" in capsys.readouterr().out


def test_a_half_written_line_is_dropped(go, capsys):
    _, lines, path = go("--seeds", "2", "--sparsities", "0.9")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    _, again, _ = go("--seeds", "2", "--sparsities", "0.9")
    assert "half written; dropped" in capsys.readouterr().out
    assert len(SPLITS) == 5
    assert [line | {"seconds": 0} for line in again] == [line | {"seconds": 0} for line in lines]


def test_a_line_that_is_no_result_is_named(go, capsys):
    _, _, path = go("--seeds", "1", "--sparsities", "0.9")
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(SystemExit):
        go("--seeds", "1")
    assert "line 1 is not a result" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_workers_write_what_one_process_writes(go, tmp_path):
    arguments = ["--sparsities", "0.9", "--seeds", "2"]
    _, lines, _ = go(*arguments)
    path = tmp_path / "workers.jsonl"
    names = ["--methods", "dense", "lats_optax", "broken"]
    assert run.main([*arguments, *names, "--jobs", "2", "--out", str(path)], load) == 1
    parallel = [json.loads(line) for line in path.read_text().splitlines()]

    def identity(line):
        return line["method"], line["seed"], line["value"], line["zeros"]

    assert sorted(map(identity, parallel)) == sorted(map(identity, lines))


def test_a_method_that_raises_fails_alone(go, capsys):
    code, lines, _ = go("--seeds", "1", "--sparsities", "0.9", methods=("broken", "dense"))
    assert code == 1
    assert [line["method"] for line in lines] == ["dense"]
    printed = capsys.readouterr().out
    assert "failed: tiny, broken at 90 %, seed 0: RuntimeError: no such thing\n" in printed


def test_an_interrupt_leaves_what_is_finished(go, capsys):
    calls = itertools.count()

    def interrupted(*arguments):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return run_made_up(*arguments)

    def load_interrupted(directory):
        tasks, methods = load(directory)
        return workers.Registry(
            {"tiny": dataclasses.replace(tasks["tiny"], run=interrupted)}, methods
        )

    code, lines, _ = go("--seeds", "2", "--sparsities", "0.9", load=load_interrupted)
    assert (code, len(lines)) == (130, 1)
    assert "the same command goes on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "tinny"], "task 'tinny' is not known; known are 'tiny'"),
        (["--methods", "magic"], "method 'magic' is not known; known are 'dense', "),
        (["--sparsities", "1"], "--sparsities: 1.0 is not allowed; numbers between 0 and 1 are"),
        (["--seeds", "0"], "--seeds is 0; allowed: 1 or more"),
        (["--seeds", "1001"], "--seeds is 1001; allowed: 1000 or fewer"),
        (["--jobs", "0"], "--jobs is 0; allowed: 1 or more"),
        (["--rates", "nowhere"], "--rates: there is no file nowhere"),
    ],
)
def test_what_is_not_allowed(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run.main([*arguments, "--out", str(tmp_path / "quality.jsonl")], load)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_missing_data_is_named(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run.main(["--quick", "--data", str(tmp_path), "--out", str(tmp_path / "quality.jsonl")])
    assert stopped.value.code == 2
    assert "dataset-fashion-mnist" in capsys.readouterr().err.splitlines()[-1]


# --- tuning -------------------------------------------------------------------------------------


def test_tuning_does_not_touch_the_test_split(go, capsys):
    code, lines, _ = go("--tune")
    assert code == 0
    assert set(SPLITS) == {"validation"}
    runs = [line for line in lines if "seed" in line]
    assert {line["seed"] for line in runs} == {1000}
    assert {line["target"] for line in runs} == {0.0, 0.75}
    chosen = [line for line in lines if line.get("role") == "rate"]
    rates = {line["method"]: line["learning_rate"] for line in chosen}
    assert rates == {"dense": 0.0125, "lats_optax": 0.0125}
    assert "at the end of its range" in capsys.readouterr().out

    def load_two(directory):
        tasks, methods = load(directory)
        return workers.Registry(
            {"tiny": dataclasses.replace(tasks["tiny"], tuning_seeds=2)}, methods
        )

    _, lines, _ = go("--tune", load=load_two)
    runs = [
        (line["method"], line["learning_rate"], line["seed"]) for line in lines if "seed" in line
    ]
    assert len(runs) == len(set(runs)) == 2 * len({run[:2] for run in runs})
    assert {seed for *_, seed in runs} == {1000, 1001}

    _, lines, path = go("--seeds", "1", "--sparsities", "0.9")
    tested = [line for line in lines if line.get("split") == "test"]
    assert {line["method"]: line["learning_rate"] for line in tested} == rates
    elsewhere = path.with_name("quick.jsonl")
    run.main(
        ["--seeds", "1", "--methods", "dense", "--rates", str(path), "--out", str(elsewhere)], load
    )
    *taken, last = map(json.loads, elsewhere.read_text().splitlines())
    assert [line["role"] for line in taken] == ["rate", "rate"]
    assert last["learning_rate"] == rates["dense"]
    text = table.report(read(path)[0])
    assert "Learning rates tuned on validation data: dense" in text
    changed = {**taken[0], "learning_rate": 0.2}
    path.write_text(path.read_text() + json.dumps(changed) + "\n")
    run.main(
        ["--seeds", "1", "--methods", "dense", "--rates", str(path), "--out", str(elsewhere)], load
    )
    rate, rerun = map(json.loads, elsewhere.read_text().splitlines()[3:])
    assert rate == changed
    assert rerun["learning_rate"] == 0.2


@pytest.mark.parametrize(
    ("best", "tried", "chosen"),
    [
        (0.1, {0.05, 0.1, 0.2}, 0.1),
        (0.2, {0.05, 0.1, 0.2, 0.4}, 0.2),
        (0.03, {0.0125, 0.025, 0.05, 0.1, 0.2}, 0.025),
        (9.0, {0.05, 0.1, 0.2, 0.4, 0.8}, 0.8),
    ],
    ids=["inside", "at an end", "outside", "far outside"],
)
def test_a_range_of_learning_rates_is_widened_until_it_holds_the_best(go, best, tried, chosen):
    def load_with_a_peak(directory):
        tasks, methods = load(directory)

        def run_made_up(make, target, seed, rate, split):
            return Outcome(0.9 - abs(rate - best) / 10, round(1000 * target), 1000)

        task = dataclasses.replace(
            tasks["tiny"], learning_rates=(0.05, 0.1, 0.2), tuning_seeds=2, run=run_made_up
        )
        return workers.Registry({"tiny": task}, methods)

    code, lines, path = go("--tune", methods=("lats_optax",), load=load_with_a_peak)
    assert code == 0
    runs = [(line["learning_rate"], line["seed"]) for line in lines if "seed" in line]
    assert sorted(runs) == sorted((rate, seed) for rate in tried for seed in (1000, 1001))
    rates = [line for line in lines if line.get("role") == "rate"]
    assert [line["learning_rate"] for line in rates] == [chosen]
    before = path.read_bytes()
    go("--tune", methods=("lats_optax",), load=load_with_a_peak)
    assert path.read_bytes() == before


def test_a_learning_rate_is_used_from_the_sparsity_it_was_tuned_at_on(go):
    def load_twice_tuned(directory):
        tasks, methods = load(directory)

        def run_made_up(make, target, seed, rate, split):
            best = 0.2 if target < 0.8 else 0.05
            return Outcome(0.9 - abs(rate - best), round(1000 * target), 1000)

        task = dataclasses.replace(tasks["tiny"], tuned_at=(0.75, 0.9), run=run_made_up)
        return workers.Registry({"tiny": task}, methods)

    go("--tune", methods=("lats_optax",), load=load_twice_tuned)
    options = ["--seeds", "1", "--sparsities", "0.5", "0.75", "0.85", "0.9", "0.95"]
    _, lines, path = go(*options, methods=("lats_optax",), load=load_twice_tuned)
    used = {line["target"]: line["learning_rate"] for line in lines if line.get("split") == "test"}
    assert used == {0.5: 0.2, 0.75: 0.2, 0.85: 0.2, 0.9: 0.05, 0.95: 0.05}
    results = read(path)[0]
    assert {result.key.target for result in reported(results)} == set(used)
    text = table.report(results)
    assert "tuned on validation data: lats_optax 0.2 to 85 %, 0.05 to 95 %." in text


# --- searching ----------------------------------------------------------------------------------


def test_a_search_hits_the_target_and_goes_on_where_it_was(go):
    _, lines, path = go("--seeds", "2", "--sparsities", "0.75", methods=("searched",))
    for seed in (0, 1):
        *before, last = (result for key, result in read(path)[0].runs.items() if key.seed == seed)
        assert last.counts
        assert abs(last.sparsity - 0.75) <= 0.005
        assert not any(result.counts for result in before)
        assert all(abs(result.sparsity - 0.75) > 0.005 for result in before)
    first = [line for line in lines if line["seed"] == 0]
    others = [line for line in lines if line["seed"] == 1]
    assert others[0]["knob"] == first[-1]["knob"]
    assert 1 < len(first) <= 12

    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    SPLITS.clear()
    _, again, _ = go("--seeds", "2", "--sparsities", "0.75", methods=("searched",))
    assert len(SPLITS) == len(lines) - 2
    assert [line["knob"] for line in again] == [line["knob"] for line in lines]
    rows = table.whole_runs(read(path)[0])
    assert rows[-1] == f"| tiny | searched | 75 % | {len(first)} | {len(others):.1f} | – |"


def test_at_a_high_sparsity_a_search_goes_on_until_a_run_compares(go):
    _, _, path = go("--seeds", "2", "--sparsities", "0.975", methods=("searched",))
    results = read(path)[0]
    *before, last = (result for key, result in results.runs.items() if key.seed == 0)
    assert last.counts
    assert abs(last.sparsity - 0.975) < 0.0025
    assert not any(result.counts for result in before)
    close = [abs(result.sparsity - 0.975) <= 0.005 for result in before]
    assert any(close)
    rows = table.whole_runs(results)
    assert rows[-1] == f"| tiny | searched | 97.5 % | {close.index(True) + 1} | 1.0 | – |"


def test_what_leaves_half_as_many_weights_again_does_not_compare():
    results = collected(
        *three_seeds("lats_optax", 0.99, [0.85, 0.86, 0.87]),
        *three_seeds("denser", 0.99, [0.88, 0.88, 0.89], sparsity=0.986),
    )
    text = table.report(results)
    assert "88.33 ± 1.43 at 98.6 %" in text
    assert text.endswith("nothing to compare lats_optax with")


@pytest.mark.parametrize("target", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("start", [None, 0.02, 3.0])
@pytest.mark.parametrize("increasing", [True, False])
def test_bisection_of_a_curve(target, start, increasing):
    options = Search(1e-3, 1e2, increasing=increasing)
    tried = []
    while not tried or not search.hits(target, tried[-1].sparsity):
        knob = search.propose(options, target, tried, start)
        assert options.low <= knob <= options.high
        strength = knob if increasing else 1 / knob
        tried.append(Tried(knob, strength / (0.3 + strength)))
        assert len(tried) <= options.most


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("sparsity", [0.1, 0.999])
@pytest.mark.parametrize("start", [None, 1.0])
def test_a_search_leaves_a_range_without_the_target(increasing, sparsity, start):
    options = Search(1e-2, 1e2, increasing=increasing)
    tried = []
    for _ in range(8):
        tried.append(Tried(search.propose(options, 0.9, tried, start), sparsity))
    knobs = [one.knob for one in tried]
    upwards = increasing == (sparsity < 0.9)
    assert knobs == sorted(set(knobs), reverse=not upwards)
    assert knobs[0] == 1.0
    assert options.low <= knobs[3] <= options.high
    assert not options.low <= knobs[-1] <= options.high


def test_a_search_ends_where_the_target_cannot_be_hit():
    options = Search(1.0, 2.0, most=5)
    method = Method("never", "", final_threshold, search=options)
    task = load(None).tasks["tiny"]
    cell = plan.Cell(task, method, 0.9, 0, 0.1, "test")
    finished = {}
    for _ in range(5):
        key = plan.next_run(cell, finished)
        finished[key] = made_up(**key._asdict(), sparsity=0.2)
    assert plan.next_run(cell, finished) == plan.Status.DONE
    # Another seed begins where the first came closest, and waits for it.
    other = cell._replace(seed=1, first=cell)
    assert plan.next_run(other, finished).knob in [key.knob for key in finished]
    assert plan.next_run(other, {}) == plan.Status.WAITING


# --- statistics ---------------------------------------------------------------------------------


def test_interval_against_scipy():
    values = np.random.default_rng(0).normal(size=7)
    found = intervals.interval(values)
    low, high = stats.t.interval(0.95, 6, loc=values.mean(), scale=stats.sem(values))
    assert found.mean - found.half_width == pytest.approx(low)
    assert found.mean + found.half_width == pytest.approx(high)
    assert found.std == pytest.approx(np.std(values, ddof=1))


def test_interval_by_hand():
    # The 97.5 % quantile of Student's t with 4 degrees of freedom is 2.776.
    found = intervals.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.seeds) == (3.0, 5)
    assert found.half_width == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5), rel=1e-3)
    assert math.isnan(intervals.interval([1.0]).half_width)


def test_paired_difference_is_scipys_test():
    rng = np.random.default_rng(1)
    ours = dict(enumerate(rng.normal(size=6)))
    other = {seed: ours[seed] - 0.1 + 0.05 * rng.normal() for seed in (5, 3, 1, 2)} | {9: 7.0}
    found = intervals.paired(ours, other)
    seeds = [1, 2, 3, 5]
    tested = stats.ttest_rel([ours[s] for s in seeds], [other[s] for s in seeds])
    low, high = tested.confidence_interval(0.95)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(
        (low, high)
    )
    assert found.contains_zero == (tested.pvalue > 0.05)
    assert intervals.paired({0: 1.0}, {1: 1.0}) is None


# --- what is shown ------------------------------------------------------------------------------


def made_up(method="lats_optax", target=0.9, seed=0, value=0.5, **fields):
    zeros = round(1000 * target)
    defaults = {
        "task": "tiny",
        "learning_rate": 0.1,
        "split": "test",
        "knob": None,
        "task_version": 1,
        "method_version": 1,
        "metric": "accuracy",
        "zeros": zeros,
        "size": 1000,
        "sparsity": zeros / 1000,
        "seconds": 1.0,
        "jax": "1.2.3",
        "machine": "abacus, 2 cores",
    }
    named = {"method": method, "target": target, "seed": seed, "value": value}
    fields = {**defaults, **named, **fields}
    key = Key(**{name: fields.pop(name) for name in Key._fields})
    return Result(key, **fields)


def collected(*lines):
    results = Results({}, {})
    for line in lines:
        results.add(line)
    return results


def three_seeds(method, target, values, **fields):
    return [made_up(method, target, seed, value, **fields) for seed, value in enumerate(values)]


def made_up_results():
    return collected(
        *three_seeds("dense", 0.0, [0.90, 0.91, 0.92]),
        *three_seeds("noisy", 0.9, [0.80, 0.86, 0.89]),
        *three_seeds("worse", 0.9, [0.80, 0.81, 0.82]),
        *three_seeds("too dense", 0.9, [0.90, 0.90, 0.90], sparsity=0.8),
        *three_seeds("lats_optax", 0.9, [0.85, 0.86, 0.87]),
        *three_seeds("lats_optax", 0.95, [0.75, 0.76, 0.77]),
        *three_seeds("noisy", 0.95, [0.76, 0.77, 0.78]),
        made_up("lats_optax", 0.99, 0, 0.5),
        # None of these counts.
        made_up("lats_optax", 0.9, 7, 0.1, split="validation"),
        made_up("worse", 0.9, 8, 0.99, method_version=0),
    )


def test_table():
    lines = table.report(made_up_results()).splitlines()
    start = lines.index("### tiny")
    assert lines[start + 2] == "Test accuracy in %; dense 91.00 ± 2.48."
    assert lines[start + 4 : start + 10] == [
        "| method | 90 % | 95 % | 99 % |",
        "| --- | ---: | ---: | ---: |",
        "| lats_optax | **86.00 ± 2.48** (3) | 76.00 ± 2.48 (3) | **50.00** (1) |",
        "| noisy | **85.00 ± 11.38** (3) | **77.00 ± 2.48** (3) | – |",
        "| too dense | 90.00 ± 0.00 at 80.0 % (3) | – | – |",
        "| worse | 81.00 ± 2.48 (3) | – | – |",
    ]
    assert "22 runs on abacus, 2 cores; jax 1.2.3." in lines
    assert lines[-3:] == [
        "- tiny at 90 %: lats_optax 86.00, best other noisy 85.00; paired difference +1.00 ± 8.96 "
        "over 3 seeds: **within the interval of the best**",
        "- tiny at 95 %: lats_optax 76.00, best other noisy 77.00; paired difference -1.00 ± 0.00 "
        "over 3 seeds: **behind the best**",
        "- tiny at 99 %: nothing to compare lats_optax with",
    ]


def test_tuned_rates_take_the_place_of_others():
    results = collected(
        *three_seeds("lats_optax", 0.9, [0.1, 0.1, 0.1], learning_rate=0.1),
        Rate("tiny", "lats_optax", 0.9, 0.2, 1, 1),
        *three_seeds("lats_optax", 0.9, [0.7, 0.8, 0.9], learning_rate=0.2),
        *three_seeds("other", 0.9, [0.7, 0.8, math.nan]),
    )
    text = table.report(results)
    assert "| lats_optax | **80.00 ± 24.84** (3) |" in text
    assert "| other | diverged (3) |" in text
    assert "tuned on validation data: lats_optax 0.2." in text
    assert "Learning rate of other, not tuned: 0.1." in text


def test_bits_are_better_when_fewer():
    results = collected(
        *three_seeds("lats_optax", 0.9, [2.0, 2.1, 2.2], metric="bits"),
        *three_seeds("other", 0.9, [2.5, 2.61, 2.7], metric="bits"),
    )
    text = table.report(results)
    assert "| lats_optax | **2.100 ± 0.248** (3) |" in text
    assert "| other | 2.603 ± 0.249 (3) |" in text
    assert text.endswith("paired difference -0.503 ± 0.014 over 3 seeds: **best**")


def test_table_of_a_file_that_is_not_there(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        table.main([str(tmp_path / "none.jsonl")])
    assert stopped.value.code == 2
    assert "there is no file" in capsys.readouterr().err.splitlines()[-1]


def test_picture(go, tmp_path):
    _, _, path = go("--seeds", "2")
    target = tmp_path / "quality.png"
    assert plot.main([str(path), str(target)]) == 0
    content = target.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert 600 < width < 2000
    assert 500 < height < 2000
    assert 10_000 < len(content) < 300_000


# --- the tasks ----------------------------------------------------------------------------------


def test_tasks_are_named_once_and_say_what_they_need(tmp_path):
    tasks = all_tasks(tmp_path)
    assert list(tasks) == ["lenet", "resnet", "char", "spiking"]
    for name, task in tasks.items():
        assert task.name == name
        assert task.default_rate in task.learning_rates
        assert set(task.tuned_at) <= set(task.sparsities)
        assert list(task.tuned_at) == sorted(task.tuned_at)
        assert list(task.sparsities) == sorted(task.sparsities)
        assert set(task.quick_sparsities) <= set(task.sparsities)
    assert {name for name, task in tasks.items() if task.quick_sparsities} == {"lenet", "resnet"}


@pytest.mark.parametrize(
    ("validation", "trained_on", "held_out"), [(2, [0, 1, 2], [3, 4]), (0, range(5), [9])]
)
def test_no_split_trains_on_what_it_is_scored_on(
    monkeypatch, tmp_path, validation, trained_on, held_out
):
    labels = {"train_labels": np.arange(5, dtype=np.uint8), "test_labels": np.uint8([9])}
    images = {
        name.replace("labels", "images"): np.broadcast_to(of[:, None, None], (len(of), 28, 28))
        for name, of in labels.items()
    }
    monkeypatch.setattr(fashion_mnist, "read_idx", lambda directory: labels | images)
    data = fashion_mnist.device_data(tmp_path, validation)
    for prefix, expected in (("", trained_on), ("held_out_", held_out)):
        np.testing.assert_array_equal(data[f"{prefix}labels"], expected)
        np.testing.assert_array_equal(data[f"{prefix}images"][:, 5, 5], expected)


@pytest.mark.parametrize(("size", "strides"), matrix.fast([(3, 2), (1, 2)], [(1, 2)]))
def test_convolution_as_a_matrix_product(size, strides):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, 7, 6, 3))
    kernel = jax.random.normal(keys[1], (size, size, 3, 5))
    padding = [(size // 2, size // 2)] * 2
    expected = jax.lax.conv_general_dilated(
        x, kernel, (strides, strides), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = jax.jit(lambda x, kernel: as_matrix_product(x, kernel, [strides] * 2, padding))(
        x, kernel
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def perceptron():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 8)).astype(np.float32)
    y = (x @ rng.normal(size=(8, 3))).argmax(axis=-1)

    def logits(params, x):
        return x @ params["kernel"] + params["bias"]

    def loss(params, stats, data, rows):
        found = logits(params, data["x"][rows])
        losses = optax.softmax_cross_entropy_with_integer_labels(found, data["y"][rows])
        return losses.mean(), stats

    return Problem(
        {"x": jnp.asarray(x), "y": jnp.asarray(y)},
        init=lambda seed: ({"kernel": jnp.full((8, 3), 0.1), "bias": jnp.zeros(3)}, {}),
        loss=loss,
        score=lambda params, stats, data: jnp.mean(
            logits(params, data["x"]).argmax(axis=-1) == data["y"]
        ),
        rows=lambda seed: np.random.default_rng(seed).integers(256, size=(100, 32)),
        mask=lats_optax.prunable,
        steps=100,
        chunks=2,
    )


def test_training_with_and_without_pruning():
    rate = optax.cosine_decay_schedule(0.5, 100)
    problem = perceptron()
    full = fit(problem, dense, optax.sgd(rate), rate, 0.0, 3)
    assert full.value > 0.9
    assert (full.zeros, full.size) == (0, 24)
    sparse = fit(problem, default, optax.sgd(rate), rate, 0.75, 3)
    assert (sparse.zeros, sparse.sparsity) == (18, 0.75)
    assert 0.5 < sparse.value < full.value


@pytest.mark.slow
def test_batch_statistics_are_those_of_the_final_weights():
    # A model whose statistic is the mean of its batch times its weight, as normalization keeps it.
    data = jnp.arange(8.0)

    def loss(params, stats, data, rows):
        batch = params["w"][0, 0] * data[rows].mean()
        return batch, {"mean": 0.9 * stats["mean"] + 0.1 * batch}

    problem = Problem(
        data,
        init=lambda seed: ({"w": jnp.ones((1, 1))}, {"mean": jnp.zeros(())}),
        loss=loss,
        score=lambda params, stats, data: stats["mean"] / params["w"][0, 0],
        rows=lambda seed: np.arange(8).reshape(4, 2),
        mask=lats_optax.prunable,
        steps=4,
        chunks=2,
    )
    outcome = fit(problem, lambda tx, setting: tx, optax.sgd(0.1), lambda count: 0.1, 0.5, 0)
    assert outcome.value == pytest.approx(3.5)
    assert outcome == Outcome(outcome.value, 0, 1)


@pytest.mark.slow
def test_the_language_model_is_that_of_the_example():
    from benchmarks.quality.characters import language_model
    from lats_optax.examples import char_transformer as example

    test, validation = language_model("test"), language_model("validation")
    _, training, held_out = example.read_topics()
    np.testing.assert_array_equal(test.data["text"], training)
    assert len(validation.data["text"]) < len(training)
    assert int(test.data["held_out"][0, 0]) == int(held_out[0])
    rng = np.random.default_rng(0)
    windows = np.lib.stride_tricks.sliding_window_view(training, example.CONTEXT + 1)
    batches = [windows[rng.integers(len(windows), size=example.BATCH)] for _ in range(2)]
    np.testing.assert_array_equal(
        test.data["text"][test.rows(0)[1][:, None] + np.arange(example.CONTEXT + 1)], batches[1]
    )


@pytest.mark.slow
def test_the_language_model_starts_with_the_loss_of_the_example():
    from benchmarks.quality.characters import language_model
    from lats_optax.examples import char_transformer as example

    problem = language_model("test")
    params, _ = problem.init(0)
    chosen = problem.mask(params)
    assert not any(masked for name, masked in chosen.items() if name.startswith("embed_"))
    assert chosen["blocks/0/qkv/kernel"]
    rows = problem.rows(0)[0]
    windows = problem.data["text"][rows[:, None] + jnp.arange(example.CONTEXT + 1)]
    model = example.Transformer(params["head/kernel"].shape[1], rngs=example.nnx.Rngs(0))
    found, _ = jax.jit(problem.loss)(params, {}, problem.data, rows)
    assert float(found) == pytest.approx(float(example.bits(model, windows)), rel=1e-5)
