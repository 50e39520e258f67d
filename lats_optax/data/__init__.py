"""Data sets as batches of NumPy arrays: TFDS data sets (ArrayRecord) read through Grain."""

from lats_optax.data.examples import CorruptRecordError
from lats_optax.data.loading import load
from lats_optax.data.pipeline import Batch, Batches, Dataset
from lats_optax.data.tfds_source import PrepareError

__all__ = ["Batch", "Batches", "CorruptRecordError", "Dataset", "PrepareError", "load"]
