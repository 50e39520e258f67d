"""A run that goes on where it was stopped, as a program that tests kill."""

import sys
from pathlib import Path

import pytest

from lats_optax.training import loop
from lats_optax.training.config import PruneConfig
from tests import tiny


def config(workdir, epochs, **changes):
    sparse = PruneConfig(target_sparsity=0.75)
    return tiny.config(workdir, epochs=epochs, prune=sparse, log_every=1, **changes)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        tiny.install(patch)
        loop.train(config(Path(sys.argv[1]), int(sys.argv[2]), resume=True))
