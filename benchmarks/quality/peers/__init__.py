"""Published pruning methods that the library's own scheme does not cover, one file a method.

Each file has ``make(optimizer, setting, **hyperparameters)``, which wraps any optax optimizer.
"""
