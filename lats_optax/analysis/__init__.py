"""Reports of sparsity, multiply-adds and weights, and the walkers over jaxprs."""
