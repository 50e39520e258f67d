"""The commands, `lats-train` and its siblings: arguments in, a few lines out, no logic."""

import contextlib
import dataclasses
import io
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import tyro

from lats_optax import data
from lats_optax.files.storage import StoreError
from lats_optax.training import demo as demonstration
from lats_optax.training import experiment as experiments
from lats_optax.training import loop, plots
from lats_optax.training.demo import DemoConfig, DemoResult
from lats_optax.training.experiment import Experiment
from lats_optax.training.finite import NonFiniteError
from lats_optax.training.lock import WorkdirInUseError
from lats_optax.training.parallel import PrimaryError
from lats_optax.training.preemption import PreemptedError
from lats_optax.training.presets import PRESETS
from lats_optax.training.recovery import CheckpointError
from lats_optax.training.replicas import ReplicaError
from lats_optax.training.result import RunResult

Ready = TypeVar("Ready")

_DEBUG = "--debug"
# Characters of an error that nobody foresaw; a library may write pages.
_LONGEST = 500

_FAILURES = (
    OSError,  # a full disk, a place that is read-only
    NonFiniteError,
    data.CorruptRecordError,
    CheckpointError,
    WorkdirInUseError,
    PrimaryError,
    ReplicaError,
)
_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed later


def train(args: Sequence[str] | None = None) -> int:
    """`lats-train PRESET [--field value ...]`: trains a model.

    Args:
      args: what follows the command's name; None: what the process was started with.

    Returns:
      The exit code: 0; 1 for a run that failed; 2 for arguments that are not allowed; 130 for one
      that was interrupted; 75 for one of several processes that was, and is to be started again.
    """

    def prepare(args: Sequence[str]) -> Experiment:
        parse = tyro.extras.overridable_config_cli
        # The list of all is for choosing; what there is to know of one is in its own help.
        presets = {
            name: (
                preset.description if [name] == list(args[:1]) else preset.summary,
                preset.config,
            )
            for name, preset in PRESETS.items()
        }
        description = (
            "Train a model, dense or sparse. Each preset is a run; any field of it can be given: "
            "lats-train PRESET --help lists them."
        )
        return experiments.build_experiment(
            _in_one_line(parse, presets, "lats-train", description, args)
        )

    def execute(experiment: Experiment) -> None:
        result = loop.fit(experiment)
        _print_run(result)
        # Last, so that a plot that cannot be written takes nothing with it.
        if drawn := plots.write_plots(result):
            print(f"plots         {', '.join(map(str, drawn))}")
        if result.is_primary and result.target_line is not None:
            print(result.target_line)
        _warn_of("lats-train", result)

    return _run("lats-train", args, prepare, execute)


def demo(args: Sequence[str] | None = None) -> int:
    """`lats-demo [--field value ...]`: trains a dense and a sparse network, and compares them.

    Args:
      args: as for `train`.

    Returns:
      As `train`.
    """

    def prepare(args: Sequence[str]) -> tuple[DemoConfig, dict[str, Experiment]]:
        config = _in_one_line(tyro.cli, DemoConfig, "lats-demo", None, args)
        return config, demonstration.build_runs(config)

    return _run("lats-demo", args, prepare, lambda ready: _print_demo(demonstration.fit(*ready)))


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Write a data set to disk as ArrayRecord, which is what lats-train reads."""

    name: tyro.conf.Positional[str]
    """`digits`; an image classification set of TFDS: NAME, NAME/CONFIG, NAME/CONFIG:VERSION; or
    `folder`, images of your own."""
    images: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[PATH]")] = None
    """With `folder`: where they are, one subfolder for each class, or these in train and test."""
    called: Annotated[str | None, tyro.conf.arg(name="name")] = None
    """With `folder`: what lats-train --data.name will call them."""
    held_out: float | None = None
    """With `folder`: part of each class to test on where there is no folder test; None: 0.1."""
    data_dir: str | None = None
    """Where prepared data sets are kept; None: the TFDS default."""
    manual_dir: str | None = None
    """Where files are that cannot be downloaded, as ImageNet's; None: downloads/manual there."""
    from_dir: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Directory with files that TFDS would download, such as Fashion-MNIST's; None: download."""
    overwrite: bool = False
    """Remove what is there of the data set first."""


def prepare(args: Sequence[str] | None = None) -> int:
    """`lats-prepare NAME [--from DIR]`, `lats-prepare folder PATH --name NAME`: makes data ready.

    Args:
      args: as for `train`.

    Returns:
      As `train`; 1 for what cannot be downloaded or written here.
    """

    def prepared(args: Sequence[str]) -> str:
        config: PrepareConfig = _in_one_line(tyro.cli, PrepareConfig, "lats-prepare", None, args)
        # Takes a second to import, and nothing else needs it.
        from lats_optax.data.prepare import prepare as prepare_data

        return prepare_data(**dataclasses.asdict(config))

    return _run("lats-prepare", args, prepared, print)


def inspect(args: Sequence[str] | None = None) -> int:
    """`lats-inspect schedule ...` and `lats-inspect model FILE`: tables and plots.

    Args:
      args: as for `train`.

    Returns:
      As `train`.
    """

    def inspected(args: Sequence[str]) -> str:
        # No other command draws all this.
        from lats_optax.inspection import compare_schedules as schedules
        from lats_optax.inspection import model_file

        parse = tyro.extras.subcommand_cli_from_dict
        kinds = {"schedule": schedules.ScheduleRequest, "model": model_file.ModelRequest}
        what = "Tables and plots of threshold schedules and of sparse models."
        request = _in_one_line(parse, kinds, "lats-inspect", what, args)
        if isinstance(request, schedules.ScheduleRequest):
            compared = schedules.compare_schedules(request)
            return schedules.write_report(compared, schedules.plot_path(request))
        inspected = model_file.inspect_file(request)
        return model_file.write_report(inspected, model_file.plot_path(request))

    return _run("lats-inspect", args, inspected, print)


def compact(args: Sequence[str] | None = None) -> int:
    """`lats-compact FILE [--out FILE]`: a smaller model with the same outputs.

    Args:
      args: as for `train`.

    Returns:
      As `train`.
    """

    def compacted(args: Sequence[str]) -> str:
        # No other command compacts.
        from lats_optax.training import compact_cli

        request = _in_one_line(tyro.cli, compact_cli.CompactRequest, "lats-compact", None, args)
        return compact_cli.write_model(compact_cli.compact_file(request), request.out)

    return _run("lats-compact", args, compacted, print)


def _run(
    program: str,
    args: Sequence[str] | None,
    prepare: Callable[[Sequence[str]], Ready],
    execute: Callable[[Ready], None],
) -> int:
    """Turns what goes wrong into one line and an exit code; with --debug, a traceback above it."""
    args = sys.argv[1:] if args is None else args
    debug = _DEBUG in args

    def fail(error: object, code: int) -> int:
        if debug:
            traceback.print_exc()
        print(f"{program}: error: {error}", file=sys.stderr)
        return code

    def fail_unforeseen(error: Exception) -> int:
        hint = "" if debug else f"; {_DEBUG} shows where"
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return fail(what[:_LONGEST] + hint, 1)

    with warnings.catch_warnings():
        warnings.showwarning = _one_line(program)
        try:
            ready = prepare([arg for arg in args if arg != _DEBUG])
        except (PermissionError, StoreError) as error:
            return fail(error, 1)
        except (ValueError, OSError) as error:
            return fail(error, 2)
        except (data.PrepareError, CheckpointError) as error:
            return fail(error, 1)
        except KeyboardInterrupt:
            return fail("interrupted", 130)
        except Exception as error:
            return fail_unforeseen(error)
        try:
            execute(ready)
        except FileExistsError as error:
            return fail(error, 2)
        except _FAILURES as error:
            return fail(error, 1)
        except PreemptedError as error:
            return fail(error, _PREEMPTED)
        except KeyboardInterrupt as error:
            return fail(str(error) or "interrupted", 130)
        except Exception as error:
            return fail_unforeseen(error)
    return 0


def _one_line(program: str) -> Callable[..., None]:
    """Prints a warning as a line of the command, without the line of code that it is from."""

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        print(f"{program}: warning: {message}", file=sys.stderr)

    return show


def _in_one_line(
    parse: Callable[..., Any],
    what: Any,
    program: str,
    description: str | None,
    args: Sequence[str],
) -> Any:
    """What tyro makes of the arguments; exits after --help.

    tyro frames its errors over many lines; here they become one.
    """
    description = f"{description or what.__doc__} {_DEBUG} shows the traceback of an error."
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return parse(what, prog=program, description=description, args=args)
    except SystemExit as stop:
        if not stop.code:
            raise
    raise ValueError(_unframed(errors.getvalue()))


def _unframed(box: str) -> str:
    """The message in a box that tyro has drawn around an error, and the options it suggests."""
    # Where standard output is not UTF-8, rules are of hyphens and the title is above the first.
    first = 0 if box.startswith("╭") else 1
    words = re.sub(r"^╭.*$|│", "", box, flags=re.MULTILINE)
    sections = re.split(r"^\W*?[─-]{3}\W*$", words, flags=re.MULTILINE)[first:]
    sections = [" " + " ".join(section.split()) + " " for section in sections]
    # Names of tyro's own, where the message names the field already.
    message = re.sub(r"Error parsing (?!--)\S+: ", "", sections[0].strip())
    for section in sections[1:]:
        if section.startswith(" Available subcommands"):
            message += f"; known are: {section.partition(':')[2].strip()}"
        elif section.startswith(" Perhaps you meant"):
            options = dict.fromkeys(re.findall(r"(?<= )--[\w.-]+\w(?= )", section))
            options.pop("--help", None)
            message += f"; perhaps you meant {' or '.join(options)}"
    if message.startswith("Unrecognized") and "; " not in message:
        message += "; --help lists what is allowed"
    return message


def _print_run(result: RunResult) -> None:
    if not result.is_primary:
        return
    print(result.sparsity)
    averaged = result.test_accuracy_averaged
    more = "" if averaged is None else f", with averaged weights {averaged:.2%},"
    print(f"test accuracy {result.test_accuracy:.2%}{more} after {result.seconds:.0f} s")
    if result.config.data.skip_corrupt:
        counted = [record for record in result.metrics if "skipped" in record]
        skipped = {record["split"]: record["skipped"] for record in counted}
        print(f"skipped       {skipped['train']} corrupt records in training", end=", ")
        print(f"{skipped['test']} in the last evaluation")
    workdir = result.config.workdir
    print(f"metrics       {workdir}/metrics.jsonl; tensorboard --logdir {workdir}")
    print(f"checkpoint    {result.checkpoint}")
    print(f"model         {result.model}")
    if result.model_averaged is not None:
        print(f"averaged      {result.model_averaged}")


def _warn_of(program: str, result: RunResult, name: str = "") -> None:
    """Prints the problems of a run as warnings."""
    sys.stdout.flush()
    for problem in result.problems if result.is_primary else ():
        print(f"{program}: warning: {name}{problem}", file=sys.stderr)


def _print_demo(result: DemoResult) -> None:
    print(result.table)
    print()
    print(f"plot         {result.plot}")
    print(f"weights      {result.weights}")
    print(f"summary      {result.summary}")
    for name, run in result.runs.items():
        print(f"{name + ' run':<12} {run.checkpoint} (checkpoint)")
        print(f"{name + ' file':<12} {run.model}")
    for name, run in result.runs.items():
        _warn_of("lats-demo", run, f"{name} run: ")
