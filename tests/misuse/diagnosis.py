"""Runs that went wrong unseen: wrong steps, wrong chains, models that diverged or were changed."""

import jax
import jax.numpy as jnp
import optax

from lats_optax import erdos_renyi, finalize, soft_threshold, sparsity, target_sparsity
from lats_optax.pruning import progress
from tests.misuse import Case, gives, raises, warns

STEPS, RATE = 40, 0.05
SGD = optax.sgd(RATE, momentum=0.9)
ADAM = optax.adam(RATE)
PLAIN_SGD = {
    "plain sgd": optax.sgd(RATE),
    "sgd with a schedule": optax.sgd(optax.cosine_decay_schedule(RATE, STEPS)),
    "sgd with injected hyperparameters": optax.inject_hyperparams(optax.sgd)(RATE),
}
DENSE = {"a": False, "b": False, "c": False}


def start():
    first, second = jax.random.split(jax.random.key(0))
    return {
        "a": jax.random.normal(first, (20, 30)),
        "b": jnp.zeros(30),
        "c": jax.random.normal(second, (30, 20)),
    }


def trained(tx, calls=STEPS, params=None, not_finite=()):
    """Parameters and state after calls of update under noise, of which some are not finite."""
    params = start() if params is None else params
    goals = start()

    def step(carry, call):
        params, state = carry
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), call), ())
        broken = jnp.isin(call, jnp.array([-1, *not_finite]))
        slopes = jax.tree.map(
            lambda w, goal: jnp.where(broken, jnp.nan, w - goal + noise * jnp.cos(9 * goal)),
            getattr(params, "fast", params),  # of optax.lookahead
            goals,
        )
        updates, state = tx.update(slopes, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(calls))[0])
    return run((params, tx.init(params)))


def named(target=0.9, steps=STEPS, **options):
    return soft_threshold(target_sparsity(target, RATE, steps), **options)


def finalized(tx, calls=STEPS, **options):
    """What `finalize` makes of a run."""
    return lambda: finalize(*trained(tx, calls, **options))


def changed(change, **options):
    """What `finalize` makes of a good run whose first layer was changed after it."""

    def act():
        params, state = trained(optax.chain(SGD, named()))
        return finalize(params | {"a": change(params["a"])}, state, **options)

    return act


def times_a_thousand(w):
    """One survivor of the many, and not the largest one."""
    alive = jnp.where(w == 0, jnp.inf, jnp.abs(w))
    return w.at[jnp.unravel_index(jnp.argmin(alive), w.shape)].multiply(1000)


def lost(first, then):
    """The optimizer state is initialized again on the way."""
    tx = optax.chain(SGD, named())
    params, _ = trained(tx, first)
    return finalize(*trained(tx, then, params=params))


def without_a_layer():
    """One array is far smaller than the others, and dies as a whole."""
    params = start() | {"c": 1e-3 * start()["c"]}
    tx = soft_threshold(optax.linear_schedule(0.0, 0.1, 1))
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    return finalize(optax.apply_updates(params, updates), state)


def table(steps):
    """What `sparsity` prints of a run whose state it is given."""

    def act():
        params, state = trained(optax.chain(SGD, named(steps=steps)))
        return str(sparsity(params, opt_state=state))

    return act


def averaged_around():
    tx = optax.lookahead(optax.chain(SGD, named()), 5, 0.5)
    params, state = trained(tx, params=optax.LookaheadParams.init_synced(start()))
    return finalize(params.slow, state)


def has_zeros(fraction):
    return lambda params: abs(sparsity(params).sparsity - fraction) < 1e-3


ZEROS_DIFFER = r"^params: their zeros are not those of the state.*chain soft_threshold last"
CASES = [
    # --- wrong steps --------------------------------------------------------------------------
    Case("the right steps", finalized(optax.chain(SGD, named())), gives(has_zeros(0.9))),
    Case(
        "trained twice as long",
        finalized(optax.chain(SGD, named(0.95)), 2 * STEPS),
        gives(has_zeros(0.95)),
    ),
    Case(
        "epochs for steps",
        finalized(optax.chain(SGD, named(steps=2))),
        warns(r"went on to step 40 of 2: the target was met in the first 5\.0% of it.*epochs"),
    ),
    Case(
        "calls for steps under MultiSteps",
        finalized(optax.MultiSteps(optax.chain(SGD, named()), 4)),
        warns(
            r"stopped at step 10 of 40: \d+\.\d\d% zeros, of the 90\.00% named\. Under "
            r"optax\.MultiSteps",
            lambda params: sparsity(params).sparsity < 0.9,
        ),
    ),
    Case(
        "the table of a run that met its target",
        table(STEPS),
        gives(
            lambda text: text.endswith(
                "target met: 1,080 of 1,200 weights were to be zero, at step 40 of 40"
            )
        ),
    ),
    Case(
        "the table of a run that stopped early",
        table(10 * STEPS),
        gives(lambda text: "the run stopped at step 40 of 400: " in text.splitlines()[-1]),
    ),
    Case(
        "the table with a state of another transform",
        lambda: sparsity(start(), opt_state=SGD.init(start())),
        raises(ValueError, "opt_state: there is no state of soft_threshold in it"),
    ),
    Case(
        "ten times too many steps",
        finalized(optax.chain(SGD, named(steps=10 * STEPS))),
        warns(r"^opt_state: the run stopped at step 40 of 400: .* named\. The steps of target_spa"),
    ),
    Case(
        "too many steps, a target for each layer",
        finalized(optax.chain(SGD, named(erdos_renyi(0.9), 10 * STEPS))),
        warns(r"step 40 of 400: a has .*% zeros, of the 90\.00% named; c has .* 90\.00% named\."),
    ),
    Case(
        "a layer that died as a whole",
        without_a_layer,
        warns(r"^opt_state: every weight of c is zero: nothing passes there.*erdos_renyi"),
    ),
    Case(
        "a state that was lost",
        lambda: lost(10, 10),
        warns(r"stopped at step 10 of 40: .* of the 90\.00% named\. .*counts from 0"),
    ),
    Case(
        "a state that was lost, before the target was met again",
        lambda: lost(10, 30),
        warns(
            r"^opt_state: the run stopped at step 30 of 40: the target is met, .*counts from 0",
            has_zeros(0.9),
        ),
    ),
    Case(
        "calls for steps under MultiSteps, where half of the steps meet the target",
        finalized(optax.MultiSteps(optax.chain(SGD, named()), 2)),
        warns(r"stopped at step 20 of 40: the target is met, .* Under optax\.MultiSteps"),
    ),
    Case(
        "two steps of a run too few",
        finalized(optax.chain(SGD, named()), STEPS - 2),
        gives(has_zeros(0.9)),
    ),
    Case(
        "a target lost after the last step",
        lambda: progress.misgivings(start(), trained(optax.chain(SGD, named()))[1]),
        gives(lambda told: "the run is over, at step 40 of 40: 0.00% zeros" in told[0]),
    ),
    Case(
        "updates that apply_if_finite skipped",
        finalized(
            optax.apply_if_finite(
                optax.chain(SGD, soft_threshold(target_sparsity(0.9, RATE, STEPS, reach=1.0))), 5
            ),
            not_finite=(9, 18, 30),
        ),
        warns(r"stopped at step 37 of 40: .*optax\.apply_if_finite skipped 3 updates"),
    ),
    Case(
        "updates that apply_if_finite skipped, made up for",
        finalized(optax.apply_if_finite(optax.chain(SGD, named()), 5), 42, not_finite=(9, 18)),
        gives(has_zeros(0.9)),
    ),
    # --- a model that diverged or was changed -------------------------------------------------
    Case(
        "gradients that are not finite",
        finalized(optax.chain(SGD, named()), not_finite=(39,)),
        raises(ValueError, r"^params: not all values are finite: a: 600 of 600; b: 30 of 30; c: "),
    ),
    Case(
        "a survivor that is NaN",
        changed(lambda w: times_a_thousand(w).at[w == jnp.max(w)].set(jnp.nan)),
        raises(ValueError, r"^params: not all values are finite: a: 1 of 600\."),
    ),
    Case(
        "an average that is not finite",
        changed(lambda w: w, average=jax.tree.map(lambda w: w / 0, start())),
        raises(ValueError, r"^average: not all values are finite: a: 600 of 600"),
    ),
    Case(
        "a survivor that is a thousandfold",
        changed(times_a_thousand),
        raises(ValueError, r"^params: the values of a are not those of the state"),
    ),
    # --- wrong chains -------------------------------------------------------------------------
    Case(
        "before the optimizer",
        finalized(optax.chain(named(), optax.sgd(RATE))),
        raises(ValueError, ZEROS_DIFFER),
    ),
    Case(
        "before Adam",
        finalized(optax.chain(named(), ADAM)),
        raises(ValueError, ZEROS_DIFFER),
    ),
    Case(
        "before an optimizer that diverges",
        finalized(optax.chain(named(), optax.sgd(3.0)), 400),
        raises(ValueError, r"^params: not all values are finite.*chain soft_threshold last"),
    ),
    Case(
        "twice",
        finalized(optax.chain(SGD, named(), named())),
        raises(ValueError, r"^opt_state: two states have latent weights for a; chain one"),
    ),
    Case(
        "an optimizer before it and another one within",
        finalized(optax.chain(ADAM, named(inner=SGD))),
        warns(r"^opt_state: a, c went through two optimizers.*not both"),
    ),
    *(
        Case(
            f"{name} before it and the same within",
            finalized(optax.chain(sgd, named(inner=sgd))),
            warns(r"^opt_state: what is chained before soft_threshold\(inner=…\).* not both"),
        )
        for name, sgd in PLAIN_SGD.items()
    ),
    Case(
        "transforms of gradients before an optimizer within",
        finalized(
            optax.chain(
                optax.clip(1.0),
                optax.clip_by_global_norm(1.0),
                optax.add_decayed_weights(1e-4),
                named(inner=optax.sgd(RATE)),
            )
        ),
        gives(has_zeros(0.9)),
    ),
    Case(
        "an optimizer for each part, and one within",
        finalized(
            optax.partition(
                {"pruned": named(inner=SGD), "dense": ADAM},
                {"a": "pruned", "b": "dense", "c": "pruned"},
            )
        ),
        gives(has_zeros(0.9)),
    ),
    Case(
        "behind a partition of two optimizers",
        finalized(
            optax.chain(
                optax.partition({"sgd": SGD, "adam": ADAM}, {"a": "sgd", "b": "sgd", "c": "adam"}),
                named(),
            )
        ),
        warns(r"every weight of [ac] is zero", has_zeros(0.9)),
    ),
    Case(
        "scaled afterwards",
        finalized(optax.chain(SGD, named(), optax.scale(0.5))),
        raises(ValueError, ZEROS_DIFFER),
    ),
    Case(
        "averaged afterwards",
        finalized(optax.chain(SGD, named(), optax.ema(0.9))),
        raises(ValueError, ZEROS_DIFFER),
    ),
    Case(
        "decayed afterwards",
        finalized(optax.chain(SGD, named(), optax.add_decayed_weights(0.01))),
        raises(ValueError, ZEROS_DIFFER),
    ),
    Case(
        "averaged around it",
        averaged_around,
        raises(ValueError, r"^params: their zeros are not.* such as optax\.lookahead"),
    ),
    # --- nothing to prune ---------------------------------------------------------------------
    Case(
        "everything masked, at init",
        lambda: optax.masked(named(), DENSE).init(start()),
        warns(r"^nothing is pruned: a transform around this one, such as optax\.masked"),
    ),
    Case(
        "everything masked, at the end",
        finalized(optax.chain(SGD, optax.masked(named(), DENSE))),
        warns(r"^opt_state: nothing was pruned: the mask of soft_threshold, or that of a transf"),
    ),
]
