"""Files: what stands in the way of writing one, and what one may ask for that is read."""

import json
import os
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lats_optax import epoch_lats_threshold, load_sparse, models, save_sparse
from lats_optax.files.atomic import replacing
from lats_optax.torch import weights
from lats_optax.training.export import load_model, variables_of
from tests.misuse import Case, gives, raises, warns
from tests.signed import write_signed


def in_a_directory(act):
    def run():
        with tempfile.TemporaryDirectory() as directory:
            return act(Path(directory))

    return run


def links_at_guessed_names(directory):
    """What a link points to, after a save beside it, under every name of the process's id."""
    victim, path = directory / "victim", directory / "model"
    victim.write_text("mine")
    for name in (f".model.{os.getpid()}", ".model.unfinished", ".model.tmp", "model.tmp"):
        (directory / name).symlink_to(victim)
    save_sparse(path, {"a": np.ones(3)})
    return victim.read_text() == "mine" and load_sparse(path)["a"].sum() == 3


def a_link_at_the_right_name(directory):
    """The name is known only while the file is written: then it is one of its own."""
    with replacing(directory / "model") as unfinished:
        return not unfinished.is_symlink() and unfinished.stat().st_size == 0


def threads_on_one_path(directory):
    path, failures, sizes = directory / "model", [], set()

    def write(number):
        try:
            for _ in range(25):
                save_sparse(path, {"a": np.full(1000 + number, number + 1)})
                sizes.add(load_sparse(path)["a"].size)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return not failures and sizes <= {*range(1000, 1006)} and os.listdir(directory) == ["model"]


def leftovers(directory):
    """Names there after a save, of a process that was killed long ago, and of others."""
    old = ".model.0123456789abcdef.unfinished"
    others = [
        ".model.fedcba9876543210.unfinished",  # new: somebody may be writing it
        ".model.0123456789abcdef",
        ".model2.0123456789abcdef.unfinished",
    ]
    for name in (old, *others):
        (directory / name).write_text("")
        if name != others[0]:
            os.utime(directory / name, (0, 0))
    save_sparse(directory / "model", {"a": np.ones(3)})
    return {*os.listdir(directory)} == {"model", *others}


def zeros(directory, count, **options):
    """A file of zeros alone, of few bytes."""
    path = directory / "zeros.safetensors"
    save_sparse(path, {"kernel": np.zeros(count, np.float32)})
    return load_sparse(path, **options)["kernel"].size


def huge(directory):
    """4 MB that ask for 8 GB: written by hand, for no test should make that array."""
    gaps, path = np.full(4_200_000, 255, np.uint8), directory / "huge.safetensors"
    stored = {"params:gaps": gaps, "params:values": np.zeros(0, np.float64)}
    layout = {"version": 1, "tree": {"array": "gaps", "shape": [gaps.size * 255]}}
    write_signed(path, stored, layout)
    return load_sparse(path)


def nested(directory):
    tree = "null"
    for _ in range(3000):
        tree = f'{{"list":[{tree}]}}'
    write_signed(directory / "nested", {}, f'{{"version":1,"tree":{tree}}}')
    return load_sparse(directory / "nested")


def images(directory, **options):
    model = models.create("digits-cnn", num_classes=10, width=0.25)
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), variables_of(model, (8, 8, 1)))
    path = directory / "model.safetensors"
    texts = {"model": json.dumps(models.describe(model)), "image_shape": "[16384, 16384, 1]"}
    save_sparse(path, variables, texts)
    return load_model(path, **options).image_shape


def names(tree, metadata=None, name="model"):
    return in_a_directory(lambda directory: save_sparse(directory / name, tree, metadata))


def latent(of=None, **options):
    """The stem's largest weight, of a checkpoint of the published code in which all are 1."""
    model = models.create("resnet20", num_classes=10)
    ones = jax.tree.map(
        lambda leaf: np.ones(leaf.shape, leaf.dtype), variables_of(model, (8, 8, 3))
    )
    checkpoint = {"state_dict": weights.variables_to_torch(ones, model)}
    if of is not None:
        checkpoint["epoch"] = of
    read = weights.variables_from_torch(checkpoint, model, **options)
    return float(read["params"]["stem"]["kernel"].max())


def is_at(epoch):
    """Whether that weight is what the threshold of an epoch leaves."""
    return lambda weight: abs(weight - (1 - float(BY_EPOCH(epoch)))) < 1e-6


ONE = np.ones(1)
BY_EPOCH = epoch_lats_threshold(100, 1, final=0.5)
CASES = [
    Case(
        "a link where a temporary file may be", in_a_directory(links_at_guessed_names), gives(bool)
    ),
    Case("a temporary file of its own", in_a_directory(a_link_at_the_right_name), gives(bool)),
    Case("threads that write to one path", in_a_directory(threads_on_one_path), gives(bool)),
    Case("what a killed process left", in_a_directory(leftovers), gives(bool)),
    Case(
        "a file of 4 MB that asks for 8 GB",
        in_a_directory(huge),
        raises(
            ValueError,
            r"huge\.safetensors has 4,2..,... bytes and asks for arrays of 8,568,000,000; "
            r"allowed are 1,073,741,824, or, .* max_bytes=8568000000",
        ),
    ),
    Case(
        "arrays beyond the limit",
        in_a_directory(lambda d: zeros(d, 1000, max_bytes=3999)),
        raises(ValueError, r"asks for arrays of 4,000; allowed are 3,999, or,"),
    ),
    Case(
        "arrays at the limit",
        in_a_directory(lambda d: zeros(d, 1000, max_bytes=4000)),
        gives(lambda size: size == 1000),
    ),
    Case(
        "a limit that is no number",
        in_a_directory(lambda d: zeros(d, 10, max_bytes="1 GB")),
        raises(ValueError, "^max_bytes: '1 GB' is not allowed"),
    ),
    Case("lists within lists", in_a_directory(nested), raises(ValueError, "nested is damaged: ")),
    Case(
        "a model file that asks for huge images",
        in_a_directory(images),
        raises(
            ValueError,
            r"model\.safetensors: .* image_shape is \[16384, 16384, 1\], "
            r"268,435,456 numbers; allowed are 16,777,216, or, .* max_image_size=268435456",
        ),
    ),
    Case(
        "huge images that are wanted",
        in_a_directory(lambda d: images(d, max_image_size=2**28)),
        gives(lambda shape: shape == (16384, 16384, 1)),
    ),
    Case(
        "half a surrogate pair in a name",
        names({"a": {"b\udc80": ONE}}),
        raises(ValueError, r"^params: the key 'b\\udc80' of a is not allowed; allowed is text"),
    ),
    Case(
        "half a surrogate pair in the name of metadata",
        names({}, {"a\ud800": ""}),
        raises(ValueError, r"^metadata: the key 'a\\ud800' is not allowed"),
    ),
    Case(
        "half a surrogate pair in metadata",
        names({}, {"note": "\ud800"}),
        raises(ValueError, r"^metadata: '\\ud800' at 'note' is not allowed"),
    ),
    Case(
        "half a surrogate pair in the name of a file",
        names({"a": ONE}, name="x\ud800"),
        raises(ValueError, r"^path: '.*x\\ud800' is not allowed; allowed are names"),
    ),
    Case(
        "the last threshold for a checkpoint of an earlier epoch",
        lambda: latent(73, threshold=0.5),
        warns(
            r"^threshold: 0\.5 is taken, and the checkpoint is of epoch 73; .* epoch=73$",
            lambda weight: weight == 0.5,
        ),
    ),
    Case(
        "a threshold by the epoch",
        lambda: latent(73, threshold=BY_EPOCH),
        gives(is_at(73)),
    ),
    Case(
        "a threshold by an epoch that is given",
        lambda: latent(73, threshold=BY_EPOCH, epoch=74),
        gives(is_at(74)),
    ),
    Case(
        "a threshold by an epoch that nobody knows",
        lambda: latent(threshold=BY_EPOCH),
        raises(
            ValueError,
            "^epoch is None; allowed: an integer of 0 or more, since the state dict does not",
        ),
    ),
    Case(
        "a threshold by an epoch that its schedule has not",
        lambda: latent(120, threshold=BY_EPOCH),
        raises(ValueError, "^epoch is 120; allowed: 0 to 100, the steps of the"),
    ),
    Case(
        "a threshold of an epoch that is confirmed",
        lambda: latent(100, threshold=0.5, epoch=100),
        gives(lambda weight: weight == 0.5),
    ),
    Case(
        "a threshold of another epoch than the checkpoint's",
        lambda: latent(73, threshold=0.5, epoch=100),
        warns("the checkpoint is of epoch 73"),
    ),
    Case(
        "an epoch that is none",
        lambda: latent(threshold=0.5, epoch=-1),
        raises(ValueError, "^epoch is -1; allowed: None, or"),
    ),
    Case(
        "a schedule that gives no threshold",
        lambda: latent(3, threshold=lambda epoch: -epoch),
        raises(ValueError, "^threshold at epoch 3: -3 is not allowed"),
    ),
]
