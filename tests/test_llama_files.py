"""Language models in and out of files: names, bits, and one readable error for each wrong file."""

import json
import sys
from functools import partial

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lats_optax.models import Llama
from lats_optax.torch import gguf as gguf_files
from lats_optax.torch import hugging_face, tokenizer
from tests import matrix, tiny_llama

each_config = pytest.mark.parametrize("name", tiny_llama.CONFIGS)
GROUPED = tiny_llama.CONFIGS["grouped"]
Q = gguf.GGMLQuantizationType


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()


def message_of(load, path):
    """The error of reading a path: one line, which names it."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    assert len(text) < 700
    return text


# --- Hugging Face ---------------------------------------------------------------------------------

# The names and shapes that SmolLM2-135M has there.
SMOLLM2 = {
    "model.embed_tokens.weight": (49152, 576),
    "model.layers.29.input_layernorm.weight": (576,),
    "model.layers.29.mlp.down_proj.weight": (576, 1536),
    "model.layers.29.mlp.gate_proj.weight": (1536, 576),
    "model.layers.29.mlp.up_proj.weight": (1536, 576),
    "model.layers.29.post_attention_layernorm.weight": (576,),
    "model.layers.29.self_attn.k_proj.weight": (192, 576),
    "model.layers.29.self_attn.o_proj.weight": (576, 576),
    "model.layers.29.self_attn.q_proj.weight": (576, 576),
    "model.layers.29.self_attn.v_proj.weight": (192, 576),
    "model.norm.weight": (576,),
}
SMOLLM2_JSON = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}


def test_names_and_shapes_are_hugging_faces():
    config = hugging_face.config_from_json(SMOLLM2_JSON)
    shapes = hugging_face.llama_weights.shapes(config)
    assert len(shapes) == 272
    assert {name: shapes[name] for name in SMOLLM2} == SMOLLM2
    assert sum(map(np.prod, shapes.values())) == 134_515_008


def test_a_config_of_transformers_5_is_the_same():
    flat = {k: v for k, v in SMOLLM2_JSON.items() if k not in ("rope_theta", "rope_scaling")}
    nested = {**flat, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}
    assert hugging_face.config_from_json(nested) == hugging_face.config_from_json(SMOLLM2_JSON)


def test_sizes_that_a_config_leaves_out():
    bare = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    found = hugging_face.config_from_json({**bare, "model_type": "llama", "num_attention_heads": 4})
    assert (found.head_dim, found.num_key_value_heads, found.rope_theta) == (8, 4, 10_000)
    assert (found.rms_norm_eps, found.tie_word_embeddings) == (1e-6, False)


def save_tiny(directory, config=GROUPED, **options):
    params = hugging_face.params_from_hugging_face(tiny_llama.draw(config), config)
    hugging_face.save(directory, params, config, **options)
    return params


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000, 1])
@each_config
def test_files_hold_what_was_saved(tmp_path, name, max_shard_bytes):
    config = tiny_llama.CONFIGS[name]
    tensors = tiny_llama.draw(config)
    params = save_tiny(tmp_path, config, max_shard_bytes=max_shard_bytes)
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        shard = safetensors.numpy.load_file(file)
        assert len(shard) == 1 or sum(a.nbytes for a in shard.values()) <= max_shard_bytes
        found |= shard
    assert_same(found, tensors)
    loaded_config, loaded = hugging_face.load(tmp_path)
    assert loaded_config == config
    assert_same(loaded, params)


def test_an_index_is_hugging_faces(tmp_path):
    save_tiny(tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    tensors = tiny_llama.draw(GROUPED)
    assert index["metadata"] == {"total_size": sum(a.nbytes for a in tensors.values())}
    assert list(index["weight_map"]) == list(tensors)
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05}-of-00006.safetensors" for i in range(1, 7)]
    assert files == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "llama"
    assert saved["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("first", [10**9, 20_000])
def test_a_checkpoint_replaces_one_of_the_other_form(tmp_path, first):
    save_tiny(tmp_path, max_shard_bytes=first)
    params = jax.tree.map(lambda leaf: leaf + 1, save_tiny(tmp_path, max_shard_bytes=first))
    hugging_face.save(tmp_path, params, GROUPED, max_shard_bytes=10**9 + 20_000 - first)
    assert_same(hugging_face.load(tmp_path)[1], params)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_sixteen_bits_become_float32_and_are_written_as_they_are(tmp_path, dtype):
    tensors = {name: array.astype(dtype) for name, array in tiny_llama.draw(GROUPED).items()}
    params = hugging_face.params_from_hugging_face(tensors, GROUPED)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    short = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    hugging_face.save(tmp_path, short, GROUPED)
    assert_same(safetensors.numpy.load_file(tmp_path / "model.safetensors"), tensors)
    assert_same(hugging_face.load(tmp_path)[1], params)


def test_what_a_state_dict_may_have_besides():
    tensors = tiny_llama.draw(GROUPED)
    besides = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4),
    }
    read = partial(hugging_face.params_from_hugging_face, config=GROUPED)
    assert_same(read({**tensors, **besides}), read(tensors))
    with pytest.raises(ValueError, match=r"lm_head.weight is unknown, \(97, 32\)"):
        read({**tensors, "lm_head.weight": besides["lm_head.weight"] + 1})


# --- wrong directories ----------------------------------------------------------------------------


def change_config(**changes):
    def change(directory):
        path = directory / "config.json"
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))

    return change


def change_tensors(changes):
    def change(directory):
        for path in directory.glob("*.safetensors"):
            tensors = {**safetensors.numpy.load_file(path), **changes}
            kept = {name: array for name, array in tensors.items() if array is not None}
            safetensors.numpy.save_file(kept, path)

    return change


def change_index(**changes):
    def change(directory):
        path = directory / "model.safetensors.index.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps({"weight_map": {**values["weight_map"], **changes}}))

    return change


def write(name, text):
    return lambda directory: (directory / name).write_text(text)


def remove(name):
    return lambda directory: (directory / name).unlink()


def truncate(name, part):
    def change(directory):
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[: int(len(data) * part)])

    return change


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
SHARD = "model-00002-of-00006.safetensors"
WRONG = [
    (remove("config.json"), "there is no file"),
    (write("config.json", "{"), "is damaged or not JSON"),
    (write("config.json", "[1]"), "holds a list; allowed: an object"),
    (change_config(model_type="gpt2"), "model_type is 'gpt2'; allowed: 'llama'"),
    (change_config(model_type=...), "model_type is None; allowed: 'llama'"),
    (change_config(hidden_act="gelu"), "hidden_act is 'gelu'; allowed: 'silu'"),
    (change_config(attention_bias=True), "attention_bias is True; allowed: False"),
    (change_config(quantization_config={"bits": 4}), "quantization_config is {'bits': 4}"),
    (change_config(rope_scaling={"rope_type": "llama3"}), "rope_type is 'llama3'; allowed: 'def"),
    (change_config(rope_scaling={"type": "linear"}), "rope_type is 'linear'; allowed: 'default'"),
    (change_config(rope_parameters=[1]), "rope_parameters is [1]; allowed: an object"),
    (change_config(vocab_size=...), "vocab_size is None; allowed: an integer"),
    (change_config(hidden_size="32"), "hidden_size is '32'; allowed: an integer"),
    (change_config(head_dim=16), "q_proj.weight is (32, 32), wanted (64, 32)"),
    (change_config(num_hidden_layers=3), "model.layers.2.input_layernorm.weight is missing"),
    (change_config(num_hidden_layers=10**12), "and there are 20 tensors in all"),
    (change_config(vocab_size=96), "embed_tokens.weight is (97, 32), wanted (96, 32)"),
    (remove("model.safetensors"), "there is neither model.safetensors nor"),
    (truncate("model.safetensors", 0.9), "is damaged or not a safetensors file"),
    (truncate("model.safetensors", 0), "is damaged or not a safetensors file"),
    (write("model.safetensors", "text " * 50), "is damaged or not a safetensors file"),
    (change_tensors({NORM: None}), f"{NORM} is missing, wanted (32,)"),
    (change_tensors({UP: np.ones((32, 64), np.float32)}), f"{UP} is (32, 64), wanted (64, 32)"),
    (change_tensors({UP: np.ones((64, 32), np.int8)}), f"{UP} is int8, wanted float16, bfl"),
    (change_tensors({"x": np.ones(1)}), "x is unknown, (1,)"),
    (change_tensors(dict.fromkeys(tiny_llama.draw(GROUPED))), "and there are 0 tensors in all"),
]
WRONG_SHARDS = [
    (remove(SHARD), f"there is no file {{path}}/{SHARD}"),
    (truncate(SHARD, 0.5), f"{SHARD} is damaged or not a safetensors file"),
    (write("model.safetensors.index.json", "{"), "is damaged or not JSON"),
    (write("model.safetensors.index.json", "{}"), "weight_map is not an object"),
    (change_index(**{NORM: f"../{SHARD}"}), "weight_map is not an object from tensors to files"),
    (change_index(**{NORM: 3}), "weight_map is not an object from tensors to files"),
    (change_index(**{UP: SHARD.replace("2-", "1-")}), f"{UP} is missing in model-00001"),
    (change_index(x="x.bin"), "suffix of"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[text[:40] for _, text in WRONG])
def test_wrong_directories(tmp_path, change, message):
    save_tiny(tmp_path)
    change(tmp_path)
    assert message in message_of(hugging_face.load, tmp_path)


@pytest.mark.parametrize(("change", "message"), WRONG_SHARDS, ids=[t[:40] for _, t in WRONG_SHARDS])
def test_wrong_shards(tmp_path, change, message):
    save_tiny(tmp_path, max_shard_bytes=20_000)
    change(tmp_path)
    assert message.format(path=tmp_path) in message_of(hugging_face.load, tmp_path)


def test_what_cannot_be_saved(tmp_path):
    params = save_tiny(tmp_path)
    with pytest.raises(ValueError, match="max_shard_bytes is 0; allowed: 1 or more"):
        hugging_face.save(tmp_path, params, GROUPED, max_shard_bytes=0)
    with pytest.raises(ValueError, match="layers_9/x is unknown, "):
        hugging_face.save(tmp_path, {**params, "layers_9": {"x": np.ones(1)}}, GROUPED)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is int64, wanted float16"):
        hugging_face.save(tmp_path, {**params, "norm": {"scale": np.ones(32, int)}}, GROUPED)
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        hugging_face.save(tmp_path / "a" / "b", params, GROUPED)
    message_of(hugging_face.load, tmp_path / "nowhere")


# --- GGUF -----------------------------------------------------------------------------------------


def gguf_tensors(config, seed=0):
    """Tensors by llama.cpp's names, in its order of rows."""
    tensors = tiny_llama.draw(config, seed)
    return {theirs: tensors[ours] for ours, theirs in tiny_llama.names(config)}


KINDS = [
    *((name, Q.F32) for name in tiny_llama.CONFIGS),
    *(("grouped", kind) for kind in (Q.F16, Q.BF16, Q.Q8_0, Q.Q4_1)),
]


@pytest.mark.parametrize(
    ("name", "kind"), matrix.fast(KINDS, 1), ids=[f"{n}-{k.name}" for n, k in KINDS]
)
def test_logits_are_those_of_the_file(tmp_path, name, kind):
    """The file's rows, their neighbors turned as llama.cpp does, against the parameters."""
    config = tiny_llama.CONFIGS[name]
    path = tmp_path / "tiny.gguf"
    given = gguf_tensors(config)
    kept = tiny_llama.write_gguf(path, tiny_llama.metadata(config), given, kind)
    found_config, params = gguf_files.load(path)
    assert found_config == config
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    tensors = {ours: kept[theirs] for ours, theirs in tiny_llama.names(config)}
    expected = tiny_llama.logits(tensors, config, ids, neighbors=True)
    found = jax.jit(Llama(config).apply)({"params": params}, jnp.array([ids]))[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_model_goes_from_gguf_to_hugging_face(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_llama.write_gguf(path, tiny_llama.metadata(GROUPED), gguf_tensors(GROUPED), Q.Q8_0)
    config, params = gguf_files.load(path)
    hugging_face.save(tmp_path / "out", params, config)
    same, loaded = hugging_face.load(tmp_path / "out")
    assert same == config
    assert_same(loaded, params)


def test_metadata_that_gguf_leaves_out(tmp_path):
    config = tiny_llama.without(
        tiny_llama.CONFIGS["multi-query"], num_key_value_heads=4, rope_theta=10_000.0
    )
    left_out = ("attention.head_count_kv", "attention.key_length", "vocab_size", "rope.freq_base")
    values = {
        **tiny_llama.metadata(config),
        **dict.fromkeys(f"llama.{key}" for key in left_out),
        "tokenizer.ggml.tokens": [str(i) for i in range(config.vocab_size)],
    }
    tiny_llama.write_gguf(tmp_path / "tiny.gguf", values, gguf_tensors(config))
    assert gguf_files.load(tmp_path / "tiny.gguf")[0] == config


HALF = np.ones((16, 32), np.float32)
WRONG_GGUF = [
    ({"general.architecture": "gpt2"}, {}, "general.architecture is 'gpt2'; allowed: 'llama'"),
    ({"llama.rope.scaling.type": "yarn"}, {}, "llama.rope.scaling.type is 'yarn'; allowed: 'none'"),
    ({"llama.rope.dimension_count": 4}, {}, "llama.rope.dimension_count is 4; allowed: 8"),
    ({"llama.block_count": None}, {}, "num_hidden_layers is None; allowed: an integer"),
    ({"llama.block_count": 3}, {}, "blk.2.attn_k.weight is missing, wanted (16, 32)"),
    ({"llama.block_count": 2**31}, {}, "and there are 20 tensors in all"),
    ({"llama.attention.head_count": [4, 4]}, {}, "num_attention_heads is [4, 4]; allowed: an in"),
    ({"llama.attention.head_count": 0}, {}, "num_attention_heads is 0; allowed: an integer"),
    ({"llama.vocab_size": None}, {}, "vocab_size is 0; allowed: an integer"),
    ({"llama.rope.freq_base": -1.0}, {}, "rope_theta is -1.0; allowed: a positive number"),
    ({"llama.rope.freq_base": "x"}, {}, "llama.rope.freq_base is 'x'; allowed: a number"),
    ({}, {"output_norm.weight": None}, "output_norm.weight is missing, wanted (32,)"),
    ({}, {"blk.1.attn_q.weight": HALF}, "blk.1.attn_q.weight is (16, 32), wanted (32, 32)"),
    ({}, {"blk.1.attn_q.bias": HALF[0]}, "blk.1.attn_q.bias is unknown, (32,)"),
    (
        {},
        {"blk.1.attn_norm.weight": HALF[0] * np.inf},
        "blk.1.attn_norm.weight has entries that are not",
    ),
    ({}, {"a\nb": HALF[0]}, r"a\nb is unknown, (32,)"),
    ({}, {"rope_freqs.weight": HALF[0]}, "rope_freqs.weight is unknown, (32,)"),
]


@pytest.mark.parametrize(
    ("values", "tensors", "message"), WRONG_GGUF, ids=[text[:40] for *_, text in WRONG_GGUF]
)
def test_wrong_gguf_files(tmp_path, values, tensors, message):
    path = tmp_path / "tiny.gguf"
    tensors = {**gguf_tensors(GROUPED), **tensors}
    kept = {name: array for name, array in tensors.items() if array is not None}
    tiny_llama.write_gguf(path, {**tiny_llama.metadata(GROUPED), **values}, kept)
    assert message in message_of(gguf_files.load, path)


@pytest.mark.slow
def test_truncated_gguf_files(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_llama.write_gguf(path, {**tiny_llama.metadata(GROUPED), **TOKENS}, gguf_tensors(GROUPED))
    data = path.read_bytes()
    for cut in [*range(0, 4000, 61), *range(4000, len(data), 9973), len(data) - 100]:
        path.write_bytes(data[:cut])
        assert "is truncated, damaged or not GGUF" in message_of(gguf_files.load, path), cut
    path.write_bytes(b"GGML" + data[4:])
    assert "is truncated, damaged or not GGUF" in message_of(gguf_files.load, path)
    assert "there is no file" in message_of(gguf_files.load, tmp_path / "nowhere.gguf")


def test_weights_that_gguf_cannot_dequantize(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_llama.write_gguf(path, tiny_llama.metadata(GROUPED), gguf_tensors(GROUPED), Q.BF16)
    name = b"blk.0.attn_q.weight"
    data = bytearray(path.read_bytes())
    at = data.index(name) + len(name) + 4 + 2 * 8  # behind the number of axes and their lengths
    data[at : at + 4] = np.array(Q.I16, "<u4").tobytes()  # of the same size
    path.write_bytes(data)
    text = message_of(gguf_files.load, path)
    assert "blk.0.attn_q.weight: " in text
    assert "which gguf cannot dequantize" in text


# --- tokenizers -----------------------------------------------------------------------------------

# Two tokens apart from the text, the letters, and three merges in their order: "lo" before "ow".
_LETTERS = [*"abcdelorw123.", "Ġ", "Ċ"]
_TOKENS = ["<end>", "<user>", *_LETTERS, "lo", "low", "er"]
TOKENS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": _TOKENS,
    "tokenizer.ggml.token_type": [3, 4, *[1] * (len(_TOKENS) - 2)],
    "tokenizer.ggml.merges": ["l o", "lo w", "e r"],
}


def load_tokenizer(path, **changes):
    values = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    tiny_llama.write_gguf(path, {"general.architecture": "llama", **TOKENS, **values}, {})
    return tokenizer.load(path)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("low lower", ["low", "Ġ", "low", "er"]),
        ("owl", ["o", "w", "l"]),
        ("low\nlow<end>", ["low", "Ċ", "low", "<end>"]),
        ("a<user>b", ["a", "<user>", "b"]),
        ("", []),
    ],
)
def test_text_becomes_tokens_and_text_again(tmp_path, text, tokens):
    loaded = load_tokenizer(tmp_path / "tiny.gguf")
    ids = loaded.encode(text).ids
    assert ids == [_TOKENS.index(token) for token in tokens]
    assert loaded.decode(ids, skip_special_tokens=False) == text
    assert loaded.decode(ids) == text.replace("<end>", "")


@pytest.mark.parametrize(("pre", "tokens"), [("smollm", ["1", "2"]), ("gpt-2", ["12"])])
def test_digits_stand_alone_where_the_file_says_so(tmp_path, pre, tokens):
    names = [*_TOKENS, "12"]
    changes = {"tokens": names, "token_type": [1] * len(names), "merges": ["1 2"], "pre": pre}
    loaded = load_tokenizer(tmp_path / "tiny.gguf", **changes)
    assert loaded.encode("12").ids == [names.index(token) for token in tokens]


def test_a_first_token_where_the_file_says_so(tmp_path):
    path = tmp_path / "tiny.gguf"
    loaded = load_tokenizer(path, add_bos_token=True, bos_token_id=0)
    assert loaded.encode("a").ids == [0, 2]
    assert load_tokenizer(path, add_bos_token=False, bos_token_id=0).encode("a").ids == [2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model is 'llama'; allowed: 'gpt2'"),
        ({"model": None}, "tokenizer.ggml.model is None; allowed: 'gpt2'"),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe'; allowed: 'gpt-2', 'smollm'"),
        ({"tokens": None}, "there are 0 tokens, 0 different ones and 20 types"),
        ({"tokens": ["a"] * 20}, "there are 20 tokens, 1 different ones and 20 types"),
        ({"token_type": [1]}, "there are 20 tokens, 20 different ones and 1 types"),
        ({"merges": ["x y"]}, "Token `x` out of vocabulary"),
        ({"merges": ["lo"]}, "a merge of tokenizer.ggml.merges is 'lo'; allowed: two tokens"),
        ({"add_bos_token": True, "bos_token_id": 99}, "bos_token_id is 99; allowed: 0 to 19"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_tokenizers(tmp_path, changes, message):
    path = tmp_path / "tiny.gguf"
    assert message in message_of(lambda path: load_tokenizer(path, **changes), path)


# --- packages that are missing --------------------------------------------------------------------


@pytest.mark.parametrize("package", ["gguf", "tokenizers"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    path = tmp_path / "tiny.gguf"
    load_tokenizer(path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError) as caught:
        tokenizer.load(path)
    assert f"pip install {package}" in str(caught.value)
    assert "\n" not in str(caught.value)
