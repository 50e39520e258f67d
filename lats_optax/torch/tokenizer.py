"""Text to token ids and back, by the tokenizer that a GGUF file holds.

Here belongs what its metadata mean to the package tokenizers, which is imported where it is used.
Beside safetensors lies a ``tokenizer.json``, which ``tokenizers.Tokenizer.from_file`` reads.
"""

import os
from typing import Any

from lats_optax.checks.options import check, check_choice
from lats_optax.torch import gguf
from lats_optax.torch.state_dicts import optional_module

# How text is split before pairs are merged: whether each digit stands alone. After that, both split
# as GPT-2 does.
_SINGLE_DIGITS = {"gpt-2": False, "smollm": True}
_CONTROL, _USER_DEFINED = 3, 4


def load(path: str | os.PathLike[str]) -> Any:
    """The byte-level BPE tokenizer of a GGUF file.

    Args:
      path: of the file.

    Returns:
      A ``tokenizers.Tokenizer``: ``encode(text).ids``, ``decode(ids)``.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: gguf or tokenizers is missing.
      ValueError: the file is truncated, damaged or not GGUF; its tokenizer is missing, incomplete
        or of another kind.

    Example::

      tokens = tokenizer.load(path)
      ids = jnp.array([tokens.encode("The capital of France is").ids])
      print(tokens.decode(generate(model, params, ids, new_tokens=40)[0].tolist()))

    Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016);
    Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
    """
    reader = gguf.open_file(path)
    library = optional_module("tokenizers")
    try:
        return _tokenizer(reader, library)
    except Exception as error:  # tokenizers has no type of its own for a vocabulary that is none
        raise ValueError(f"{path}: {error}") from error


def _tokenizer(reader: Any, library: Any) -> Any:
    def value(key: str, default: Any = None) -> Any:
        return gguf.metadata(reader, f"tokenizer.ggml.{key}", default)

    check_choice("tokenizer.ggml.model", value("model"), ["gpt2"])
    check_choice("tokenizer.ggml.pre", value("pre"), _SINGLE_DIGITS)
    tokens, kinds, merges = (value(key, []) for key in ("tokens", "token_type", "merges"))
    if not len(tokens) == len(kinds) == len(set(tokens)) > 0:
        raise ValueError(
            f"there are {len(tokens)} tokens, {len(set(tokens))} different ones and {len(kinds)} "
            "types; allowed: as many of each, and not none."
        )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for merge, pair in zip(merges, pairs):
        check(len(pair) == 2, "a merge of tokenizer.ggml.merges", merge, "two tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=pairs))
    split = [library.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if _SINGLE_DIGITS[value("pre")]:
        split.insert(0, library.pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(split)
    tokenizer.decoder = library.decoders.ByteLevel()
    for kind, add in (
        (_CONTROL, tokenizer.add_special_tokens),
        (_USER_DEFINED, tokenizer.add_tokens),
    ):
        add(
            [
                library.AddedToken(token, special=kind == _CONTROL, normalized=False)
                for token, own in zip(tokens, kinds)
                if own == kind
            ]
        )
    if value("add_bos_token", False):
        bos = value("bos_token_id")
        known = bos in range(len(tokens))
        check(known, "tokenizer.ggml.bos_token_id", bos, f"0 to {len(tokens) - 1}")
        tokenizer.post_processor = library.processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer
