"""A language model over characters, dense and 90 % sparse: a small Transformer in `flax.nnx`.

    python -m lats_optax.examples.char_transformer

It reads the Python documentation that ships with the interpreter (`pydoc_data.topics`, 465,000
characters in Python 3.11); every tenth topic is held out. The same model, weights and
batches twice: `optax.adamw`, and `optax.adamw` with one more line. The tables that characters and
places are looked up in (24,000 weights) stay dense and are not counted; all other matrices, the
output layer among them, are pruned together. Four minutes on two cores, one of which was taken:

    dense    0.00% zeros  2.232 bits per character
    sparse  90.00% zeros  2.394 bits per character
"""

from pydoc_data.topics import topics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.typing import ArrayLike
from numpy.lib.stride_tricks import sliding_window_view

import lats_optax
from lats_optax.examples.options import Parser, count, fraction

LAYERS, WIDTH, HEADS, CONTEXT = 2, 128, 4, 64
BATCH, LEARNING_RATE = 16, 3e-3
PRUNED = lats_optax.select(exclude="^embed_")


class Result(NamedTuple):
    """What one training run came to: losses in bits per character."""

    losses: np.ndarray
    held_out: float
    sparsity: lats_optax.SparsityReport
    line: str


def main(args: list[str] | None = None) -> dict[str, Result]:
    """Train a dense and a sparse model from the same weights on the same batches."""
    parser = Parser("char_transformer", __doc__)
    parser.add_argument("--steps", type=count, default=1500, help="training steps of each model")
    parser.add_argument("--sparsity", type=fraction, default=0.9, help="fraction of zeros")
    options = parser.parse_args(args)
    steps = options.steps
    rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 20, steps)
    runs = {
        "dense": optax.adamw(rate),
        "sparse": optax.chain(
            optax.adamw(rate),
            lats_optax.soft_threshold(
                lats_optax.target_sparsity(options.sparsity, rate, steps), mask=PRUNED
            ),
        ),
    }
    results = {name: run(name, tx, steps) for name, tx in runs.items()}
    print(f"\n{results['sparse'].sparsity}\n")
    for name, result in results.items():
        zeros = f"{result.sparsity.sparsity:.2%} zeros"
        print(f"{name:<6}  {zeros:>12}  {result.held_out:.3f} bits per character  {result.line!r}")
    return results


def run(name: str, tx: optax.GradientTransformation, steps: int) -> Result:
    """Train one model, and look at what came of it."""
    alphabet, training, held_out = read_topics()
    model = Transformer(len(alphabet), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng = np.random.default_rng(0)
    windows = sliding_window_view(training, CONTEXT + 1)
    losses = []
    for step in range(1, steps + 1):
        losses.append(train_step(model, optimizer, windows[rng.integers(len(windows), size=BATCH)]))
        if step % max(steps // 5, 1) == 0:
            print(f"{name}: step {step} of {steps}, {losses[-1]:.2f} bits per character")
    return Result(
        np.array(losses),
        # Each character is predicted once, from the 1 to CONTEXT characters before it.
        float(nnx.jit(bits)(model, sliding_window_view(held_out, CONTEXT + 1)[::CONTEXT])),
        lats_optax.sparsity(nnx.state(model, nnx.Param), PRUNED),
        sample_line(model, alphabet, "The "),
    )


def read_topics() -> tuple[str, np.ndarray, np.ndarray]:
    """The alphabet, and texts as int32 indices into it: to train on, and every tenth topic."""
    alphabet = "".join(sorted(set("".join(topics.values()))))
    index = {character: i for i, character in enumerate(alphabet)}
    encoded = [np.array([index[c] for c in topics[name]], np.int32) for name in sorted(topics)]
    training = [text for i, text in enumerate(encoded) if i % 10]
    return alphabet, np.concatenate(training), np.concatenate(encoded[::10])


class Block(nnx.Module):
    """Attention and a two-layer network, each added to what comes in."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm_attention = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.norm_network = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Shapes: (batch, time, WIDTH) in and out."""
        qkv = self.qkv(self.norm_attention(x)).reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        mixed = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), is_causal=True)
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.norm_network(x))))


class Transformer(nnx.Module):
    """Logits of the next character at every place: (batch, time) -> (batch, time, characters)."""

    def __init__(self, characters: int, *, rngs: nnx.Rngs) -> None:
        small = nnx.initializers.normal(0.02)
        self.embed_character = nnx.Embed(characters, WIDTH, embedding_init=small, rngs=rngs)
        self.embed_place = nnx.Embed(CONTEXT, WIDTH, embedding_init=small, rngs=rngs)
        self.blocks = nnx.List([Block(rngs=rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, characters, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        """Read up to CONTEXT characters."""
        x = self.embed_character(text) + self.embed_place(jnp.arange(text.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def bits(model: Transformer, windows: ArrayLike) -> jax.Array:
    """Bits per character of (batch, CONTEXT + 1) characters, all but the first being predicted."""
    windows = jnp.asarray(windows)
    logits = model(windows[:, :-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    return jnp.mean(nats) / jnp.log(2)


@nnx.jit
def train_step(model: Transformer, optimizer: nnx.Optimizer, windows: ArrayLike) -> jax.Array:
    """One step of the optimizer; the loss before it."""
    loss, gradients = nnx.value_and_grad(bits)(model, windows)
    optimizer.update(model, gradients)
    return loss


def sample_line(model: Transformer, alphabet: str, start: str) -> str:
    """What the model goes on to write, up to the end of the line or of its context."""

    @nnx.jit
    def write(model: Transformer, text: jax.Array) -> jax.Array:
        def write_one(place: jax.Array, text: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(0), place)
            logits = model(text[None])[0, place - 1]  # which depend on nothing at a later place
            return text.at[place].set(jax.random.categorical(key, logits / 0.7))

        return lax.fori_loop(len(start), CONTEXT, write_one, text)

    given = jnp.array([alphabet.index(c) for c in start.ljust(CONTEXT)])
    return "".join(alphabet[i] for i in write(model, given).tolist()).partition("\n")[0]


if __name__ == "__main__":
    main()
