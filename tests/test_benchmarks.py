"""What the benchmarks count and compare, at small sizes."""

import jax
import jax.numpy as jnp
import optax
import pytest

from benchmarks import input_pipeline, optimizer_step, shapes

SMALL = {f"layer{i}/kernel": (512, 512) for i in range(3)}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(shapes, "resnet50", lambda: SMALL)


def test_resnet50_has_the_published_number_of_parameters():
    assert sum(jnp.zeros(s).size for s in shapes.resnet50().values()) == 25_556_032


@pytest.mark.parametrize(
    ("name", "most"),
    [("proximal_step", 1.02), ("soft_threshold, schedule", 1.5)],
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
    """The multiply that is meant: the weights after sgd, times a bool for each."""
    sgd = optimizer_step.optimizers()["sgd"]

    def init(params):
        return sgd.init(params), jax.tree.map(lambda leaf: leaf != 0, params)

    def update(gradients, state, params):
        updates, inner = sgd.update(gradients, state[0], params)
        masked = jax.tree.map(lambda w, u, alive: (w + u) * alive - w, params, updates, state[1])
        return masked, (inner, state[1])

    programs = {
        "frozen": optimizer_step.optimizers()["frozen support"],
        "multiplied": optax.GradientTransformation(init, update),
        "sgd": sgd,
    }
    size = sum(jnp.zeros(s).size for s in SMALL.values())
    counts = {
        name: optimizer_step.bytes_accessed(optimizer_step.compile_step(tx)) / size
        for name, tx in programs.items()
    }
    assert counts["frozen"] == pytest.approx(counts["multiplied"], abs=0.01)
    assert counts["frozen"] == pytest.approx(counts["sgd"] + 1, abs=0.01)


def test_closed_loop_keeps_no_copy_of_the_weights(small):
    tx = optimizer_step.optimizers()["soft_threshold, closed loop"]
    program = optimizer_step.compile_step(tx)
    assert program.memory_analysis().temp_size_in_bytes < 512 * 512 * 4 / 8


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
