"""Data sets as batches of NumPy arrays: TFDS data sets (ArrayRecord) read through Grain."""

from lats_optax.data.pipeline import Batch, Dataset, load

__all__ = ["Batch", "Dataset", "load"]
