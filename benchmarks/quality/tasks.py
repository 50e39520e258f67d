"""What is trained: four small tasks with a validation split to tune on and a test split to report.

A run is deterministic by its seed, on one kind of machine: initial weights and batches are the same
for every method.
"""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import optax

from benchmarks.quality import fashion_mnist, image_models
from benchmarks.quality.characters import language_model
from benchmarks.quality.peers.base import Make, Schedule
from benchmarks.quality.training import Outcome, Problem, fit
from lats_optax.data.fashion_mnist import FILES

RunFunction = Callable[[Make, float, int, float, str], Outcome]

SPLITS = ("test", "validation")
SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)


@dataclasses.dataclass(frozen=True)
class Task:
    """One training task.

    Attributes:
      name: of one word, for the command line.
      metric: ``"accuracy"``, a fraction, or ``"bits"``, per character.
      sparsities: what methods are compared at, in ascending order.
      tuned_at: sparsities that a learning rate is chosen at, in ascending order.
      tuning_seeds: how many a learning rate is chosen with.
      learning_rates: base rates to tune over.
      default_rate: the base rate where nothing was tuned.
      make_optimizer: learning-rate schedule -> base optimizer.
      run: (make, target, seed, base rate, split) -> outcome.
      seconds: of one run on one core, about: for the first estimate of the time left.
      files: that it reads.
      quick_sparsities: those of a quick run; empty: a quick run leaves the task out.
      version: raised when results are no longer comparable to those of before.
    """

    name: str
    metric: str
    sparsities: tuple[float, ...]
    tuned_at: tuple[float, ...]
    learning_rates: tuple[float, ...]
    default_rate: float
    make_optimizer: Callable[[Schedule], optax.GradientTransformation]
    run: RunFunction
    seconds: float
    tuning_seeds: int = 1
    files: tuple[Path, ...] = ()
    quick_sparsities: tuple[float, ...] = ()
    version: int = 1

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger metric is the better one."""
        return higher_is_better(self.metric)


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of the metric is the better one."""
    return {"accuracy": True, "bits": False}[metric]


def all_tasks(directory: Path = fashion_mnist.DIRECTORY) -> dict[str, Task]:
    """The tasks by name.

    Args:
      directory: of Fashion-MNIST's four files.
    """
    files = tuple(directory / file for file in FILES.values())
    images = partial(fashion_mnist.classification, directory)

    def cosine(rate: float, steps: int) -> Schedule:
        return optax.cosine_decay_schedule(rate, steps)

    def warm_up_cosine(rate: float, steps: int) -> Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps)

    def task(
        name: str,
        problem: Callable[[str], Problem],
        schedule: Callable[[float, int], Schedule],
        make_optimizer: Callable[[Schedule], optax.GradientTransformation],
        **rest: object,
    ) -> Task:
        problem = cache(problem)

        def run(make: Make, target: float, seed: int, rate: float, split: str) -> Outcome:
            chosen = problem(split)
            learning_rate = schedule(rate, chosen.steps)
            optimizer = make_optimizer(learning_rate)
            return fit(chosen, make, optimizer, learning_rate, target, seed)

        return Task(name=name, make_optimizer=make_optimizer, run=run, **rest)  # type: ignore

    sgd = partial(optax.sgd, momentum=0.9)
    tasks = (
        task(
            "lenet",
            # Rates a factor of two apart differ by 0.3 points here, which is less than the standard
            # error of 5,000 images, 0.44.
            partial(images, model=image_models.LeNet, epochs=8, batch=128, validation=10_000),
            cosine,
            sgd,
            metric="accuracy",
            sparsities=SPARSITIES,
            tuned_at=(0.8, 0.95, 0.99),
            tuning_seeds=3,
            quick_sparsities=(0.98,),
            learning_rates=(0.02, 0.05, 0.1, 0.2),
            default_rate=0.05,
            seconds=20,
            files=files,
        ),
        task(
            "resnet",
            partial(images, model=image_models.SmallResNet, epochs=2, batch=128, validation=5_000),
            cosine,
            sgd,
            metric="accuracy",
            sparsities=SPARSITIES,
            tuned_at=(0.8, 0.95),
            quick_sparsities=(0.95,),
            learning_rates=(0.1, 0.2, 0.4, 0.8, 1.6),
            default_rate=0.1,
            seconds=80,
            files=files,
        ),
        task(
            "char",
            language_model,
            warm_up_cosine,
            optax.adamw,
            metric="bits",
            sparsities=SPARSITIES,
            tuned_at=(0.8, 0.95),
            learning_rates=(1.5e-3, 3e-3, 6e-3, 1.2e-2),
            default_rate=3e-3,
            seconds=110,
        ),
        task(
            "spiking",
            partial(
                images, model=image_models.SmallSpikingNet, epochs=1, batch=64, validation=5_000
            ),
            cosine,
            sgd,
            metric="accuracy",
            sparsities=SPARSITIES,
            tuned_at=(0.8, 0.95),
            learning_rates=(0.05, 0.1, 0.2, 0.4, 0.8),
            default_rate=0.1,
            seconds=80,
            files=files,
        ),
    )
    return {task.name: task for task in tasks}
