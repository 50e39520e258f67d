"""Small decoders for the tests: weights by Hugging Face's names, the formulas in NumPy, GGUF files.

The formulas are those of the papers, one head and one position at a time, in float64.
"""

import dataclasses
import math

import gguf
import numpy as np

from lats_optax.models import LlamaConfig

# Grouped queries with a tied output; as many keys as queries, heads that are together narrower than
# the model; one key for all.
CONFIGS = {
    "grouped": LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_theta=500.0,
        rms_norm_eps=1e-2,
        tie_word_embeddings=True,
    ),
    "multi-head": LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=6,
    ),
    "multi-query": LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        rope_theta=100.0,
    ),
}
LAYER = (
    *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    *("self_attn.o_proj", "post_attention_layernorm"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
GGUF_LAYER = (
    *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm"),
    *("ffn_gate", "ffn_up", "ffn_down"),
)


def names(config):
    """Hugging Face's names and llama.cpp's, in the order of the files."""
    yield "model.embed_tokens.weight", "token_embd.weight"
    for i in range(config.num_hidden_layers):
        for ours, theirs in zip(LAYER, GGUF_LAYER):
            yield f"model.layers.{i}.{ours}.weight", f"blk.{i}.{theirs}.weight"
    yield "model.norm.weight", "output_norm.weight"
    if not config.tie_word_embeddings:
        yield "lm_head.weight", "output.weight"


def draw(config, seed=0):
    """Float32 tensors by Hugging Face's names."""
    rng = np.random.default_rng(seed)
    width, inner, d = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * d, config.num_key_value_heads * d
    sizes = {
        **dict.fromkeys(("embed_tokens", "lm_head"), (config.vocab_size, width)),
        "q_proj": (queries, width),
        **dict.fromkeys(("k_proj", "v_proj"), (keys, width)),
        "o_proj": (width, queries),
        **dict.fromkeys(("gate_proj", "up_proj"), (inner, width)),
        "down_proj": (width, inner),
    }

    def tensor(name):
        part = name.split(".")[-2]
        if part.endswith("norm"):
            return rng.uniform(0.5, 1.5, width)
        return rng.normal(size=sizes[part]) * 2 / math.sqrt(sizes[part][1])

    return {name: tensor(name).astype(np.float32) for name, _ in names(config)}


def logits(tensors, config, ids, neighbors=False):
    """Logits (length, vocabulary) of one sequence, from tensors by Hugging Face's names.

    Args:
      tensors: (outputs, inputs) each.
      config: the sizes.
      ids: of one sequence.
      neighbors: whether entries 2i and 2i + 1 of a head are turned together, as RoFormer has it and
        llama.cpp; else i and i + d/2, as Hugging Face.
    """
    tensors = {name: np.asarray(array, np.float64) for name, array in tensors.items()}
    heads, d = config.num_attention_heads, config.head_dim
    group = heads // config.num_key_value_heads

    def norm(x, scale):
        return x / math.sqrt(np.mean(x**2) + config.rms_norm_eps) * scale

    def turn(head, position):
        real, imaginary = (head[::2], head[1::2]) if neighbors else (head[: d // 2], head[d // 2 :])
        speeds = np.array([config.rope_theta ** (-2 * i / d) for i in range(d // 2)])
        turned = (real + 1j * imaginary) * np.exp(1j * position * speeds)
        return np.concatenate([turned.real, turned.imag])  # dot products know no order

    stream = [tensors["model.embed_tokens.weight"][token] for token in ids]
    for i in range(config.num_hidden_layers):
        weights = {part: tensors[f"model.layers.{i}.{part}.weight"] for part in LAYER}
        keys, values = [], []
        for position, x in enumerate(stream):
            x = norm(x, weights["input_layernorm"])
            projected = (weights["self_attn.k_proj"] @ x).reshape(-1, d)
            keys.append([turn(head, position) for head in projected])
            values.append((weights["self_attn.v_proj"] @ x).reshape(-1, d))
            queries = (weights["self_attn.q_proj"] @ x).reshape(-1, d)
            mixed = []
            for head in range(heads):
                query = turn(queries[head], position)
                scores = [query @ past[head // group] / math.sqrt(d) for past in keys]
                chances = np.exp(scores - np.max(scores))
                chances /= chances.sum()
                mixed.append(sum(p * v[head // group] for p, v in zip(chances, values)))
            stream[position] = stream[position] + weights["self_attn.o_proj"] @ np.concatenate(
                mixed
            )
        for position, x in enumerate(stream):
            y = norm(x, weights["post_attention_layernorm"])
            gate, up = weights["mlp.gate_proj"] @ y, weights["mlp.up_proj"] @ y
            stream[position] = x + weights["mlp.down_proj"] @ (gate / (1 + np.exp(-gate)) * up)
    output = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return np.array([output @ norm(x, tensors["model.norm.weight"]) for x in stream])


def metadata(config):
    """What a GGUF file says of a decoder."""
    return {
        "general.architecture": "llama",
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_theta),
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }


def write_gguf(path, values, tensors, kind=gguf.GGMLQuantizationType.F32):
    """A GGUF file by gguf's own writer.

    Args:
      path: of the file.
      values: metadata; None leaves one out.
      tensors: by llama.cpp's names.
      kind: what matrices are quantized to; vectors stay float32.

    Returns:
      The tensors as they come back from quantization.
    """
    writer = gguf.GGUFWriter(path, values["general.architecture"])
    adders = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }
    for key, value in values.items():
        if value is not None and key != "general.architecture":
            adders[type(value)](key, value)
    kept = {}
    for name, array in tensors.items():
        of = kind if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        stored = gguf.quants.quantize(array, of)
        writer.add_tensor(name, stored, raw_dtype=of)
        kept[name] = gguf.quants.dequantize(stored, of).copy()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def without(config, **changes):
    """A config with some of its sizes changed."""
    return dataclasses.replace(config, **changes)
