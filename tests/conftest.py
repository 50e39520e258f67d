"""What every test shares: eight CPU devices, and no network."""

import os

# Before JAX starts: sharding and pmap are tested on eight devices of one machine.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["TFDS_DISABLE_GCS"] = "1"
