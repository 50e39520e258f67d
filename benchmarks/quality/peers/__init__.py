"""The pruning methods of other papers, as optax transformations."""
