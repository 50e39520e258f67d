"""The trainer: what it computes, on how many devices, and when it stops."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lats_optax
from lats_optax import masks
from lats_optax.training import assembly, loop
from lats_optax.training import experiment as experiments
from lats_optax.training.checkpoint import load_variables
from lats_optax.training.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PruneConfig,
    TrainConfig,
)
from lats_optax.training.config_json import check_resumable, to_json
from lats_optax.training.finite import NonFiniteError
from lats_optax.training.logging import MetricsLog, read_metrics
from lats_optax.training.optimizer import cosine, curve_law, make_optimizer, schedule_to
from lats_optax.training.parallel import PmapEngine
from lats_optax.training.step import cross_entropy
from tests import matrix, tiny

SPARSE = PruneConfig(target_sparsity=0.75)


def by_hand(config):
    """What a loop written out begins with."""
    model, tx = tiny.Model(), make_optimizer(config, steps_per_epoch=6).phases[0].transform
    variables = model.init(jax.random.key(0), jnp.zeros((1, *tiny.SHAPE)), train=False)
    params, stats = variables["params"], variables["batch_stats"]
    return tiny.make_dataset(), model, tx, params, stats, tx.init(params)


def params_of(result):
    return jax.device_get(result.state.params)


# What it computes


@pytest.mark.parametrize(
    ("devices", "prune"),
    matrix.fast([(1, SPARSE), (8, SPARSE), (8, PruneConfig())], [(8, SPARSE)]),
    ids=["1", "8", "8-dense"],
)
def test_a_run_is_the_plain_loop(tmp_path, devices, prune):
    config = tiny.config(tmp_path / "run", prune=prune, label_smoothing=0.1)
    result = tiny.train(config, jax.devices()[:devices])

    # The oracle: one device, no axis, optax's own loss.
    dataset, model, tx, params, stats, opt_state = by_hand(config)

    @jax.jit
    def step(params, stats, opt_state, batch):
        def loss_fn(params):
            logits, new = model.apply(
                {"params": params, "batch_stats": stats}, batch["image"], mutable=["batch_stats"]
            )
            labels = optax.smooth_labels(jax.nn.one_hot(batch["label"], tiny.CLASSES), 0.1)
            return optax.softmax_cross_entropy(logits, labels).mean(), new["batch_stats"]

        (loss, stats_), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state_ = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats_, opt_state_, loss

    losses = []
    for _, batch in zip(range(18), dataset.train_batches(8, seed=0)):
        params, stats, opt_state, loss = step(params, stats, opt_state, batch)
        losses.append(float(loss))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params_of(result), params
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
        jax.device_get(result.state.batch_stats),
        stats,
    )
    logged = [r["loss"] for r in result.metrics if r["split"] == "train"]
    windows = [losses[:4], losses[4:6], losses[6:8], losses[8:12], losses[12:16], losses[16:]]
    np.testing.assert_allclose(logged, [np.mean(w) for w in windows], rtol=1e-4)


def test_target_sparsity_is_met_and_logged_in_one_compilation(tmp_path, monkeypatch):
    traces = tiny.count_calls(monkeypatch, assembly, "train_step")
    result = tiny.train(tiny.config(tmp_path / "run", prune=SPARSE))
    kernels = [p for p in jax.tree.leaves(params_of(result)) if p.ndim >= 2]
    zeros, size = sum((k == 0).sum() for k in kernels), sum(k.size for k in kernels)
    assert zeros == round(0.75 * size)
    assert result.sparsity.sparsity == pytest.approx(zeros / size)
    last = [r for r in result.metrics if r["split"] == "train"][-1]
    assert last["sparsity"] == pytest.approx(zeros / size)
    assert last["threshold"] > 0
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("devices", "batch_size"),
    matrix.fast([(1, 2), (1, 23), (2, 12), (8, 8), (8, 24), (3, 48)], [(1, 23), (8, 24)]),
)
def test_evaluation_counts_every_image_once(tmp_path, devices, batch_size):
    config = tiny.config(tmp_path, data=DataConfig(name="tiny", batch_size=batch_size))
    experiment = tiny.build(config, jax.devices()[:devices])
    state = experiment.initial_state()
    result = loop.evaluate(experiment, experiment.parallel.place(state))

    variables = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
    examples = tiny.make_dataset().sources["test"]
    correct, loss = 0, 0.0
    for example in examples:
        logits = np.asarray(tiny.Model().apply(variables, example["image"][None], train=False))[0]
        correct += int(np.argmax(logits) == example["label"])
        loss -= float(logits[example["label"]] - np.log(np.exp(logits.astype(np.float64)).sum()))
    assert result["accuracy"] == correct / len(examples)
    assert result["loss"] == pytest.approx(loss / len(examples), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_formula(smoothing):
    logits = np.random.default_rng(1).normal(size=(5, 4))
    labels = np.array([0, 3, 1, 1, 2])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    q = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
    expected = -(q * np.log(p)).sum(1)
    actual = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), smoothing)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


# The optimizer


@pytest.mark.parametrize("lr_update", ["step", "epoch"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_learning_rate_is_the_formula(lr_update, warmup):
    config = TrainConfig(
        optimizer=OptimizerConfig(learning_rate=0.4, warmup_epochs=warmup, lr_update=lr_update),
        epochs=5,
    )
    schedule = cosine(config, steps_per_epoch=3)
    for step in range(15):
        u, w, n = (step, 3 * warmup, 15) if lr_update == "step" else (step // 3, warmup, 5)
        rate = (u + 1) / w if u < w else 0.5 * (1 + np.cos(np.pi * (u - w) / (n - w)))
        assert float(schedule(step)) == pytest.approx(0.4 * rate, rel=1e-5)


RISING = [("lats", None), ("s-lats", None), ("epoch-lats", None), ("pgh", 0.01)]


@pytest.mark.parametrize(("schedule", "beta"), matrix.fast(RISING, [("epoch-lats", None)]))
def test_a_named_sparsity_follows_the_curve_of_every_schedule(schedule, beta):
    """Weights that stand still: the curve itself. Weights that move: the target, exactly."""
    sgd = OptimizerConfig(learning_rate=0.1, momentum=0.0, warmup_epochs=1, lr_update="epoch")
    how = {"schedule": schedule, "beta": beta, "operator": "soft"}
    prune = PruneConfig(0.8, **how, reach=1.0, update_every=1)
    target = TrainConfig(optimizer=sgd, prune=prune, epochs=4)
    tx = make_optimizer(target, steps_per_epoch=5).phases[0].transform
    weights = jax.random.normal(jax.random.key(0), (20, 50))
    quantile = float(jnp.sort(jnp.abs(weights).ravel())[799])
    # Whose thresholds are the published ones: tests/test_thresholds.py.
    open_loop = TrainConfig(
        optimizer=sgd, prune=PruneConfig(final_threshold=quantile, **how), epochs=4
    )
    reference = make_optimizer(open_loop, steps_per_epoch=5).phases[0].transform
    update, update_reference = jax.jit(tx.update), jax.jit(reference.update)

    def threshold(state):
        return float(optax.tree.get(state, "threshold"))

    state, expected, params = tx.init(weights), reference.init(weights), weights
    for _ in range(20):
        _, state = update(jnp.zeros_like(weights), state, weights)
        _, expected = update_reference(jnp.zeros_like(weights), expected, weights)
        assert threshold(state) == pytest.approx(threshold(expected), abs=1e-6)
    assert threshold(state) == quantile

    state = tx.init(weights)
    for step in range(20):
        gradient = params - jax.random.normal(jax.random.key(step), weights.shape)
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    assert int((params == 0).sum()) == 800


@pytest.mark.parametrize(("schedule", "beta"), [*RISING[1:], ("pgh", 1e-4)])
def test_long_curves_are_followed_to_their_end(schedule, beta):
    """As many steps as on ImageNet: the last increments are lost in rounding, the end is not."""
    prune = PruneConfig(0.9, schedule=schedule, beta=beta)
    rises = schedule_to(TrainConfig(prune=prune, epochs=100), None, 5004, 1.0)
    weights = curve_law(rises).increments(np.ones(500_400))
    left = np.cumsum(weights[::-1])[::-1]
    gains = np.divide(weights, left, out=np.zeros_like(weights), where=left > 0)
    assert (weights >= 0).all()
    distance = np.cumprod(1 - gains[:-1])
    np.testing.assert_allclose(1 - distance, rises.table[1:-1], atol=1e-9)


@pytest.mark.parametrize(("schedule", "beta"), [*RISING[:3], ("pgh", 0.5), ("constant", None)])
def test_every_schedule_ends_at_the_final_threshold(schedule, beta):
    prune = PruneConfig(final_threshold=0.02, schedule=schedule, beta=beta)
    tx = make_optimizer(TrainConfig(prune=prune, epochs=2), steps_per_epoch=3).phases[0].transform
    params = {"kernel": jnp.ones((2, 2))}
    state = tx.init(params)
    for _ in range(6):
        _, state = tx.update(params, state, params)
    assert float(optax.tree.get(state, "threshold")) == pytest.approx(0.02, rel=1e-5)


@pytest.mark.slow
def test_excluded_layers_stay_dense():
    prune = PruneConfig(final_threshold=10.0, exclude=("head",))
    tx = make_optimizer(TrainConfig(prune=prune, epochs=1), steps_per_epoch=1).phases[0].transform
    params = {"stem": jnp.ones((2, 2)), "head": jnp.ones((2, 2))}
    updates, _ = tx.update(params, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    assert not params["stem"].any()
    assert params["head"].all()


@pytest.mark.slow
def test_weight_decay_on_latent_and_on_weights_differ_as_told():
    params = {"kernel": jnp.full((2, 2), 0.5)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updated = {}
    for where in ("latent", "weights"):
        config = TrainConfig(
            optimizer=OptimizerConfig(learning_rate=1.0, momentum=0.0, weight_decay=0.1),
            prune=PruneConfig(final_threshold=0.2, schedule="constant", weight_decay_on=where),
            epochs=1,
        )
        tx = make_optimizer(config, steps_per_epoch=1).phases[0].transform
        updates, _ = tx.update(zeros, tx.init(params), params)
        updated[where] = float(optax.apply_updates(params, updates)["kernel"][0, 0])
    # The latent weight is 0.7, the weight 0.5.
    assert updated == pytest.approx({"latent": 0.7 - 0.07 - 0.2, "weights": 0.7 - 0.05 - 0.2})


# When it stops


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    # All names: which are among the first four depends on how far LLVM optimizes.
    monkeypatch.setattr(masks, "some", ", ".join)
    messages = []
    for log_every in (1, 50):
        rate = OptimizerConfig(learning_rate=1e30)
        config = tiny.config(
            tmp_path / str(log_every), optimizer=rate, log_every=log_every, epochs=9
        )
        with pytest.raises(NonFiniteError, match=r"at step \d+ \(.*params/Conv_0") as error:
            tiny.train(config)
        messages.append(str(error.value).split(" (")[0])
        assert not any((config.workdir / "checkpoints").glob("*"))
        for record in read_metrics(config.workdir / "metrics.jsonl"):
            assert np.isfinite(record["loss"])
    assert messages[0] == messages[1]


@pytest.mark.slow
def test_the_last_good_checkpoint_is_named(tmp_path, monkeypatch):
    taken = []

    def spoilt(self, batch, original=PmapEngine.shard):
        if "weight" not in batch:
            taken.append(1)
        bad = np.nan if len(taken) == 9 else 0.0
        return original(self, {**batch, "image": batch["image"] + np.float32(bad)})

    monkeypatch.setattr(PmapEngine, "shard", spoilt)
    config = tiny.config(tmp_path / "run", log_every=50)
    with pytest.raises(
        NonFiniteError, match=r"nan at step 9 \(.*\); the last good .*checkpoints/6\."
    ):
        tiny.train(config)
    assert (config.workdir / "checkpoints" / "6").is_dir()


@pytest.mark.slow
def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    # One step: its loss is that of the initial weights, finite; what it leads to is not.
    rate = OptimizerConfig(learning_rate=1e38, weight_decay=1e3)
    config = tiny.config(
        tmp_path / "run", optimizer=rate, data=DataConfig(name="tiny", batch_size=48), epochs=1
    )
    with pytest.raises(NonFiniteError, match=r"after step 1 \(.*\); no checkpoint"):
        tiny.train(config)
    assert not any((config.workdir / "checkpoints").glob("*"))


# What it refuses


@pytest.mark.parametrize(
    ("devices", "batch", "parts", "words"),
    [
        (8, 12, 1, ["batch_size", "12", "8"]),
        (2, 8, 3, ["batch_size", "8", "2 devices", "grad_accum_steps 3", "multiple of 6"]),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(devices, batch, parts, words):
    engine = PmapEngine(jax.devices()[:devices])
    tiny.assert_refused(lambda: engine.host_batch_size(batch, parts), words)


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    config = tiny.config(tmp_path / "run", data=DataConfig(name="tiny", batch_size=64))
    with pytest.raises(ValueError, match="at most 53"):
        tiny.build(config)
    assert not (tmp_path / "run").exists()


def test_an_expression_that_matches_nothing_is_refused(tmp_path):
    config = tiny.config(tmp_path / "run", prune=PruneConfig(0.9, exclude=("Dens_0",)))
    with pytest.raises(ValueError, match="Dens_0"):
        tiny.build(config)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"epochs": 4}, "epochs is 4 and was 3"),
        ({"prune": SPARSE}, "prune.target_sparsity is 0.75 and was None"),
        ({"model": ModelConfig(dtype="bfloat16")}, "model.dtype is 'bfloat16'"),
        ({"model": ModelConfig(width=0.5)}, "model.width is 0.5 and was None"),
        ({"ema_decay": 0.9}, "ema_decay is 0.9 and was None"),
        ({"grad_accum_steps": 2}, "grad_accum_steps is 2 and was 1"),
    ],
)
def test_resuming_something_else_is_refused(tmp_path, change, word):
    with pytest.raises(ValueError, match=word):
        check_resumable(to_json(tiny.config(tmp_path)), tiny.config(tmp_path, **change))


def test_resuming_elsewhere_or_watched_differently_is_allowed(tmp_path):
    before = json.loads(json.dumps(to_json(tiny.config(tmp_path / "a", log_every=1))))
    check_resumable(before, tiny.config(tmp_path / "b", log_every=2, resume=True))


# The rest


@pytest.mark.slow
def test_bfloat16_trains_with_float32_parameters(tmp_path):
    config = tiny.config(
        tmp_path / "run",
        model=ModelConfig(dtype="bfloat16"),
        optimizer=OptimizerConfig(learning_rate=0.05),
        grad_accum_steps=2,
        prune=SPARSE,
        ema_decay=0.9,
    )
    result = tiny.train(config, jax.devices()[:2])
    state = jax.device_get(result.state)
    for leaf in jax.tree.leaves((state.params, state.average)):
        assert leaf.dtype == np.float32
    assert result.sparsity.zeros == round(0.75 * result.sparsity.size)
    losses = [record["loss"] for record in result.metrics if record["split"] == "train"]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


# Averaged weights


@pytest.mark.slow
@pytest.mark.parametrize("prune", [SPARSE, PruneConfig()], ids=["sparse", "dense"])
def test_averaged_weights_are_evaluated_and_kept_sparse(tmp_path, monkeypatch, prune):
    traces = tiny.count_calls(monkeypatch, experiments, "eval_step")
    config = tiny.config(tmp_path / "run", prune=prune, ema_decay=0.8)
    result = tiny.train(config)
    assert len(traces) == 1

    plain, kept = load_variables(config.workdir), load_variables(config.workdir, averaged=True)
    average = jax.device_get(result.state.average)
    jax.tree.map(np.testing.assert_array_equal, kept["batch_stats"], average.batch_stats)
    for layer in ("Conv_0", "Dense_0"):
        weights, averages = plain["params"][layer]["kernel"], kept["params"][layer]["kernel"]
        np.testing.assert_array_equal(weights == 0, averages == 0)
        assert not np.signbit(averages[averages == 0]).any()
        alive = weights != 0
        np.testing.assert_array_equal(averages[alive], average.params[layer]["kernel"][alive])
    np.testing.assert_array_equal(
        kept["params"]["Dense_0"]["bias"], average.params["Dense_0"]["bias"]
    )
    assert lats_optax.sparsity(kept["params"]).zeros == lats_optax.sparsity(plain["params"]).zeros
    # The average itself is dense: without `apply_support` its zeros would be lost.
    assert not lats_optax.sparsity(average.params).zeros

    examples = tiny.make_dataset().sources["test"]
    images, labels = (np.stack([e[key] for e in examples]) for key in ("image", "label"))
    found = np.argmax(tiny.Model().apply(kept, images, train=False), axis=1)
    assert result.test_accuracy_averaged == pytest.approx(np.mean(found == labels))
    records = [r for r in result.metrics if r["split"] == "test_average"]
    assert [r["epoch"] for r in records] == [1, 2, 3]
    assert records[-1]["accuracy"] == result.test_accuracy_averaged


@pytest.mark.slow
def test_a_run_without_an_average_has_none_to_load(tmp_path):
    result = tiny.train(tiny.config(tmp_path / "run", epochs=1))
    assert result.state.average == ()
    assert result.test_accuracy_averaged is None
    with pytest.raises(ValueError, match=r"averaged is True; allowed .* ema_decay"):
        load_variables(tmp_path / "run", averaged=True)


# Accumulated gradients


@pytest.mark.slow
def test_parts_of_a_batch_are_one_step(tmp_path):
    """Two devices and two parts each, against a loop by hand over the two global parts."""
    optimizer = OptimizerConfig(learning_rate=0.05, weight_decay=1e-3)
    config = tiny.config(tmp_path / "run", prune=SPARSE, optimizer=optimizer, grad_accum_steps=2)
    result = tiny.train(config, jax.devices()[:2])

    dataset, model, tx, params, stats, opt_state = by_hand(config)

    @jax.jit
    def gradient(params, stats, image, label):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": stats}
            logits, new = model.apply(variables, image, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            return losses.mean(), new["batch_stats"]

        return jax.grad(loss_fn, has_aux=True)(params)

    update = jax.jit(tx.update)
    for _, batch in zip(range(18), dataset.train_batches(8, seed=0)):
        # Device 0 has images 0 to 3 and device 1 the others; each takes its first two first.
        grads = []
        for rows in ([0, 1, 4, 5], [2, 3, 6, 7]):
            part = batch["image"][rows], batch["label"][rows]
            grad, stats = gradient(params, stats, *part)
            grads.append(grad)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
        updates, opt_state = update(mean, opt_state, params)
        params = optax.apply_updates(params, updates)

    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5)  # noqa: E731
    jax.tree.map(close, params_of(result), params)
    jax.tree.map(close, jax.device_get(result.state.batch_stats), stats)


def test_replicas_see_their_own_part_of_the_batch():
    parallel = PmapEngine()
    step = parallel.compile_sums(
        lambda state, batch, total: (
            total(batch["x"].sum()),
            total(jnp.float32(batch["x"].size)),
            jax.lax.psum(1, PmapEngine.axis_name),
        )
    )
    sums = step(
        parallel.place(jnp.zeros(())), parallel.shard({"x": np.arange(16.0, dtype=np.float32)})
    )
    assert [float(s) for s in sums] == [120.0, 16.0, 8.0]


def test_metrics_go_on_after_a_broken_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    records = [{"split": "test", "step": step, "epoch": step} for step in (1, 2)]
    file.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"split": "te')
    with MetricsLog(tmp_path, step=1, total_steps=3) as log:
        log.write({"split": "test", "step": 2, "epoch": 1.0, "loss": 0.5, "accuracy": 0.25})
    assert [r["step"] for r in read_metrics(file)] == [1, 2]
    assert read_metrics(file)[1]["accuracy"] == 0.25
    assert any(tmp_path.glob("events.out.tfevents.*"))


LINE = b'{"split": "test", "step": 2, "epoch": 1.0, "accuracy": 0.5}\n'
UNREADABLE = {
    "no JSON": b'{"split": "test", "step" 2, "epoch": 1.0}\n',
    "no object": b"[1, 2]\n",
    "no UTF-8": b'{"split": "te\xf3t", "step": 2, "epoch": 1.0}\n',
    "no step": b'{"split": "test", "stap": 2, "epoch": 1.0}\n',
    "a step that is none": b'{"split": "test", "step": "2", "epoch": 1.0}\n',
    "an epoch that is none": b'{"split": "test", "step": 2, "epoch": null}\n',
    "a split that is none": b'{"split": 1, "step": 2, "epoch": 1.0}\n',
    "no layers": b'{"split": "weights", "step": 2, "epoch": 1.0, "zeros": 1, "pruned": 1, '
    b'"revived": 1}\n',
    "no counts": b'{"split": "weights", "step": 2, "epoch": 1.0, "layers": {}}\n',
    "deep": b"[" * 100_000 + b"\n",
    "empty": b"\n",
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_an_unreadable_line_of_metrics_is_lost_alone(tmp_path, case):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(LINE + UNREADABLE[case] + LINE)
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: no record can be read in line 2,"):
        assert read_metrics(file) == [json.loads(LINE)] * 2
    with (
        pytest.warns(UserWarning, match="line 2"),
        MetricsLog(tmp_path, step=2, total_steps=3) as log,
    ):
        assert len(log.records) == 2
    assert file.read_bytes() == LINE * 2
