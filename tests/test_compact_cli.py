"""lats-compact: from a model file to a smaller one, on the command line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lats_optax import cli, models
from lats_optax.training.export import load_model, save_model

SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's directory, with the file of a network of which half of an inner layer is dead."""
    run = tmp_path_factory.mktemp("run")
    model = models.create("digits-cnn", num_classes=10, width=0.25)
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, *SHAPE)), train=False))
    variables = jax.tree.map(np.array, init(jax.random.key(0, impl="rbg")))
    variables["params"]["block1"]["conv1"]["kernel"][..., ::2] = 0
    variables["params"]["block1"]["norm1"]["bias"][:] = 0.3  # dead, but not silent
    save_model(run / "model.safetensors", model, variables, SHAPE, {"data": "digits"})
    return run


@pytest.mark.slow
def test_a_smaller_file_with_the_same_outputs(saved, tmp_path, capsys):
    out = tmp_path / "small.safetensors"
    assert cli.compact([str(saved), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    before, after = load_model(saved / "model.safetensors"), load_model(out)
    kernels = [
        file.variables["params"]["block1"]["conv1"]["kernel"].shape for file in (before, after)
    ]
    # Half of 14, and one that stands for what is constant: a padded layer reads it.
    assert [shape[-1] for shape in kernels] == [14, 8]
    images = np.random.default_rng(1).normal(size=(4, *SHAPE)).astype(np.float32)
    logits = [file.model.apply(file.variables, images, train=False) for file in (before, after)]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-6)
    assert after.metadata == {"data": "digits"}
    for words in ("block1/conv1", "14 → 8", "MACs", str(out)):
        assert words in printed
    assert out.stat().st_size < (saved / "model.safetensors").stat().st_size


def test_a_mistake_is_one_line(saved, tmp_path, capsys):
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"mine")
    dead = load_model(saved / "model.safetensors")
    dead.variables["params"]["block2"]["conv1"]["kernel"][:] = 0
    save_model(tmp_path / "dead.safetensors", *dead)
    for args, words in (
        ([str(tmp_path / "no")], "there is no file"),
        ([str(tmp_path)], "which lats-train writes when a run ends"),
        ([str(there), "--out", str(tmp_path / "x")], "there.safetensors is damaged"),
        ([str(saved), "--out", str(there)], "there.safetensors is there: --overwrite"),
        ([str(saved), "--out", str(tmp_path / "no" / "x")], "no directory"),
        ([str(saved), "--out", str(tmp_path / "x"), "--multiple-of", "0"], "multiple_of is 0"),
        ([str(tmp_path / "dead.safetensors"), "--out", str(tmp_path / "x")], "block2/conv1"),
    ):
        files = sorted(tmp_path.iterdir())
        assert cli.compact(args) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("lats-compact: error: ")
        assert words in err
        assert sorted(tmp_path.iterdir()) == files
    assert there.read_bytes() == b"mine"
