"""How good sparse models are: pruning methods on the same tasks, with the same training."""
