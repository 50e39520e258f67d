"""Soft threshold pruning for optax: the public optimizer API (jax and optax alone)."""
