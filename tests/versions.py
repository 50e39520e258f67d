"""What tests call otherwise under older versions of jax and optax than the newest.

Here belongs what the tests of the optimizer core need beside `lats_optax.compatibility`.
"""

import types

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

_JAX = ".".join(map(str, jax.__version_info__))

explicit_sharding = pytest.mark.skipif(
    jax.__version_info__ < (0, 8),
    reason=f"types with an explicit sharding came with jax 0.8; this is jax {_JAX}",
)
varying_types = pytest.mark.skipif(
    jax.__version_info__ < (0, 7),
    reason=f"types that tell over which axes a value varies came with jax 0.7; this is jax {_JAX}",
)

# Both have these names from optax 0.2.5 on.
tree = getattr(optax, "tree", None) or types.SimpleNamespace(
    get=optax.tree_utils.tree_get,
    map_params=optax.tree_utils.tree_map_params,
    set=optax.tree_utils.tree_set,
)

partition = optax.partition if hasattr(optax, "partition") else optax.multi_transform


def auto_mesh(sizes, names):
    """All devices, and the compiler decides how arrays are divided over them."""
    # make_mesh has axes of explicit types unless told otherwise, and before jax 0.6 none.
    return Mesh(np.array(jax.devices()).reshape(sizes), names)


def explicit_mesh(sizes, names):
    """All devices, and the types of arrays say how they are divided over them."""
    return jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Explicit,) * len(sizes))


def set_mesh(mesh):
    """`jax.set_mesh`, which came with jax 0.8, as a context."""
    return jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh


def shard_map(function, *, check=True, **where):
    """`jax.shard_map`, which came with jax 0.7."""
    if hasattr(jax, "shard_map"):
        return jax.shard_map(function, check_vma=check, **where)
    from jax.experimental import shard_map as older

    return older.shard_map(function, check_rep=check, **where)
