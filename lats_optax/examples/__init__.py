"""Programs to start from: each trains something small and real, with a training loop of its own.

    python -m lats_optax.examples.lasso_path         convex: scikit-learn's Lasso path, reproduced
    python -m lats_optax.examples.char_transformer   flax.nnx: a language model, 90 % sparse
    python -m lats_optax.examples.equinox_mlp        Equinox: an MLP on digits, 95 % sparse

They need what `pip install '.[examples]'` installs, no data but what comes with Python and
scikit-learn, and at most a few minutes of two CPU cores. `--help` lists the options of each.
"""
