"""Sparse files of any layout whose checksum is right, for the tests of hostile ones."""

import hashlib
import json

import safetensors.numpy


def write_signed(path, tensors, layout, **texts):
    """A file as `save_sparse` would sign it, of any layout: a dict, or text as it is."""
    text = layout if isinstance(layout, str) else json.dumps(layout)
    metadata = {"lats_optax": text, "sha256": "0" * 64, **texts}
    data = safetensors.numpy.save(tensors, metadata)
    digest = hashlib.sha256(data).hexdigest().encode()
    path.write_bytes(data.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + digest))
