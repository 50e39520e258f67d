"""Reports of sparsity, MACs and weights, and the walkers over jaxprs."""
