"""Files: sparse ones, paths and object stores, and writing that is whole or not at all."""

from lats_optax.files.sparse import load_sparse, read_metadata, save_sparse

__all__ = ["load_sparse", "read_metadata", "save_sparse"]
