"""Numbers and program transformations that are hard for the closed loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lats_optax
from lats_optax import groups, prox, soft_threshold
from tests.misuse import Case, gives, raises

AUTO = (jax.sharding.AxisType.Auto,)
NORMAL = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)


def closed(target=0.5, steps=2, operator=prox.prox_l1, **how):
    loop = lats_optax.target_sparsity(target, 0.1, steps)
    return soft_threshold(loop, operator=operator, **how)


def pruned(params, steps=2, jit=jax.jit, **how):
    """Parameters and threshold after a run without gradients."""
    tx = closed(steps=steps, **how)
    state, update = tx.init(params), jit(tx.update)
    for _ in range(steps):
        updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state.threshold


def living(params, **how):
    return int(jnp.sum(pruned(params, **how)[0] != 0))


def after_the_last_count():
    tx = soft_threshold(optax.linear_schedule(0.0, 0.5, 10))
    state = tx.init(NORMAL)._replace(count=jnp.asarray(2**31 - 1, jnp.int32))
    _, state = jax.jit(tx.update)(jnp.zeros_like(NORMAL), state, jnp.asarray(NORMAL))
    return state


def given_as_an_array(make):
    """Whether a threshold that the caller holds outlives the state that it went into."""
    d = jnp.asarray(0.5)
    tx = make(d)
    for init in (tx.init, jax.jit(tx.init)):
        params = {"kernel": jnp.asarray(NORMAL)}
        state = init(params)
        update = jax.jit(tx.update, donate_argnums=(0, 1))
        _, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
    return not d.is_deleted() and float(d) == 0.5


def conditionals_under_vmap(copies):
    """Whether the program selects within a conditional, and the zeros of each copy."""
    tx = closed(target=0.75, steps=8)
    w = jnp.asarray(np.random.default_rng(1).normal(size=(*copies, 4, 8)), jnp.float32)
    init, update = tx.init, tx.update
    for _ in copies:
        init, update = jax.vmap(init), jax.vmap(update)
    update, state = jax.jit(update), init(w)
    text = update.lower(w, state, w).compile().as_text()
    inside = " conditional(" in text and " while(" not in text[text.index("\nENTRY ") :]
    for _ in range(8):
        updates, state = update(jnp.zeros_like(w), state, w)
        w = optax.apply_updates(w, updates)
    return inside, np.asarray(jnp.sum(w == 0, axis=(-1, -2)))


def seeds_at_different_counts():
    """Thresholds of two copies of which one is at its last step, beside those of each alone."""
    tx = closed(target=0.75, steps=1000)
    w = jnp.asarray(NORMAL)
    state = tx.init(w)
    states = [state._replace(count=jnp.asarray(count, jnp.int32)) for count in (1, 999)]
    alone = [tx.update(w, each, w)[1].threshold for each in states]
    together = jax.tree.map(lambda *each: jnp.stack(each), *states)
    both = jax.jit(jax.vmap(tx.update, in_axes=(None, 0, None)))(w, together, w)[1].threshold
    return np.asarray(both), np.asarray(alone)


def compilations_of_an_eager_loop():
    count = 0

    def listen(name, *_, **__):
        nonlocal count
        count += name == "/jax/core/compile/backend_compile_duration"

    tx, w = closed(steps=20), jnp.asarray(NORMAL)
    state = tx.init(w)
    for step in range(6):
        if step == 3:
            jax.monitoring.register_event_duration_secs_listener(listen)
        updates, state = tx.update(jnp.zeros_like(w), state, w)
        w = optax.apply_updates(w, updates)
    jax.monitoring.unregister_event_duration_listener(listen)
    return count


def slopes(operator):
    """The derivative through a step of the closed loop along a line, and its finite difference."""
    tx, w = closed(steps=1, operator=operator), jnp.asarray(NORMAL)
    line = jnp.asarray(np.random.default_rng(2).normal(size=w.shape), jnp.float32)

    def loss(x):
        updates, _ = tx.update(x * line, tx.init(w), w)
        return jnp.sum((w + updates) * jnp.arange(1.0, 17.0))

    step = 1e-3
    return float(jax.grad(loss)(0.0)), float((loss(step) - loss(-step)) / (2 * step))


def within_shard_map(spec):
    tx, mesh = closed(), jax.make_mesh((8,), ("d",), axis_types=AUTO)
    spec = jax.sharding.PartitionSpec(*spec)

    def step(w):
        return w + tx.update(jnp.zeros_like(w), tx.init(w), w)[0]

    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec))(NORMAL)


def finalized_after_shard_map(spec):
    """What `finalize` makes of a run within a shard_map that checks nothing."""
    tx, mesh = closed(), jax.make_mesh((8,), ("d",), axis_types=AUTO)
    w = jnp.asarray(NORMAL) * jnp.arange(1.0, 9.0)[:, None]
    spec, same = jax.sharding.PartitionSpec(*spec), jax.sharding.PartitionSpec()
    specs = jax.tree.map(lambda leaf: spec if leaf.shape == w.shape else same, (w, tx.init(w)))

    def step(w, state):
        updates, state = tx.update(jnp.zeros_like(w), state, w)
        return w + updates, state

    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    run = w, tx.init(w)
    for _ in range(2):
        run = jax.jit(mapped)(*run)
    return lats_optax.finalize(*run, operator=prox.prox_l1)


def finalized_after_pmap(mean):
    """The same of replicas, of which each has a gradient of its own."""
    tx, w, slopes = closed(), jnp.asarray(NORMAL), jnp.linspace(0.0, 1.0, 8)

    def step(w, state, slope):
        updates, state = tx.update(-mean(slope) * w, state, w)
        return w + updates, state

    mapped = jax.pmap(step, "replica", in_axes=(None, None, 0), out_axes=None)
    run = w, tx.init(w)
    for _ in range(2):
        run = mapped(*run, slopes)
    return lats_optax.finalize(*run, operator=prox.prox_l1)


def halves():
    """Zeros of float16 parameters over float32 latent weights, many of them a little alive."""
    latent = jnp.asarray(np.linspace(1, 1 + 101 * 2**-23, 101)[1:].reshape(4, 25), jnp.float32)
    tx = closed(target=0.5, steps=1, latent_dtype=jnp.float32)
    w = jnp.ones((4, 25), jnp.float16)
    updates, _ = tx.update(latent - 1, tx.init(w), w)
    return int(jnp.sum(optax.apply_updates(w, updates) == 0))


CASES = [
    *(
        Case(
            f"a threshold given as an array, and donated, in {make.__name__}",
            lambda make=make: given_as_an_array(make),
            gives(bool),
        )
        for make in (soft_threshold, lats_optax.proximal_step)
    ),
    Case(
        "all weights are equal, and one has to survive",
        lambda: pruned(jnp.ones((3, 4))),
        gives(lambda run: np.all(run[0] == 1) and run[1] == 0),
    ),
    Case(
        "the largest weights tie, beyond the target",
        lambda: living(jnp.array([[1.0, -2.0, 2.0, 2.0]]), target=0.75),
        gives(lambda alive: alive == 3),
    ),
    Case(
        "all channels are equal",
        lambda: living(jnp.ones((3, 4)), operator=groups.output_channels()),
        gives(lambda alive: alive == 12),
    ),
    Case(
        "all weights of one of two layers are equal",
        lambda: pruned(
            {"a": jnp.ones((2, 2)), "b": jnp.asarray(NORMAL)}, target={"a": 0.5, "b": 0.5}
        ),
        gives(lambda run: np.all(run[0]["a"] == 1) and np.sum(run[0]["b"] == 0) == 64),
    ),
    Case(
        "infinite weights, more than survive",
        lambda: pruned(jnp.array([[1.0, 2.0, jnp.inf, -jnp.inf]]), target=0.75),
        gives(lambda run: run[1] == 2),
    ),
    Case(
        "the count at its maximum",
        after_the_last_count,
        gives(lambda state: state.count == 2**31 - 1 and state.threshold == 0.5),
    ),
    Case(
        "the closed loop under vmap over seeds",
        lambda: conditionals_under_vmap((3,)),
        gives(lambda run: run[0] and np.all(run[1] == 24)),
    ),
    Case(
        "the closed loop under vmap within vmap",
        lambda: conditionals_under_vmap((2, 3)),
        gives(lambda run: run[0] and np.all(run[1] == 24)),
    ),
    Case(
        "seeds under vmap at different steps",
        seeds_at_different_counts,
        gives(lambda run: np.allclose(*run, rtol=1e-6) and run[0][0] == 0 < run[0][1]),
    ),
    Case(
        "an update that is not jitted",
        compilations_of_an_eager_loop,
        gives(lambda count: count == 0),
    ),
    *(
        Case(
            f"the derivative through a selection, {name}",
            lambda operator=operator: slopes(operator),
            gives(lambda pair: np.isclose(*pair, rtol=5e-3) and abs(pair[1]) > 1),
        )
        for name, operator in {"weights": prox.prox_l1, "blocks": groups.blocks(2, 2)}.items()
    ),
    Case(
        "weights that differ between the devices of a shard_map",
        lambda: within_shard_map(("d",)),
        raises(ValueError, r"within shard_map the latent weights vary over 'd', .*jax\.lax\.pmean"),
    ),
    Case(
        "weights that are the same on all devices of a shard_map",
        lambda: within_shard_map(()),
        gives(lambda w: np.sum(w == 0) == 64),
    ),
    Case(
        "weights that differ between the devices of an unchecked shard_map",
        lambda: finalized_after_shard_map(("d",)),
        raises(
            ValueError,
            r"^opt_state: the threshold is \S+ on one device and \S+ on another: .*check_vma=True",
        ),
    ),
    Case(
        "weights that are the same on all devices of an unchecked shard_map",
        lambda: finalized_after_shard_map(()),
        gives(lambda w: np.sum(w == 0) == 64),
    ),
    Case(
        "replicas of pmap whose gradients are not averaged",
        lambda: finalized_after_pmap(lambda slope: slope),
        raises(ValueError, r"^opt_state: the threshold is .* on one device .*jax\.lax\.pmean"),
    ),
    Case(
        "replicas of pmap whose gradients are averaged",
        lambda: finalized_after_pmap(lambda slope: jax.lax.pmean(slope, "replica")),
        gives(lambda w: np.sum(w == 0) == 64),
    ),
    Case(
        "weights too small for float16 beside latent weights in float32",
        halves,
        gives(lambda zeros: zeros == 50),
    ),
    Case(
        "parameters in eight bits",
        lambda: closed().init({"a": jnp.ones((2, 2), jnp.float8_e4m3fn)}),
        raises(ValueError, "^mask: it selects a, which is float8_e4m3fn; allowed are"),
    ),
    Case(
        "latent weights in eight bits",
        lambda: closed(latent_dtype=jnp.float8_e5m2),
        raises(ValueError, "^latent_dtype: float8_e5m2 is not allowed"),
    ),
    Case(
        "init of shapes without arrays",
        lambda: closed(latent_dtype=jnp.bfloat16).init({"a": jax.ShapeDtypeStruct((2, 3), float)}),
        gives(lambda state: state.latent["a"] == jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)),
    ),
]
