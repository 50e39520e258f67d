"""The arithmetic of latent weights: their step, their trees, and the updates of pruned ones."""
