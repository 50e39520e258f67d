"""Weights in and out of PyTorch, Hugging Face and GGUF, by name; the tokenizer of a GGUF file."""
