"""Object stores for tests: fsspec's in memory, Google's and Amazon's from servers of our own."""

import contextlib
import os
import uuid

import fsspec
import pytest

from lats_optax.files import storage
from lats_optax.files.storage import URL
from tests import gcs

KINDS = ("memory", "gs", "s3")


@contextlib.contextmanager
def memory():
    """The store that fsspec keeps in this process."""
    yield "memory"


@contextlib.contextmanager
def google():
    """What gcsfs and ArrayRecord find where they look for Google's."""
    pytest.importorskip("gcsfs")
    with (
        gcs.serving() as server,
        _settings(CLOUD_STORAGE_EMULATOR_ENDPOINT=server.endpoint),
        _configured("gs", token="anon", endpoint_url=server.endpoint),
    ):
        yield "gs"


@contextlib.contextmanager
def amazon():
    """What s3fs finds where it looks for Amazon's."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"key": "testing", "secret": "testing", "client_kwargs": {"region_name": "eu-west-1"}}
    try:
        with _configured("s3", endpoint_url=f"http://{host}:{port}", **keys):
            yield "s3"
    finally:
        server.stop()


SERVERS = dict(zip(KINDS, (memory, google, amazon)))


def new_bucket(scheme):
    """An empty place, in a bucket of its own."""
    bucket = URL(f"{scheme}://bucket-{uuid.uuid4().hex}")
    if scheme == "s3":
        fsspec.filesystem("s3").mkdir(str(bucket))
    return bucket


@contextlib.contextmanager
def _settings(**values):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setitem(os.environ, name, value)
        yield


@contextlib.contextmanager
def _configured(scheme, **settings):
    """What a user's configuration of fsspec says of a store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, scheme, settings)
        storage._store.cache_clear()
        yield
        storage._store.cache_clear()
