"""The commands, `lats-train` and its siblings: arguments in, a few lines out, no logic."""

import contextlib
import io
import re
import sys
from collections.abc import Sequence

import tyro

from lats_optax.training import loop
from lats_optax.training.config import TrainConfig
from lats_optax.training.presets import PRESETS

_PROGRAM = "lats-train"


def train(args: Sequence[str] | None = None) -> int:
    """`lats-train PRESET [--field value ...]`: trains a model.

    Args:
      args: what follows the command's name; None: what the process was started with.

    Returns:
      The exit code: 0; 1 for a run that failed; 2 for arguments that are not allowed.
    """
    try:
        experiment = loop.build(_parse(args))
    except (ValueError, OSError) as error:
        return _fail(error, code=2)
    try:
        result = loop.fit(experiment)
    except loop.NonFiniteError as error:
        return _fail(error, code=1)
    except KeyboardInterrupt as error:
        return _fail(f"{error or 'interrupted'}; --resume goes on from the last checkpoint", 130)
    if experiment.parallel.is_primary:
        _summarize(result)
    return 0


def _parse(args: Sequence[str] | None) -> TrainConfig:
    """The config that the arguments describe; exits after --help.

    tyro frames its errors over many lines; here they become one.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.extras.overridable_config_cli(
                {name: (preset.description, preset.config) for name, preset in PRESETS.items()},
                prog=_PROGRAM,
                description="Train a model, dense or sparse. Each preset is a run; any field of it "
                f"can be given: {_PROGRAM} PRESET --help lists them.",
                args=args,
            )
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
            message += f"; presets: {section.partition(':')[2].strip()}"
        elif section.startswith(" Perhaps you meant"):
            options = dict.fromkeys(re.findall(r"(?<= )--[\w.-]+\w(?= )", section))
            options.pop("--help", None)
            message += f"; perhaps you meant {' or '.join(options)}"
    return message


def _summarize(result: loop.RunResult) -> None:
    print(result.sparsity)
    print(f"test accuracy {result.test_accuracy:.2%} after {result.seconds:.0f} s")
    print(
        f"metrics       {result.config.workdir}/metrics.jsonl; tensorboard --logdir "
        f"{result.config.workdir}"
    )
    print(f"checkpoint    {result.checkpoint}")


def _fail(error: object, code: int) -> int:
    print(f"{_PROGRAM}: error: {error}", file=sys.stderr)
    return code
