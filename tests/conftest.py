"""What every test shares: eight CPU devices, and no network."""

import os

import pytest

# Before JAX starts: sharding and pmap are tested on eight devices of one machine.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["TFDS_DISABLE_GCS"] = "1"
# gcsfs would ask what kind of bucket it has, where no server of a test can answer.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


@pytest.fixture(scope="session")
def compile_once(tmp_path_factory):
    """Programs that several tests share are compiled once: a training run is mostly compilation."""
    import jax

    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
