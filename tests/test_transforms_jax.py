"""The transforms under what JAX does to programs, on every tree, type and layout of parameters."""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lats_optax
from lats_optax import masks, prox, select, soft_threshold, target_sparsity
from lats_optax.compatibility import enable_x64
from tests import matrix, versions
from tests.properties import (
    FEW,
    STEPS,
    Case,
    assert_close,
    assert_same,
    dense_start,
    gradients,
    kinds,
    run,
)

# Of the fast suite a schedule, a target, a proximal step and a support.
few = pytest.mark.parametrize("case", matrix.fast(FEW, FEW[:2] + FEW[-2:]), ids=str)


# --- trees --------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """A module as Equinox has them: a tree that can be called, with None for what is missing."""

    weight: Any
    bias: Any

    def __call__(self, x):
        return x @ self.weight + self.bias


def as_module(conv, dense, bias):
    return {"conv": Layer(conv, None), "dense": Layer(dense, bias)}


TREES = {
    "tuple": lambda conv, dense, bias: (conv, dense, bias),
    "list": lambda conv, dense, bias: [conv, [dense, bias]],
    "nested": lambda conv, dense, bias: {"a": ({"b": [conv], "off": None}, ()), "c": (dense, bias)},
    "module": as_module,
}


@pytest.mark.parametrize("build", matrix.fast(TREES.values(), 1), ids=TREES)
def test_trees_of_any_structure(build):
    case = Case(threshold="target")
    start = dense_start()
    leaves = start["conv"]["kernel"], start["dense"]["kernel"], start["dense"]["bias"]
    params, tx = build(*leaves), case.make()
    state = tx.init(params)
    update = jax.jit(tx.update)
    for count in range(STEPS):
        updates, state = update(gradients(params, count), state, params)
        params = optax.apply_updates(params, updates)
    last = run(case).params[-1]
    expected = build(last["conv"]["kernel"], last["dense"]["kernel"], last["dense"]["bias"])
    assert_close(params, expected)
    assert lats_optax.sparsity(params).zeros == lats_optax.sparsity(last).zeros
    assert jax.tree.structure(lats_optax.support(params)) == jax.tree.structure(params)


@pytest.mark.slow
def test_a_bare_array():
    tx = optax.chain(optax.sgd(0.1), soft_threshold(target_sparsity(0.5, 0.1, 1)))
    kernel = dense_start()["dense"]["kernel"]
    updates, state = jax.jit(tx.update)(jnp.zeros((6, 5)), tx.init(kernel), kernel)
    kernel = optax.apply_updates(kernel, updates)
    assert int(jnp.sum(kernel == 0)) == 15
    assert state[-1].latent.shape == (6, 5)


def test_a_mask_that_is_a_callable_tree():
    params = as_module(jnp.ones((2, 2)), jnp.ones((2, 2)), jnp.zeros(2))
    mask = Layer(True, None)
    state = soft_threshold(0.5, mask=mask).init(params["conv"])
    np.testing.assert_allclose(state.latent.weight, 1.5)
    assert lats_optax.sparsity(params["conv"], mask).size == 4


@pytest.mark.slow
def test_linen():
    nn = pytest.importorskip("flax.linen")
    model = nn.Sequential([nn.Conv(2, (3, 3)), nn.relu, nn.Dense(3)])
    inputs = jnp.ones((1, 4, 4, 1))
    params = jax.jit(model.init)(jax.random.key(0), inputs)["params"]
    assert jax.tree.leaves(masks.paths(params)) == [
        "layers_0/bias",
        "layers_0/kernel",
        "layers_2/bias",
        "layers_2/kernel",
    ]
    tx = optax.chain(optax.sgd(0.1), soft_threshold(target_sparsity(0.5, 0.1, 1)))

    @jax.jit
    def step(params, state):
        slopes = jax.grad(lambda p: jnp.sum(model.apply({"params": p}, inputs)))(params)
        updates, state = tx.update(slopes, state, params)
        return optax.apply_updates(params, updates)

    assert lats_optax.sparsity(step(params, tx.init(params))).zeros == 12


@pytest.mark.slow
def test_nnx_optimizer():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 2, (3, 3), rngs=rngs)
            self.head = nnx.Sequential(nnx.relu, nnx.Linear(2, 3, rngs=rngs))

        def __call__(self, x):
            return self.head(self.conv(x))

    model = Net(nnx.Rngs(0))
    weights = nnx.state(model, nnx.Param)
    paths = ["conv/bias", "conv/kernel", "head/layers/1/bias", "head/layers/1/kernel"]
    assert jax.tree.leaves(masks.paths(weights)) == paths
    assert [layer.path for layer in lats_optax.sparsity(weights).layers] == paths

    def make(mask):
        threshold = target_sparsity(0.5, 0.1, 3)
        return optax.chain(optax.sgd(0.1, momentum=0.9), soft_threshold(threshold, mask=mask))

    def loss(model):
        return jnp.mean((model(jnp.ones((2, 4, 4, 1))) - 1) ** 2)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss)(model))

    pure = nnx.to_pure_dict(weights)
    optimizer = nnx.Optimizer(model, make(select(r"kernel$")), wrt=nnx.Param)
    for _ in range(3):
        step(model, optimizer)
    after = nnx.state(model, nnx.Param)
    assert lats_optax.sparsity(after).zeros == 12
    threshold = versions.tree.get(optimizer.opt_state, "threshold")
    assert float(threshold[...]) > 0

    # The same on the pure dictionary, without nnx.Optimizer.
    graph = nnx.graphdef(model)
    tx = make(masks.prunable)

    @jax.jit
    def pure_step(pure, state):
        slopes = jax.grad(lambda pure: loss(nnx.merge(graph, nnx.State(pure))))(pure)
        updates, state = tx.update(slopes, state, pure)
        return optax.apply_updates(pure, updates), state

    state = tx.init(pure)
    for _ in range(3):
        pure, state = pure_step(pure, state)
    assert_close(nnx.to_pure_dict(after), pure, 1e-5)


# --- programs -----------------------------------------------------------------------------------


@pytest.mark.cover("cases")
@few
def test_init_under_jit(case):
    start = case.start()
    state = jax.jit(case.make().init)(start)
    assert kinds(state) == kinds(run(case).states[0])
    assert_close(state, run(case).states[0])
    before = run(case).step._cache_size()
    run(case).step(start, state, 0)
    assert run(case).step._cache_size() == before


@pytest.mark.cover("cases")
@few
def test_parameters_and_state_can_be_donated(case):
    tx = case.make()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, count):
        updates, state = tx.update(gradients(params, count), state, params)
        return optax.apply_updates(params, updates), state

    for init in (tx.init, jax.jit(tx.init)):
        params = case.start()
        state = init(params)
        buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state))]
        assert len(set(buffers)) == len(buffers)
        for count in range(STEPS):
            params, state = step(params, state, count)
        assert_close(params, run(case).params[-1])


@pytest.mark.cover("cases")
@few
def test_scan(case):
    tx = case.make()

    @jax.jit
    def train(params):
        def body(carry, count):
            params, state = carry
            updates, state = tx.update(gradients(params, count), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), jnp.arange(STEPS))[0]

    params, state = train(case.start())
    assert_close(params, run(case).params[-1])
    assert_close(state, run(case).states[-1], 1e-5)


@pytest.mark.cover("cases")
@few
def test_vmap_over_copies(case):
    tx = case.make()
    together = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf / 2, leaf * 2]), case.start())

    def step(params, state, count):
        updates, state = tx.update(gradients(params, count), state, params)
        return optax.apply_updates(params, updates), state

    params, state = together, jax.vmap(tx.init)(together)
    mapped = jax.jit(jax.vmap(step, in_axes=(0, 0, None)))
    for count in range(3):
        params, state = mapped(params, state, count)
    for index in range(3):
        pick = functools.partial(jax.tree.map, operator.itemgetter(index))
        one, one_state = pick(together), tx.init(pick(together))
        for count in range(3):
            one, one_state, _ = run(case).step(one, one_state, count)
        assert_close(pick((params, state)), (one, one_state), 1e-5)


@pytest.mark.slow
def test_vmap_over_thresholds():
    params = dense_start()

    def prune(threshold):
        tx = soft_threshold(threshold)
        _, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        return state.latent["dense"]["kernel"], state.threshold

    thresholds = jnp.array([0.0, 0.1, 0.2])
    latent, kept = jax.jit(jax.vmap(prune))(thresholds)
    np.testing.assert_array_equal(kept, thresholds)
    for one, threshold in zip(latent, thresholds):
        kernel = params["dense"]["kernel"]
        np.testing.assert_allclose(one, kernel + threshold * jnp.sign(kernel), atol=1e-6)


# --- devices ------------------------------------------------------------------------------------

OPERATORS = {"l1": prox.prox_l1, "group": prox.Axes()}


def large_start(dtype=jnp.float32):
    rng = np.random.default_rng(5)
    kernel = rng.normal(size=(16, 24)) * np.linspace(0.2, 1.5, 24)
    return {"bias": jnp.zeros(24, dtype), "kernel": jnp.asarray(kernel, dtype)}


def trained(tx, params, jitted_init=True):
    @jax.jit
    def step(params, state, count):
        updates, state = tx.update(gradients(params, count), state, params)
        return optax.apply_updates(params, updates), state

    first = state = (jax.jit(tx.init) if jitted_init else tx.init)(params)
    for count in range(4):
        params, state = step(params, state, count)
    return params, first, state, step


@pytest.fixture(scope="module", params=["l1", "group"])
def on_one_device(request):
    threshold = target_sparsity(0.7, 0.1, 4)
    # No momentum: optax's own zeros would make the compiler choose their layout in init.
    tx = optax.chain(optax.sgd(0.1), soft_threshold(threshold, operator=OPERATORS[request.param]))
    return request.param, tx, trained(tx, large_start())


@pytest.mark.cover
@pytest.mark.parametrize(
    "jitted_init", matrix.fast([False, True], [True]), ids=["eager_init", "jitted_init"]
)
@pytest.mark.parametrize("spec", [("d",), (None, "d")], ids=["rows", "columns"])
def test_sharded_parameters(on_one_device, spec, jitted_init):
    name, tx, (expected, _, expected_state, _) = on_one_device
    mesh = versions.auto_mesh((8,), ("d",))
    layout = {
        "bias": NamedSharding(mesh, PartitionSpec()),
        "kernel": NamedSharding(mesh, PartitionSpec(*spec)),
    }
    start = jax.device_put(large_start(), layout)
    params, first, state, step = trained(tx, start, jitted_init)
    for latent in (first[-1].latent["kernel"], state[-1].latent["kernel"]):
        assert latent.sharding.is_equivalent_to(layout["kernel"], 2)
    assert params["kernel"].sharding.is_equivalent_to(layout["kernel"], 2)
    assert_close(params, expected)
    if name == "l1":
        assert_same(state[-1].threshold, expected_state[-1].threshold)
        assert int(jnp.sum(params["kernel"] == 0)) == round(0.7 * 16 * 24)
    if jitted_init:
        assert step._cache_size() == 1


@pytest.mark.parametrize("threshold", matrix.fast(["schedule", "target"], ["target"]))
def test_pmap_without_a_device_axis_in_the_state(threshold):
    tx = Case(threshold=threshold, freeze_after=4).make()

    def loss(params, inputs):
        return jnp.mean((inputs @ params["kernel"] + params["bias"] - 1) ** 2)

    def step(params, state, inputs, mean=lambda slopes: slopes):
        slopes = mean(jax.grad(loss)(params, inputs))
        updates, state = tx.update(slopes, state, params)
        return optax.apply_updates(params, updates), state

    parallel = jax.pmap(
        functools.partial(step, mean=functools.partial(jax.lax.pmean, axis_name="i")),
        axis_name="i",
        in_axes=(None, None, 0),
        out_axes=None,
    )
    batch = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2, 16)), jnp.float32)
    many = one = (large_start(), tx.init(large_start()))
    single = jax.jit(step)
    for _ in range(STEPS):
        many, one = parallel(*many, batch), single(*one, batch.reshape(16, 16))
    assert_close(many[0], one[0], 1e-5)
    assert kinds(many[1]) == kinds(one[1])


# --- types --------------------------------------------------------------------------------------


@pytest.mark.cover
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("latent_dtype", [None, "float32"])
@pytest.mark.parametrize("threshold", ["float", "schedule", "lats", "target"])
def test_types_are_kept(threshold, latent_dtype, dtype):
    case = Case(threshold=threshold, latent_dtype=latent_dtype)
    for x64 in [True] if dtype == "float64" else [False, True]:
        with enable_x64(x64):
            params = {"kernel": jnp.asarray(np.linspace(-1, 1, 12).reshape(3, 4), dtype)}
            tx = case.bare()
            state = jax.eval_shape(tx.init, params)
            updates, after = jax.eval_shape(tx.update, params, state, params)
            assert kinds(updates) == kinds(params)
            assert kinds(after) == kinds(state) == kinds(tx.init(params))
            assert after.threshold.dtype == (jnp.float64 if x64 else jnp.float32)
            assert after.latent["kernel"].dtype == (latent_dtype or dtype)
            assert not after.threshold.weak_type


@pytest.mark.slow
def test_inner_sees_latent_weights_of_their_own_type():
    params = {"bias": jnp.ones(3, jnp.bfloat16), "kernel": jnp.ones((2, 3), jnp.bfloat16)}
    tx = soft_threshold(0.1, inner=optax.adamw(0.1), latent_dtype=jnp.float32)
    state = tx.init(params)
    assert state.inner_state[0].mu["kernel"].dtype == jnp.float32
    assert state.inner_state[0].mu["bias"].dtype == jnp.bfloat16
    _, after = jax.jit(tx.update)(params, state, params)
    assert kinds(after) == kinds(state)


@pytest.mark.slow
def test_float64_reaches_the_target_in_float64():
    with enable_x64(True):
        # Magnitudes that float32 cannot tell apart.
        kernel = 1 + jnp.arange(20.0).reshape(4, 5) * 1e-12
        tx = soft_threshold(target_sparsity(0.5, 0.1, 1))
        updates, state = jax.jit(tx.update)(jnp.zeros((4, 5)), tx.init(kernel), kernel)
        assert int(jnp.sum(optax.apply_updates(kernel, updates) == 0)) == 10
        assert float(state.threshold) == 1 + 9e-12


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@few
def test_strict_promotion(case, dtype):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        tx = case.bare()
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), case.start())
        state = jax.eval_shape(tx.init, params)
        updates, _ = jax.eval_shape(tx.update, params, state, params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


@pytest.mark.slow
def test_an_update_too_narrow_for_its_parameters_is_widened():
    params = {"kernel": jnp.array([[1.001, 0.5]])}
    narrow = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.bfloat16), params)
    for tx in (
        soft_threshold(lambda count: 2.0, operator=prox.prox_l0),
        lats_optax.proximal_step(2.0),
        lats_optax.keep_support({"kernel": False}),
    ):
        updates, _ = tx.update(narrow, tx.init(params), params)
        assert not np.any(optax.apply_updates(params, updates)["kernel"])
