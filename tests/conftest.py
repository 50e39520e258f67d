"""What every test shares: eight CPU devices, one compilation cache, and no network."""

import os
import shutil
from pathlib import Path

import pytest

from tests import matrix

# Before JAX starts: sharding and pmap are tested on eight devices of one machine.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["TFDS_DISABLE_GCS"] = "1"
# gcsfs would ask what kind of bucket it has, where no server of a test can answer.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

# Most of a test's time is compilation: workers, the processes that tests start, and the next run
# share what was compiled. Its own bound (jax_compilation_cache_max_size) takes a lock and reads the
# whole directory at every write, so it is removed here when it is too large.
_CACHE = Path(__file__).parent.parent / ".jax_cache"
_CACHE_BYTES = 2 * 1024**3
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    first = "PYTEST_XDIST_WORKER" not in os.environ and _CACHE.is_dir()
    if first and sum(file.stat().st_size for file in os.scandir(_CACHE)) > _CACHE_BYTES:
        shutil.rmtree(_CACHE, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_CACHE)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
    # An entry that a killed process has half written is compiled again. Of this process pytest
    # decides, by the same words in pyproject.toml.
    half = "ignore:Error reading persistent compilation cache entry:UserWarning"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), half]))


# Layers above the optimizer core: examples in their docstrings compile whole models.
_SLOW_EXAMPLES = tuple(
    f"lats_optax/{name}/" for name in ("calibration", "compaction", "models", "training")
)


@pytest.hookimpl(tryfirst=True)  # before `-m "not slow"` is answered
def pytest_collection_modifyitems(items):
    matrix.mark_slow(items)
    for item in items:
        if item.nodeid.startswith(_SLOW_EXAMPLES):
            item.add_marker(pytest.mark.slow)
