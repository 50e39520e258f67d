"""The examples: each is run in short, and what it prints and arrives at is checked."""

import pkgutil
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso

from lats_optax import examples
from lats_optax.examples import char_transformer, equinox_mlp, lasso_path, prune_llm

PROGRAMS = {
    "char_transformer": char_transformer,
    "equinox_mlp": equinox_mlp,
    "lasso_path": lasso_path,
    "prune_llm": prune_llm,
}
# The option of each that says how long it takes.
LENGTHS = dict.fromkeys(PROGRAMS, "--steps") | {"prune_llm": "--windows"}
COMMAND = "python -m lats_optax.examples."


def test_every_example_is_listed_with_its_command():
    modules = {module.name for module in pkgutil.iter_modules(examples.__path__)}
    assert modules - {"__main__", "options", "llm"} == set(PROGRAMS)
    assert set(re.findall(rf"{re.escape(COMMAND)}(\w+)", examples.__doc__)) == set(PROGRAMS)
    for name, program in PROGRAMS.items():
        assert f"    {COMMAND}{name}\n" in program.__doc__


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        *(
            (name, [option, "0"], f"{option}: '0' is not allowed")
            for name, option in LENGTHS.items()
        ),
        *((name, ["--stepz", "9"], "unrecognized arguments: --stepz 9") for name in PROGRAMS),
        ("equinox_mlp", ["--steps", "many"], "--steps: 'many' is not allowed"),
        ("equinox_mlp", ["--sparsity", "1"], "--sparsity: '1' is not allowed; allowed are numbers"),
        ("equinox_mlp", ["--sparsity", "nan"], "--sparsity: 'nan' is not allowed"),
        ("char_transformer", ["--sparsity", "90%"], "--sparsity: '90%' is not allowed"),
        (
            "lasso_path",
            ["--steps", "1", "--plot", "missing/a.png"],
            "--plot: there is no directory",
        ),
        (
            "lasso_path",
            ["--steps", "1", "--plot", "a.doc"],
            "--plot: the plot is to be 'a.doc'",
        ),
    ],
)
def test_wrong_options_are_answered_in_one_line(name, args, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        PROGRAMS[name].main(args)
    errors = capsys.readouterr().err
    assert errors.startswith(f"{COMMAND}{name}: error: ")
    assert said in errors
    assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_lasso_path(capsys, tmp_path):
    plot = tmp_path / "path.png"
    paths = lasso_path.main(["--plot", str(plot)])
    x, y = load_diabetes(return_X_y=True)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    # Not the function that the example compares with: one problem at a time, from zero.
    lasso = [Lasso(alpha=a, tol=1e-15, max_iter=10**6).fit(x, y) for a in lasso_path.ALPHAS]
    expected = np.column_stack([model.coef_ for model in lasso])
    assert set(np.count_nonzero(expected, axis=0)) >= {2, 5, 8, 10}
    for w in (paths.sklearn, *paths.ours.values()):
        np.testing.assert_array_equal(w != 0, expected != 0)
        np.testing.assert_allclose(w, expected, rtol=0, atol=1e-8)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(lasso_path.ALPHAS) + 2
    assert printed[-2:] == [
        "the same zeros as scikit-learn's: everywhere",
        f"plot: {plot}",
    ]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_lasso_path_says_where_it_has_not_arrived(capsys):
    lasso_path.main(["--steps", "10"])
    assert "NOT everywhere" in capsys.readouterr().out


@pytest.mark.slow
def test_char_transformer(capsys):
    results = char_transformer.main(["--steps", "40", "--sparsity", "0.6"])
    printed = capsys.readouterr().out
    for name, result in results.items():
        assert np.mean(result.losses[-5:]) < np.mean(result.losses[:5]) - 1
        # Better than characters at random, and as good as on the text that it was trained on.
        assert result.held_out < np.log2(103)
        assert result.held_out == pytest.approx(np.mean(result.losses[-5:]), abs=0.5)
        assert result.line.startswith("The ")
        assert f"{name}: step 40 of 40" in printed
        assert f"{result.held_out:.3f} bits per character" in printed
    # Two blocks of 4 WIDTH² for attention and 8 WIDTH² for the network, and the head.
    size = 2 * 12 * 128**2 + 128 * 103
    sparsity = results["sparse"].sparsity
    assert (sparsity.size, sparsity.zeros) == (size, round(0.6 * size))
    assert results["dense"].sparsity.zeros == 0
    assert str(sparsity) in printed
    tables = {layer.path for layer in sparsity.layers if layer.path.startswith("embed")}
    assert tables == {"embed_character/embedding", "embed_place/embedding"}


@pytest.mark.slow
def test_char_transformer_sees_no_character_that_it_predicts():
    model = char_transformer.Transformer(7, rngs=nnx.Rngs(0))
    text = np.arange(20)[None] % 7
    changed = text.copy()
    changed[0, 12] = 0
    far = jnp.max(jnp.abs(model(text) - model(changed)), axis=-1)[0]
    np.testing.assert_array_equal(far[:12], 0)
    assert jnp.all(far[12:] > 0)


def test_char_transformer_holds_whole_topics_out():
    alphabet, training, held_out = char_transformer.read_topics()
    topics = char_transformer.topics
    decode = "".join(alphabet[i] for i in np.concatenate([training, held_out]))
    assert sorted(decode) == sorted("".join(topics.values()))
    assert 0.03 < len(held_out) / len(decode) < 0.2
    assert decode.endswith(topics[sorted(topics)[70]])


@pytest.mark.slow
def test_equinox_mlp(capsys):
    results = equinox_mlp.main(["--steps", "300", "--sparsity", "0.9"])
    size = 64 * 128 + 128 * 128 + 128 * 10
    for zeros, result in ((0, results["dense"]), (round(0.9 * size), results["sparse"])):
        weights = [layer.weight for layer in result.model.layers]
        assert sum(w.size for w in weights) == size
        assert sum(int(jnp.sum(w == 0)) for w in weights) == zeros
        assert result.accuracy > 0.93
    printed = capsys.readouterr().out
    assert f"{round(0.9 * size):,} of {size:,} weights are zero" in printed
    assert "layers/1/weight" in printed
