"""The benchmarks at small sizes: what they count, against counts by hand, and that they run."""

import dataclasses
import math
import multiprocessing
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lats_optax
from benchmarks import (
    compaction,
    input_pipeline,
    input_workers,
    long_run,
    mixed_precision,
    optimizer_step,
    shapes,
    tpu_compile,
    train_throughput,
)
from lats_optax import models, prox
from lats_optax.training import assembly
from lats_optax.training.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PruneConfig,
    TrainConfig,
)
from lats_optax.training.optimizer import make_optimizer
from lats_optax.training.parallel import PmapEngine
from tests import matrix, tiny

SMALL = {f"layer{i}/kernel": (512, 512) for i in range(3)}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(shapes, "resnet50", lambda: SMALL)


@pytest.mark.slow
def test_resnet50_has_the_published_number_of_parameters():
    assert sum(jnp.zeros(s).size for s in shapes.resnet50().values()) == 25_556_032


@pytest.mark.parametrize(
    ("name", "most"),
    matrix.fast([("proximal_step", 1.02), ("soft_threshold, schedule", 1.5)], 1),
)
def test_bytes_of_an_update_on_the_cpu(small, name, most):
    programs = {
        key: optimizer_step.compile_step(optimizer_step.optimizers()[key]) for key in ("sgd", name)
    }
    counts = {key: optimizer_step.bytes_accessed(program) for key, program in programs.items()}
    # The scalars of the schedules do not count beside 25 million weights.
    size = sum(jnp.zeros(s).size for s in SMALL.values())
    assert counts[name] / size <= most * counts["sgd"] / size + 0.01


def test_a_frozen_step_moves_the_bytes_of_sgd_and_one_multiply(small):
    names = ("frozen support", "sgd and one multiply", "sgd")
    programs = {name: optimizer_step.optimizers()[name] for name in names}
    size = sum(jnp.zeros(s).size for s in SMALL.values())
    counts = {
        name: optimizer_step.bytes_accessed(optimizer_step.compile_step(tx)) / size
        for name, tx in programs.items()
    }
    assert counts["frozen support"] == pytest.approx(counts["sgd and one multiply"], abs=0.01)
    assert counts["frozen support"] == pytest.approx(counts["sgd"] + 1, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "copies"),
    [
        # CPUs keep the updates until they know the bound, or the weights until their factor.
        ({}, 1.01),
        (dict(operator=prox.prox_annealed(optimizer_step.STEPS), pruned_scale=1.0), 0.02),
    ],
    ids=["default", "neither rescaled nor bounded"],
)
def test_copies_of_the_weights_in_a_step_of_the_closed_loop(small, options, copies):
    closed = lats_optax.target_sparsity(0.9, 0.1, optimizer_step.STEPS)
    tx = optax.chain(optax.sgd(0.1), lats_optax.soft_threshold(closed, **options))
    memory = optimizer_step.compile_step(tx).memory_analysis()
    assert memory.temp_size_in_bytes < copies * sum(4 * math.prod(s) for s in SMALL.values())


def test_fused_traffic_reads_operands_and_results():
    text = """HloModule step

%body (p0: f32[64,64]) -> f32[64,64] {
  %p0 = f32[64,64]{1,0} parameter(0)
  ROOT %inner = f32[64,64]{1,0} fusion(%p0), kind=kLoop, calls=%other
}

ENTRY %main (w: f32[64,64], g: f32[64,64], count: s32[]) -> (f32[64,64], f32[64,64]) {
  %w = f32[64,64]{1,0} parameter(0)
  %g = f32[64,64]{1,0} parameter(1)
  %count = s32[] parameter(2)
  %rate = f32[] fusion(%count), kind=kLoop, calls=%schedule
  ROOT %both = (f32[64,64]{1,0:T(8,128)}, f32[64,64]{1,0}) fusion(%w, %g, %rate), kind=kLoop
}
"""
    # Two arrays and a scalar in, two arrays out; the schedule's own fusion is no pass.
    assert optimizer_step.fused_traffic(text) == (1, 4 * 64 * 64 * 4 + 4)


def test_ways_through_the_input_pipeline_make_the_same_images():
    encoded = [input_pipeline.encode(image) for image in input_pipeline.pictures(4)]
    figures = input_pipeline.measure(encoded, 64, seconds=0)
    assert figures["train: plain Pillow"][1] == 1
    assert all(speed > 0 and ratio > 0 for speed, ratio in figures.values())
    far = input_pipeline.distances(encoded, 64)
    assert set(far) < set(figures)
    assert far["train: ours, Pillow"] == float("inf")
    assert far["train: plain OpenCV, INTER_LINEAR"] < far["train: ours, OpenCV (the default)"]


def test_input_pipeline_names_wrong_arguments(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["input_pipeline", "--size", "0"])
    with pytest.raises(SystemExit):
        input_pipeline.main()
    assert "--size is 0; allowed is more than 0" in capsys.readouterr().err


def test_the_whole_pipeline_at_a_small_size(capsys):
    arguments = "--workers 0 --records 8 --images 2 --batch-size 4 --seconds 0 --rounds 1"
    rates = input_workers.main(arguments.split())
    assert len(rates) == 3
    assert min(rate.clock for rate in rates) > 0
    _, _, cores, *_, limit = capsys.readouterr().out.splitlines()[-1].split()
    assert float(limit) == pytest.approx(int(cores) * rates[1].processor, abs=1)


def test_processor_time_is_that_of_workers_too():
    worker = multiprocessing.get_context("spawn").Process(target=sum, args=(range(10**10),))
    worker.start()
    try:
        deadline = time.monotonic() + 60
        while input_workers.processor_seconds() - time.process_time() < 0.1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        worker.kill()
        worker.join()
    assert input_workers.processor_seconds() == pytest.approx(time.process_time(), abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0", "-1"], "--workers: allowed is 0 or more"),
        (["--records", "63"], "--records: allowed is 64 or more"),
        (["--rounds", "0"], "--rounds: allowed is 1 or more"),
    ],
)
def test_workers_that_are_not_allowed(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        input_workers.parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


# --- mixed_precision ---------------------------------------------------------------------------


def test_float_types_are_compared_seed_by_seed():
    # Student's t for 95 % and one degree of freedom is 12.706, and half the range 1 and 0.5 points.
    of_seeds = {"float32": {0: 0.9, 1: 0.92}, "bfloat16": {0: 0.9, 1: 0.91}}
    float32, bfloat16, difference = mixed_precision.report(of_seeds).splitlines()
    assert float32.endswith("91.00 ± 12.71 %")
    assert bfloat16.endswith("90.50 ± 6.35 %")
    assert difference.endswith("-0.50 ± 6.35 points, within the noise of a seed")


@pytest.mark.slow
def test_a_run_in_each_float_type_is_kept_and_exact(tmp_path, capsys):
    arguments = f"--preset digits-lats --seeds 1 --workdir {tmp_path}".split()
    assert mixed_precision.main(arguments) == 0
    first = capsys.readouterr().out.splitlines()
    assert mixed_precision.main(arguments) == 0
    again = capsys.readouterr().out.splitlines()
    figures = [line for line in again if "wanted" in line]
    assert len(figures) == 2
    assert set(figures) <= set(first)


# --- long_run -----------------------------------------------------------------------------------


def test_a_long_run_is_timed_without_its_pause():
    steps = range(100, 600, 100)
    records = [{"step": step, "images_per_second": 1e6 if step > 300 else 1.0} for step in steps]
    # The third record is the first after step 200, when the process was stopped; in the others the
    # process ran for half of the time.
    assert long_run.milliseconds(records, 200, batch_size=1000) == [0.5, 0.5]
    figures = {"seconds": 9, "memory": [1, 2**20, 2, 2**21], "zeros": 8, "size": 10, "wanted": 9}
    _, memory, step, zeros = long_run.report(figures, 500, [0.5, 0.5, 9], [0.6, 0.6]).splitlines()
    assert memory.endswith("+100.00% from the second to the last")
    assert "+20.0%" in step
    assert zeros == "zeros: 8 of 10, 9 wanted"


@pytest.mark.slow
def test_a_short_long_run(capfd):
    assert long_run.main(["--steps", "4000"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "zeros: 6,151 of 6,475, 6,151 wanted"
    assert "two processes in turn" in lines[-2]


def test_a_long_run_that_is_too_short(capsys):
    with pytest.raises(SystemExit) as stopped:
        long_run.main(["--steps", "3999"])
    assert stopped.value.code == 2
    assert "--steps is 3999; allowed: 4000 or more" in capsys.readouterr().err


# --- tpu_compile --------------------------------------------------------------------------------


def test_collectives_are_counted_with_what_they_return():
    text = """
  %sum = f32[2,64]{1,0:T(2,128)S(1)} all-reduce(%a), channel_id=1, to_apply=%add
  %both = (f32[8]{0}, bf16[3,5]{1,0}) all-reduce(%b, %c), channel_id=2, to_apply=%add
  %start = (f32[4]{0}, f32[32]{0}) all-gather-start(%d), channel_id=3, dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
  %scalar = f32[] all-reduce-scatter-like-fusion(%all-reduce.1), kind=kLoop
  ROOT %out = pred[] collective-permute(%e), channel_id=4
"""
    assert tpu_compile.collectives(text) == {
        "all-reduce": [2, 4 * 2 * 64 + 4 * 8 + 2 * 15],
        "all-gather": [1, 4 * 32],
        "collective-permute": [1, 1],
    }


def test_moved_bytes_are_those_of_the_chips_memory():
    text = """HloModule step

%branch (p: f32[64]) -> f32[64] {
  ROOT %inside = f32[64]{0} fusion(%p), kind=kLoop
}

ENTRY %main (w: f32[64], g: bf16[8,8]) -> f32[64] {
  %w = f32[64]{0} parameter(0)
  %g = bf16[8,8]{1,0} parameter(1)
  %copy = (f32[64]{0:T(8)S(1)}, f32[64]{0}, u32[]{:S(2)}) copy-start(%w)
  %near = f32[64]{0:T(8)S(1)} copy-done(%copy)
  %slice = ((bf16[8,8]{1,0}), bf16[2,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%g), slice={[0:2]}
  %part = bf16[2,8]{1,0:S(1)} slice-done(%slice)
  %made = (f32[64]{0}, f32[4]{0:S(1)}) fusion(%near, %part, %g), kind=kLoop, calls=%x
  %one = f32[64]{0} get-tuple-element(%made), index=0
  ROOT %out = f32[64]{0} conditional(%c, %one, %one), true_computation=%branch
}
"""
    # w is fetched, then two rows of g; the fusion reads g itself and writes its first result.
    assert tpu_compile.moved_bytes(text) == 4 * 64 + 2 * 16 + 2 * 64 + 4 * 64


@pytest.fixture
def small_preset(monkeypatch):
    """A config of a tiny model, which the benchmark takes for a preset of ImageNet."""
    tiny.add_to_zoo(monkeypatch)
    monkeypatch.setattr(tpu_compile, "IMAGE_SHAPE", tiny.SHAPE)
    monkeypatch.setattr(tpu_compile, "CLASSES", tiny.CLASSES)
    monkeypatch.setattr(tpu_compile, "TRAINING_IMAGES", 640)
    return TrainConfig(
        data=DataConfig(batch_size=64),
        model=ModelConfig(name="tiny"),
        optimizer=OptimizerConfig(warmup_epochs=1, lr_update="epoch"),
        epochs=10,
    )


def pruned(config, **prune):
    return dataclasses.replace(config, prune=PruneConfig(**prune))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prune", "same"),
    [
        ({"final_threshold": 0.3, "schedule": "epoch-lats"}, True),
        ({"final_threshold": 0.1, "schedule": "pgh", "beta": 0.1}, True),
        ({"final_threshold": 0.1, "exclude": ("Dense",)}, False),
        ({"target_sparsity": 0.9}, False),
        ({}, False),
    ],
)
def test_steps_that_differ_in_their_table_alone_are_one_program(small_preset, prune, same):
    def program(config):
        lowered = tpu_compile.lower_step(config, PmapEngine(jax.devices()[:2]), 1)
        return tpu_compile.same_program(lowered.as_text())

    lats = program(pruned(small_preset, final_threshold=0.1))
    assert (program(pruned(small_preset, **prune)) == lats) == same


@pytest.mark.slow
def test_row_of_a_step_that_is_told_its_sparsity(small_preset, tmp_path):
    def compiler():
        return tpu_compile.Compiler(
            PmapEngine(jax.devices()[:2]), batch_per_chip=1, store=tmp_path / "programs"
        )

    first = compiler()
    dense = first.row(small_preset, "dense")
    named = first.row(pruned(small_preset, target_sparsity=0.9, update_every=5), "named")
    assert (dense.ratio, dense.same_as, named.same_as) == (1, "dense", "named")
    assert not named.more_collectives
    # The convolution is 3·3·1·8, the classifier 4·4·8·3. In each fifth step nine reads of them.
    weights = 4 * (3 * 3 * 1 * 8 + 4 * 4 * 8 * 3)
    assert named.bytes - named.facts.bytes == pytest.approx(weights * 9 / 5)
    assert named.ratio == pytest.approx(named.bytes / dense.bytes)
    # Beside theta the state has a count, a threshold and what the loop knows, five numbers.
    assert named.facts.arguments - dense.facts.arguments == weights + 7 * 4
    assert named.facts.memory >= named.facts.arguments

    again = compiler().row(pruned(small_preset, target_sparsity=0.9, update_every=5), "again")
    assert again == named._replace(preset="again")


@pytest.mark.slow
def test_programs_of_the_jit_engine(small_preset, monkeypatch):
    monkeypatch.setattr("lats_optax.training.parallel._DIVIDED_FROM", 16)
    config, devices = pruned(small_preset, target_sparsity=0.9), jax.devices()[:4]
    parted, whole = (
        tpu_compile.Compiler(tpu_compile.engine_of(name, devices), 1) for name in ("jit:4", "jit")
    )
    divided, kept = (each.update(config, "named") for each in (parted, whole))
    # Gradients, weights, momentum and latent weights: of each kernel a fourth.
    kernels = 3 * 3 * 1 * 8 + 4 * 4 * 8 * 3
    assert kept.arguments - divided.arguments >= 4 * 4 * kernels * 3 / 4
    assert kept.collectives == {}
    # What is gathered is of channels: here, less than half of the larger kernel.
    assert divided.collectives.get("all-gather", [0, 0])[1] < 4 * (4 * 4 * 8 * 3) / 2
    assert divided.collectives["all-reduce"][0] > 0
    # The forward pass gathers the kernels.
    step = parted.step(config, "named")[1]
    assert step.collectives["all-gather"][1] >= 4 * kernels


@pytest.mark.parametrize("name", ["gspmd", "jit:0", "jit:x", "pmap:2", "jit:3"])
def test_engines_that_there_are_not(name):
    tiny.assert_refused(lambda: tpu_compile.engine_of(name, jax.devices()[:4]), [])


# --- train_throughput ---------------------------------------------------------------------------


@pytest.mark.slow
def test_throughput_of_dense_and_sparse_steps(monkeypatch, capsys):
    tiny.add_to_zoo(monkeypatch)
    arguments = "--model tiny --image-size 4 --batch-size 4 --steps 1 --rounds 2"
    results = train_throughput.main(arguments.split())
    assert list(results) == list(train_throughput.STEPS)
    for row in results.values():
        assert row.images_per_second * row.milliseconds == pytest.approx(4 * 1e3)
        assert row.low <= row.ratio <= row.high
    assert results["dense"].ratio == 1
    printed = capsys.readouterr().out
    assert "PyTorch: left out, there is no tiny" in printed
    assert printed.splitlines()[-2].startswith("sparse / thresholded in the layers: ")


@pytest.mark.slow
def test_layers_that_threshold_their_weights(monkeypatch):
    tiny.add_to_zoo(monkeypatch)
    config = tiny.config(Path("unused"))
    model, optimizer = tiny.Model(), make_optimizer(config, 10)
    step = assembly.bind_step(config, model, optimizer.phases[0])
    total = train_throughput.EPOCHS * train_throughput.STEPS_PER_EPOCH
    state = assembly.bind_state(config, model, optimizer.phases[0], tiny.SHAPE)()
    state = state._replace(step=jnp.asarray(total))  # where the threshold is its final one
    batch = next(tiny.make_dataset().train_batches(8))

    def thresholded(w):
        return np.sign(w) * np.maximum(np.abs(w) - 0.02, 0) if w.ndim > 1 else w

    sparse = state._replace(params=jax.tree.map(thresholded, jax.device_get(state.params)))

    def take(step, state):
        return jax.device_get(jax.jit(lambda *of: step(*of, lambda tree: tree))(state, batch))

    expected = take(step, sparse)
    found = take(train_throughput.thresholded_in_layers(step, optimizer.mask), state)
    np.testing.assert_allclose(found[1]["loss"], expected[1]["loss"], rtol=1e-5)
    # The gradient is that at the sparse weights, and zero where they are.
    w, updated = (np.asarray(s.params["Dense_0"]["kernel"]) for s in (state, found[0]))
    dead = np.abs(w) < 0.02
    assert 0 < dead.sum() < dead.size
    rate, decay = config.optimizer.learning_rate, config.optimizer.weight_decay
    np.testing.assert_allclose(updated[dead], w[dead] * (1 - rate * decay), rtol=1e-5)
    assert not np.allclose(updated[~dead], w[~dead] * (1 - rate * decay), rtol=1e-5)


def test_rounds_take_turns_and_the_first_does_not_count():
    calls, durations = [], {"dense": iter([9, 2, 2, 4]), "other": iter([9, 1, 2, 1])}

    def runner(name):
        def seconds(steps):
            calls.append(name)
            return next(durations[name]) * steps

        return train_throughput.Runner(seconds, lambda: None, "")

    runners = {name: runner(name) for name in durations}
    speeds = train_throughput.measure(runners, batch_size=10, steps=5, rounds=3)
    results = train_throughput.summarize(speeds, 10)
    assert calls == ["dense", "other", "other", "dense", "dense", "other", "other", "dense"]
    # Images per second 5, 5, 2.5 and 10, 5, 10; their ratios 2, 1, 4.
    assert results["other"] == train_throughput.Result(10, 1000, 2, 1.5, 3)
    assert results["dense"] == train_throughput.Result(5, 2000, 1, 1, 1)
    assert train_throughput.summarize(speeds, 10, "other")["dense"].ratio == 0.5


def test_rounds_end_with_the_time():
    runners = {"dense": train_throughput.Runner(lambda steps: 1.0, lambda: None, "")}
    assert train_throughput.measure(runners, 1, 1, rounds=9, until=0.0) == {"dense": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet5"], "model 'resnet5' is not known"),
        (["--steps", "0"], "--steps: allowed is 1 or more"),
        (["--rounds", "1"], "--rounds: allowed is 2 or more"),
        (["--minutes", "nan"], "--minutes: allowed is more than 0"),
        (["--rounds", "9", "--steps", "101"], "--steps: allowed with 9 rounds is 99 or less"),
        (["--model", "digits-cnn", "--torch"], "--torch: allowed with --model resnet18"),
        (["--model", "resnet18", "--image-size", "8"], "at least 32"),
    ],
)
def test_throughput_of_what_is_not_allowed(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        train_throughput.parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_peer_in_pytorch_is_the_same_network():
    pytest.importorskip("torch")
    from benchmarks import torch_resnet

    model = torch_resnet.resnet("resnet50")
    assert sum(p.numel() for p in model.parameters()) == 25_556_032


def test_layers_in_pytorch_threshold_their_weights():
    torch = pytest.importorskip("torch")
    from benchmarks import torch_resnet

    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1, bias=False))
    weight = model[0].weight
    torch_resnet.threshold_in_layers(model, 0.1)
    images = torch.randn(1, 2, 4, 4)
    soft = torch.sign(weight) * torch.clamp(weight.abs() - 0.1, min=0)
    expected = torch.nn.functional.conv2d(images, soft)
    torch.testing.assert_close(model(images), expected)
    assert [p is weight for p in model.parameters()] == [True]


# --- compaction ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_compaction_at_a_small_size(capsys):
    arguments = "--models digits-cnn --width 0.3 --fractions 0.5 --batch-size 1 --rounds 2"
    dense, inner, streams = compaction.main(arguments.split())
    assert [row.zeros for row in (dense, inner, streams)] == [
        "none",
        "inner, 50%",
        "streams too, 50%",
    ]
    assert dense.parameters > inner.parameters > streams.parameters
    assert dense.macs > inner.macs > streams.macs
    assert dense.speed_up == 1
    assert all(row.difference < 1e-5 and row.milliseconds > 0 for row in (dense, inner, streams))
    assert capsys.readouterr().out.count("digits-cnn") == 3


def test_channels_that_go_together():
    def groups(name, streams):
        return compaction.groups(models.create(name, num_classes=3), streams)

    inner = groups("resnet18", streams=False)
    assert len(inner) == 8
    assert all(layer.endswith("conv1") for (layer,) in inner)
    stem, second, *_ = groups("resnet18", streams=True)[8:]
    assert stem == ["stem", "stage1_block1/conv2", "stage1_block2/conv2"]
    assert second == ["stage2_block1/conv2", "stage2_block1/shortcut", "stage2_block2/conv2"]
    # Where a projection comes first, the stem is a stream of its own.
    assert ["stem"] in groups("resnet50", streams=False)
    separable = groups("mobilenet-v1", streams=True)
    assert separable[0] == ["stem", "block1/depthwise"]
    assert separable[-1] == ["block13/pointwise"]
    assert len(groups("vgg16-bn", streams=False)) == 13


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "vgg"], "model 'vgg' is not known"),
        (["--models", "sew-resnet18"], "sew-resnet18 is not allowed; models without spikes are"),
        (["--fractions", "1"], "--fractions: 1.0 is not allowed; numbers between 0 and 1 are"),
        (["--rounds", "1"], "--rounds is 1; allowed: 2 or more"),
        (["--models", "resnet18", "--image-size", "8"], "at least 32"),
        (["--width", "0"], "width is 0.0; allowed: "),
    ],
)
def test_compaction_of_what_is_not_allowed(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        compaction.parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
