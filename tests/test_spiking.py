"""Spiking neurons against a recording and scalar arithmetic; surrogates against differences."""

import itertools
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lats_optax.models import Neuron, Surrogate, create
from lats_optax.models.layers import TORCH_DEFAULT, batch_norm, convolution
from lats_optax.models.resnet import basic, bottleneck
from lats_optax.models.sew_resnet import SEWBlock
from lats_optax.models.spiking import SpikingLayer, fire
from tests import matrix, torch_weights

REFERENCE = Path(__file__).parent / "reference"

# The smooth steps, of a = α x, whose derivatives the surrogates are.
STEPS = {
    "atan": lambda a: math.atan(math.pi / 2 * a) / math.pi + 0.5,
    "sigmoid": lambda a: 1 / (1 + math.exp(-a)),
    "softsign": lambda a: (a / (1 + abs(a)) + 1) / 2,
    "triangle": lambda a: float(a > 0) if abs(a) >= 1 else 0.5 + a - math.copysign(a * a / 2, a),
    "rectangle": lambda a: min(max(a + 0.5, 0.0), 1.0),
}


def recording(name):
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


# --- surrogates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.7, 2.0, 4.0])
@pytest.mark.parametrize("name", STEPS)
def test_surrogate_is_the_derivative_of_a_step(name, alpha):
    """Central differences of the smooth step, away from kinks; and the step goes from 0 to 1."""
    points, width = np.linspace(-1.97, 1.99, 37), 1e-5
    differences = [
        (STEPS[name](alpha * (x + width)) - STEPS[name](alpha * (x - width))) / (2 * width)
        for x in points
    ]
    with jax.enable_x64(True):
        derivative = jax.grad(lambda x: fire(x, Surrogate(name, alpha)).sum())(points)
    np.testing.assert_allclose(derivative, differences, rtol=0, atol=1e-8)
    assert STEPS[name](-1e9 if name != "sigmoid" else -700.0) == pytest.approx(0, abs=1e-8)
    assert STEPS[name](1e9) == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", matrix.fast([jnp.float32, jnp.bfloat16], [jnp.float32]))
def test_fire(name, dtype):
    x = jnp.array([-jnp.inf, -1, -1e-30, -0.0, 0.0, 1e-30, 3, jnp.inf], dtype)
    spikes, derivative = jax.jvp(
        partial(fire, surrogate=Surrogate(name)), (x,), (jnp.ones_like(x),)
    )
    np.testing.assert_array_equal(spikes.astype(float), [0, 0, 0, 1, 1, 1, 1, 1])
    assert spikes.dtype == derivative.dtype == dtype
    assert np.isfinite(derivative.astype(float)).all()


# --- neurons ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_recorded_neuron():
    run = recording("if_neuron")
    surrogate = Surrogate(str(run["surrogate"]), float(run["alpha"]))
    neuron = Neuron(
        threshold=float(run["v_threshold"]),
        rest=float(run["v_reset"]),
        detach_reset=bool(run["detach_reset"]),
        surrogate=surrogate,
    )
    with jax.enable_x64(True):
        (spikes, potential), pull = jax.vjp(neuron, run["x"])
        (gradient,) = pull((run["output_cotangent"], np.zeros_like(run["v_final"])))
    np.testing.assert_array_equal(spikes, run["spikes"])
    np.testing.assert_allclose(potential, run["v_final"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(gradient, run["input_gradient"], rtol=0, atol=1e-12)


def scalar_neuron(inputs, tangents, neuron):
    """One neuron in plain Python: its spikes and potential, and their directional derivatives.

    The derivatives are carried along by hand; a spike's is `derivative` times that of h.
    """

    def derivative(x):  # of ATan, in another form than the library's
        return neuron.surrogate.alpha / (2 + (math.pi * neuron.surrogate.alpha * x) ** 2 / 2)

    v, dv = neuron.rest, 0.0
    spikes, dspikes = [], []
    for x, dx in zip(inputs, tangents):
        if neuron.kind == "if":
            h, dh = v + x, dv + dx
        else:
            keep = 1 - 1 / neuron.tau
            h = neuron.rest + keep * (v - neuron.rest) + x / neuron.tau
            dh = keep * dv + dx / neuron.tau
        fires = h >= neuron.threshold
        ds = derivative(h - neuron.threshold) * dh
        spikes.append(float(fires))
        dspikes.append(ds)
        through_reset = 0.0 if neuron.detach_reset else ds
        if neuron.reset == "hard":
            v = neuron.rest if fires else h
            dv = (0.0 if fires else dh) - through_reset * (h - neuron.rest)
        else:
            v = h - neuron.threshold if fires else h
            dv = dh - through_reset * neuron.threshold
    return spikes, v, dspikes, dv


# The recorded neuron rests at 0.
NEURONS = [
    Neuron(kind, reset=reset, detach_reset=detach, rest=-0.3, threshold=0.6, tau=3.0)
    for kind, reset, detach in itertools.product(
        ("if", "lif", "plif"), ("hard", "soft"), (True, False)
    )
]


def label(neuron):
    return f"{neuron.kind}-{neuron.reset}-{'detached' if neuron.detach_reset else 'attached'}"


@pytest.mark.cover
@pytest.mark.parametrize("neuron", matrix.fast(NEURONS, 3), ids=label)
def test_neuron_is_the_scalar_one(neuron):
    rng = np.random.default_rng(3)
    inputs, tangents = 1.5 * rng.normal(size=(2, 9, 20)) + 0.5
    rate = 1 / 3 if neuron.kind == "plif" else None
    with jax.enable_x64(True):
        program = jax.jit(partial(jax.jvp, lambda x: neuron(x, rate)))
        # To NumPy here: outside, arithmetic on float64 arrays of JAX is rounded to float32.
        (spikes, v), (dspikes, dv) = jax.device_get(program((inputs,), (tangents,)))
    columns = [scalar_neuron(*pair, neuron) for pair in zip(inputs.T, tangents.T)]
    expected = [np.array(part) for part in zip(*columns)]
    assert 0.1 < np.mean(expected[0]) < 0.9
    np.testing.assert_array_equal(spikes.T, expected[0])
    for actual, scalar in ((v, expected[1]), (dspikes.T, expected[2]), (dv, expected[3])):
        assert actual.dtype == np.float64
        np.testing.assert_allclose(actual, scalar, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["if", "lif", "plif"])
def test_layer_is_the_neuron_and_reports_its_rate(kind):
    neuron = Neuron(kind, tau=3.0)
    inputs = jax.random.normal(jax.random.key(0), (6, 50)) + 0.7
    layer = SpikingLayer(neuron)
    variables = layer.init(jax.random.key(0), inputs)
    assert len(jax.tree.leaves(variables)) == (kind == "plif")
    spikes, state = layer.apply(variables, inputs, mutable=["intermediates"])
    np.testing.assert_array_equal(spikes, neuron(inputs)[0])
    (rate,) = state["intermediates"]["firing_rate"]
    assert (rate.shape, rate.dtype) == ((), np.float32)
    assert float(rate) == pytest.approx(np.count_nonzero(spikes) / 300)


@pytest.mark.slow
def test_tau_of_plif_is_trained():
    """Its gradient, by a finite difference of the potential where nothing fires."""
    neuron = Neuron("plif", threshold=100.0, tau=1.5)
    inputs = np.random.default_rng(0).normal(size=(5, 7))

    @jax.jit
    def potential(u):
        return neuron(inputs, jax.nn.sigmoid(u))[1].sum()

    with jax.enable_x64(True):
        variables = SpikingLayer(neuron).init(jax.random.key(0), inputs)
        u = variables["params"]["tau_logit"]
        assert u.dtype == np.float32
        np.testing.assert_allclose(1 / jax.nn.sigmoid(u), 1.5, rtol=1e-6)
        u = jnp.float64(u)
        difference = (potential(u + 1e-6) - potential(u - 1e-6)) / 2e-6
        np.testing.assert_allclose(jax.grad(potential)(u), difference, rtol=1e-6)


@pytest.mark.parametrize(
    "dtype", matrix.fast([jnp.bfloat16, jnp.float16, jnp.float32], [jnp.float16])
)
def test_potentials_are_float32(dtype):
    """300 inputs of 2⁻⁹ reach 0.58; in bfloat16 their sum would stand still at 0.5."""
    inputs = jnp.full((300, 3), 2**-9, dtype)
    spikes, potential = jax.jit(Neuron(threshold=0.55))(inputs)
    assert (spikes.dtype, potential.dtype) == (dtype, jnp.float32)
    np.testing.assert_array_equal(spikes.sum(axis=0).astype(float), 1)
    assert int(np.argmax(spikes[:, 0])) == math.ceil(0.55 * 2**9) - 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            partial(Neuron, "izhikevich"),
            "neuron kind is 'izhikevich'; allowed: 'if', 'lif', 'plif'",
        ),
        (partial(Neuron, reset="warm"), "neuron reset is 'warm'; allowed: 'hard', 'soft'"),
        (partial(Neuron, threshold=0.0), r"threshold is 0\.0; allowed: a number above rest, 0\.0"),
        (partial(Neuron, threshold=math.nan), "neuron threshold is nan"),
        (partial(Neuron, rest=math.inf), "neuron rest is inf; allowed: a finite number"),
        (partial(Neuron, "lif", tau=1.0), r"tau is 1\.0; allowed: a number of steps above 1"),
        (partial(Neuron, surrogate="atan"), r"neuron surrogate is 'atan'; allowed: a Surrogate"),
        (partial(Surrogate, "tanh"), "surrogate is 'tanh'; allowed: 'atan', 'sigmoid', 'softsign'"),
        (partial(Surrogate, alpha=0.0), r"surrogate alpha is 0\.0; allowed: a number above 0"),
        (
            partial(create, "sew-resnet18", num_classes=9, neuron="if"),
            "neuron is 'if'; allowed: a N",
        ),
        (
            partial(create, "sew-resnet18", num_classes=9, connection="OR"),
            "connection is 'OR'; allowed: 'ADD', 'AND', 'IAND'",
        ),
        (partial(SEWBlock, (), None, None, None, "add"), "connection is 'add'; allowed: 'ADD'"),
        (
            partial(create, "sew-resnet18", num_classes=9, time_steps=0),
            "time_steps is 0; allowed: 1 or more",
        ),
    ],
)
def test_wrong_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- SEW ResNet ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_every_step_of_the_recorded_network(mode):
    """A spike that differed anywhere would move an output by far more than this."""
    run = recording("logits_sew_resnet18")
    steps, classes = int(run["T"]), run["logits_eval"].shape[-1]
    with jax.enable_x64(True):
        model = create(
            "sew-resnet18",
            num_classes=classes,
            time_steps=steps,
            connection=str(run["connect"]),
            dtype=jnp.float64,
        )
        mutable = ["batch_stats", "intermediates"]
        apply = jax.jit(partial(model.apply, train=mode == "train", mutable=mutable))
        variables = torch_weights.variables_of(run, model)
        images = torch_weights.images_of(run)
        logits, state = jax.device_get(apply(variables, images))
    (per_step,) = state["intermediates"]["logits_per_step"]
    for actual, key in ((logits, "logits"), (per_step, "output_per_step")):
        recorded = run[f"{key}_{mode}"]
        assert actual.dtype == np.float64
        np.testing.assert_allclose(actual, recorded, rtol=0, atol=1e-9 * np.abs(recorded).max())
    rates = {
        path: float(leaf)
        for path, (leaf,) in traverse_util.flatten_dict(state["intermediates"], sep="/").items()
        if path.endswith("firing_rate")
    }
    # The stem's, two in each of eight blocks, and those of three shortcuts.
    assert len(rates) == 1 + 2 * 8 + 3
    assert all(0 < rate < 1 for rate in rates.values())


def block(spec, connection, neuron):
    """A block and spikes to run it on: 3 steps, 2 images, 6 channels."""
    # Uniform kernels: XLA takes a second to compile each normal draw.
    conv = partial(convolution, dtype=jnp.float32, kernel_init=TORCH_DEFAULT)
    norm = batch_norm(True, jnp.float32, None)
    model = SEWBlock(spec, conv, norm, partial(SpikingLayer, neuron), connection)
    x = jax.random.bernoulli(jax.random.key(0), 0.5, (3, 2, 6, 6, 6)).astype(jnp.float32)
    return model, x


CONNECTIONS = {
    "ADD": lambda x, y: x.astype(int) + y,
    "AND": lambda x, y: x & y,
    "IAND": lambda x, y: x & ~y,
}


@pytest.mark.parametrize("connection", matrix.fast(CONNECTIONS, ["AND", "IAND"]))
def test_connections_are_the_logical_ones(connection):
    model, x = block(basic(6), connection, Neuron())

    @jax.jit
    def run(key):
        y, state = model.init_with_output(key, x, capture_intermediates=True)
        return y, state["intermediates"]["neuron2"]["__call__"][0]

    y, ending = run(jax.random.key(1, impl="rbg"))
    assert 0.05 < np.mean(ending) < 0.95
    np.testing.assert_array_equal(y, CONNECTIONS[connection](x == 1, np.asarray(ending) == 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("connection", "spec"),
    [("ADD", bottleneck(6, 2)), ("AND", basic(8, 2)), ("IAND", basic(8, 2))],
    ids=CONNECTIONS,
)
def test_gradients_reach_every_parameter_of_a_block(connection, spec):
    """Through surrogates, the connection and the projected shortcut, down to every τ."""
    model, x = block(spec, connection, Neuron("plif", threshold=0.3))

    @jax.jit
    def gradients(key):
        def loss(variables):
            y, _ = model.apply(variables, x, mutable=["batch_stats"])
            return (y * jax.random.normal(key, y.shape)).sum()

        return jax.grad(loss)({"params": model.init(key, x)["params"]})

    flat = traverse_util.flatten_dict(gradients(jax.random.key(1, impl="rbg")), sep="/")
    assert sum(path.endswith("tau_logit") for path in flat) == len(spec) + 1
    for path, leaf in flat.items():
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path
