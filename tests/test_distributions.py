"""Sparsities of layers: against RigL's algorithm in plain Python, and in the closed loop."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import lats_optax
from benchmarks import shapes
from lats_optax import erdos_renyi, per_layer, soft_threshold, target_sparsity, uniform
from lats_optax.quantile import kth_smallest_of_each
from tests import matrix, versions
from tests.properties import STEPS, cosine, dense_start, gradients

NETWORKS = {
    "resnet50": {k: s for k, s in shapes.resnet50().items() if len(s) > 1},
    "depthwise": {"stem": (3, 3, 3, 32), "depth": (3, 3, 1, 32), "point": (1, 1, 32, 64)},
    "mlp": {"one": (64, 128), "two": (128, 128), "three": (128, 10)},
    "odd": {"vector": (7,), "tall": (1000, 1), "cube": (5, 6, 7)},
}
KINDS = {
    "uniform": (uniform, lambda shape: 1.0),
    "er": (
        lambda sparsity: erdos_renyi(sparsity, kernel=False),
        lambda shape: sum(shape[-2:]) / math.prod(shape[-2:]),
    ),
    "erk": (erdos_renyi, lambda shape: sum(shape) / math.prod(shape)),
}


def densities(layers, sparsity, raw):
    """RigL: the layer whose probability is the highest above one becomes dense, one at a time."""
    dense, total = set(), sum(map(math.prod, layers.values()))
    while True:
        left = (1 - sparsity) * total - sum(math.prod(layers[name]) for name in dense)
        scale = left / sum(raw(s) * math.prod(s) for n, s in layers.items() if n not in dense)
        found = {n: 1.0 if n in dense else scale * raw(s) for n, s in layers.items()}
        highest = max(found, key=found.get)
        if found[highest] <= 1:
            return found
        dense.add(highest)


def shaped(layers):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in layers.items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.98])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", NETWORKS)
def test_distributions_are_rigl_and_exact_in_total(network, kind, sparsity):
    layers, (make, raw) = NETWORKS[network], KINDS[kind]
    got = make(sparsity)(shaped(layers))
    sizes = {name: math.prod(shape) for name, shape in layers.items()}
    zeros = {name: round(got[name] * sizes[name]) for name in layers}
    assert sum(zeros.values()) == round(sparsity * sum(sizes.values()))
    expected = densities(layers, sparsity, raw)
    # A layer that would be left without a weight takes one from the others.
    taken = sum(density * sizes[name] < 1 for name, density in expected.items())
    for name, density in expected.items():
        assert 0 <= got[name] < 1
        assert got[name] * sizes[name] == pytest.approx(zeros[name])
        kept = sizes[name] - zeros[name]
        assert abs(kept - max(density * sizes[name], 1)) <= 1 + taken + 1e-6, name


@pytest.mark.slow
@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
    layers=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=6),
    sparsity=st.floats(0, 0.99),
)
def test_any_shapes_meet_the_total_or_are_refused(layers, sparsity):
    sizes = [math.prod(shape) for shape in layers]
    kept = sum(sizes) - round(sparsity * sum(sizes))
    for make, _ in KINDS.values():
        arrays = [np.zeros(shape) for shape in layers]
        if kept < len(sizes):
            with pytest.raises(ValueError, match=f"leaves {kept} of {sum(sizes)} weights"):
                make(sparsity)(arrays)
            continue
        got = make(sparsity)(arrays)
        zeros = [round(value * size) for value, size in zip(got, sizes)]
        assert sum(sizes) - sum(zeros) == kept
        assert all(0 <= count < size for count, size in zip(zeros, sizes))


def test_layers_left_out_by_expression_take_no_part():
    layers = shaped(NETWORKS["mlp"])
    got = erdos_renyi(0.9, mask=lats_optax.select(exclude="three"))(layers)
    assert isinstance(got.pop("three"), optax.MaskedNode)
    rest = {name: layers[name] for name in got}
    assert got == erdos_renyi(0.9)(rest)


def test_the_first_expression_decides():
    layers = shaped(NETWORKS["mlp"])
    expected = {"one": 0.5, "two": 0.25, "three": 0.75}
    assert per_layer({"^one$": 0.5, "w": 0.25, "": 0.75})(layers) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: uniform(1.0), "^sparsity: 1.0 is not allowed"),
        (lambda: erdos_renyi(float("nan")), "^sparsity: nan"),
        (lambda: erdos_renyi("0.9"), "^sparsity: '0.9'"),
        (lambda: per_layer({"a": 90}), "^sparsities: 90 is not allowed"),
        (lambda: per_layer({"(": 0.9}), r"^sparsities: '\(' is not a regular expression"),
        (lambda: per_layer({"a": 0.9})({"b": jnp.ones(3)}), "^sparsities: .* 'a' matches no"),
        (
            lambda: per_layer({"a": 0.9})({"a": jnp.ones(3), "b": jnp.ones(3)}),
            "^sparsities: none of 'a' matches b; a last expression '' stands for the rest",
        ),
        (lambda: uniform(0.9)([jnp.ones(3)] * 3), "^sparsity: 0.9 leaves 1 of 9 weights"),
        (lambda: target_sparsity({"a": 0.5, "b": 1.0}, 0.1, 9), "^target: 1.0"),
        (lambda: target_sparsity({}, 0.1, 9), r"^target: \{\}"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"conv": 0.5}, "^target: its structure"),
        (lambda params: 0.5 if params is None else {"conv": 0.5}, "^target: its structure"),
        (lambda params: jax.tree.map(lambda _: 2.0, params), "^target of conv/kernel: 2.0"),
        (per_layer({"bias": 0.5, "": 0.9}), "'bias' matches no pruned weights"),
    ],
)
def test_targets_that_do_not_fit_the_parameters_are_refused(target, message):
    with pytest.raises(ValueError, match=message):
        soft_threshold(target_sparsity(target, 0.1, 9)).init(dense_start())


# --- the closed loop ------------------------------------------------------------------------------


def train(tx, params, steps=STEPS):
    @jax.jit
    def step(params, state, count):
        updates, state = tx.update(gradients(params, count), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for count in range(steps):
        params, state = step(params, state, count)
    assert step._cache_size() == 1
    return params, state


TARGETS = {
    "tree": ({"conv": {"kernel": 0.25}, "dense": 0.9}, [0.25, 0.9]),
    "per_layer": (per_layer({"conv": 0.0, "": 0.5}), [0.0, 0.5]),
    "uniform": (uniform(0.5), None),
    "erk": (erdos_renyi(0.5), None),
    "er": (erdos_renyi(0.5, kernel=False), None),
}


@pytest.mark.cover
@pytest.mark.parametrize("inner", matrix.fast([False, True], [False]), ids=["chained", "inner"])
@pytest.mark.parametrize("name", matrix.fast(TARGETS, ["per_layer", "er"]))
def test_each_layer_ends_on_its_target(name, inner):
    target, expected = TARGETS[name]
    threshold, sgd = target_sparsity(target, cosine, STEPS), optax.sgd(cosine, momentum=0.5)
    if inner:
        tx = soft_threshold(threshold, inner=sgd)
    else:
        tx = optax.chain(sgd, soft_threshold(threshold))
    params, state = train(tx, dense_start())
    kernels = [params["conv"]["kernel"], params["dense"]["kernel"]]
    if expected is None:
        expected = jax.tree.leaves(target({"a": kernels[0], "b": kernels[1]}))
    zeros = [int(jnp.sum(kernel == 0)) for kernel in kernels]
    assert zeros == [round(s * kernel.size) for s, kernel in zip(expected, kernels)]
    assert versions.tree.get(state, "threshold").shape == (2,)
    assert jnp.all(params["dense"]["bias"] != 0)


@pytest.mark.slow
def test_layers_are_pruned_as_if_they_were_alone():
    start = {"a": dense_start()["dense"]["kernel"], "b": dense_start()["conv"]["kernel"]}
    targets = {"a": 0.7, "b": 0.4}

    def make(target):
        loop = target_sparsity(target, cosine, STEPS, update_every=2)
        return optax.chain(optax.sgd(cosine, momentum=0.5), soft_threshold(loop))

    together, state = train(make(targets), start)
    for index, name in enumerate(targets):
        alone, own = train(make(targets[name]), start[name])
        np.testing.assert_array_equal(together[name], alone)
        assert versions.tree.get(state, "threshold")[index] == versions.tree.get(own, "threshold")


@pytest.mark.slow
def test_kth_smallest_of_each_is_a_sort_of_each():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s).astype(np.float32) for s in [(7,), (3, 5), (0,), (2, 2, 2)]]
    arrays[1][0] = arrays[1][1]  # ties
    for ranks in ([0, 0, 0, 0], [7, 15, 0, 8], [3, 8, 0, 1]):
        got = kth_smallest_of_each([[jnp.asarray(array)] for array in arrays], ranks)
        expected = [
            np.sort(abs(array), axis=None)[rank - 1] if rank else 0
            for array, rank in zip(arrays, ranks)
        ]
        np.testing.assert_array_equal(got, np.asarray(expected, np.float32))
    with pytest.raises(ValueError, match=r"^rank: 8"):
        kth_smallest_of_each([[jnp.ones(7)]], [8])
