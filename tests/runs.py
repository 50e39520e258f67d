"""What tests of whole runs share: the loop by hand, stopping a run, comparing two, its events."""

import itertools
import struct

import jax
import numpy as np
import optax
from tensorboardX.proto import event_pb2

from lats_optax.training.config import PruneConfig
from lats_optax.training.parallel import PmapEngine
from tests import tiny

EARLY = PruneConfig(target_sparsity=0.75, mode="early", search_epochs=1)
BEFORE = PruneConfig(target_sparsity=0.75, mode="at-initialization", search_epochs=1)


class KilledError(Exception):
    pass


def at_step(monkeypatch, step, act, engine=PmapEngine):
    """Acts just before a step is taken."""

    def compile_update(self, pure, original=engine.compile_update):
        compiled, taken = original(self, pure), itertools.count(1)

        def take(state, batch):
            if next(taken) == step:
                act()
            return compiled(state, batch)

        return take

    monkeypatch.setattr(engine, "compile_update", compile_update)


def die():
    raise KilledError


def assert_equal_runs(a, b):
    """The same state, accuracy and records, to the last bit; speeds apart."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a.state), jax.device_get(b.state))
    assert a.test_accuracy == b.test_accuracy
    strip = lambda rs: [{k: v for k, v in r.items() if k != "images_per_second"} for r in rs]  # noqa: E731
    assert strip(a.metrics) == strip(b.metrics)


def plain_steps(params, stats, tx, opt_state, batches):
    """The tiny model trained by a loop written out: its parameters and batch statistics."""
    model = tiny.Model()

    @jax.jit
    def step(params, stats, opt_state, batch):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": stats}
            logits, new = model.apply(variables, batch["image"], mutable=["batch_stats"])
            labels = jax.nn.one_hot(batch["label"], tiny.CLASSES)
            return optax.softmax_cross_entropy(logits, labels).mean(), new["batch_stats"]

        grads, stats_ = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats_, opt_state

    for batch in batches:
        params, stats, opt_state = step(params, stats, opt_state, batch)
    return params, stats


def events(workdir):
    """What TensorBoard would read: the values of each tag, by step."""
    found = {}
    for path in workdir.glob("events.out.tfevents.*"):
        data = path.read_bytes()
        while data:
            # Length, its checksum, the event, its checksum.
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value
    return found
