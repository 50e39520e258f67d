"""The fallbacks for older versions, against what the newest one has in their place."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lats_optax import compatibility
from tests import versions

TREES = {
    "a leaf": 1.0,
    "nothing": {},
    "none": {"a": None, "b": 1.0},
    "nested": {"b": [1.0, (2.0, {"c": 3.0})], "a": ()},
    "an object twice": {"a": (shared := [1.0, 2.0]), "b": (shared, shared)},
    "named tuples": optax.ScaleByAdamState(count=1.0, mu={"w": 2.0}, nu={"w": 3.0}),
}


@pytest.fixture(params=["this version", "older"], autouse=True)
def _version(request, monkeypatch):
    """The same answers with the fallbacks, which this version may not need."""
    if request.param == "older":
        monkeypatch.setattr(jax, "__version_info__", (0, 4, 38))
        for module, name in (
            (jax.tree, "broadcast"),
            (jax.ShapeDtypeStruct, "update"),
            (jax.extend.core, "jaxprs_in_params"),
        ):
            monkeypatch.delattr(module, name, raising=False)


@pytest.mark.parametrize("name", TREES)
def test_flatten_with_path_is_that_of_jax_where_nothing_is_a_leaf(name):
    seen = []

    def is_leaf(path, node):
        seen.append((path, node))
        return False

    found, structure = compatibility.flatten_with_path(TREES[name], is_leaf)
    expected = jax.tree_util.tree_flatten_with_path(TREES[name])
    assert (list(found), structure) == (expected[0], expected[1])
    # Asked of every node, from the root on.
    assert seen[0] == ((), TREES[name])
    assert {path for path, _ in seen} >= {path[:n] for path, _ in found for n in range(len(path))}


def test_flatten_with_path_tells_nodes_apart_by_their_path():
    tree = TREES["an object twice"]
    wanted = (jax.tree_util.DictKey("b"), jax.tree_util.SequenceKey(1))
    found, structure = compatibility.flatten_with_path(tree, lambda path, _: path == wanted)
    assert [leaf for _, leaf in found] == [1.0, 2.0, 1.0, 2.0, [1.0, 2.0]]
    again = jax.tree.unflatten(structure, ["v", "w", "x", "y", "z"])
    assert again == {"a": ["v", "w"], "b": (["x", "y"], "z")}


def test_keys_of_every_kind_are_joined():
    tree = {"a": [optax.ScaleByAdamState(count=None, mu=1.0, nu=None)]}
    (path, _), *_ = jax.tree_util.tree_flatten_with_path(tree)[0]
    assert compatibility.joined(path) == "a/0/mu"
    assert compatibility.joined(()) == ""


def test_a_prefix_becomes_the_whole_tree():
    tree = {"a": [1, 2], "b": {"c": 3}}
    assert compatibility.broadcast({"a": True, "b": False}, tree) == {
        "a": [True, True],
        "b": {"c": False},
    }
    with pytest.raises(ValueError, match=r"pytree children|key mismatch"):
        compatibility.broadcast({"a": True}, tree)


def test_a_shape_of_another_dtype():
    shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    assert compatibility.with_dtype(shape, jnp.bfloat16) == jax.ShapeDtypeStruct(
        (2, 3), jnp.bfloat16
    )


def test_the_jaxprs_of_a_primitive():
    program = jax.make_jaxpr(lambda x: jax.lax.cond(x > 0, jnp.sin, jnp.cos, x))(1.0)
    (eqn,) = (eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == "cond")
    inner = compatibility.jaxprs_in_params(eqn.params)
    assert sorted(j.eqns[0].primitive.name for j in inner) == ["cos", "sin"]
    assert compatibility.jaxprs_in_params({"axis": 0, "axes": (1, 2)}) == []


def test_the_fields_of_a_state(monkeypatch):
    state = optax.sgd(0.1, momentum=0.9).init({"w": jnp.ones(2)})
    monkeypatch.delattr(optax, "tree", raising=False)
    ((_, trace),) = compatibility.get_all_with_path(state, "trace")
    np.testing.assert_array_equal(trace["w"], np.zeros(2))


@pytest.mark.parametrize("x64", [True, False])
def test_x64(x64):
    with compatibility.enable_x64(x64):
        assert jnp.asarray(1.5).dtype == (jnp.float64 if x64 else jnp.float32)


@versions.explicit_sharding
def test_an_explicit_sharding():
    spec = jax.sharding.PartitionSpec("d")
    for make, expected in ((versions.explicit_mesh, spec), (versions.auto_mesh, None)):
        sharding = jax.sharding.NamedSharding(make((8,), ("d",)), spec)
        found = compatibility.explicit_sharding(jax.device_put(jnp.ones(8), sharding))
        assert expected is None if found is None else found.spec == expected


def test_an_array_of_no_mesh_has_no_explicit_sharding():
    assert compatibility.explicit_sharding(jnp.ones(8)) is None


def test_the_axes_of_a_shard_map():
    mesh, spec = versions.auto_mesh((4, 2), ("a", "b")), jax.sharding.PartitionSpec("a", "b")
    program = versions.shard_map(jnp.sin, mesh=mesh, in_specs=spec, out_specs=spec)
    (eqn,) = jax.make_jaxpr(program)(jnp.ones((4, 2))).jaxpr.eqns
    assert compatibility.manual_axes(eqn.params) == {"a", "b"}
    older = {"mesh": mesh, "auto": frozenset({"b"})}
    assert compatibility.manual_axes(older) == {"a"}
    assert compatibility.manual_axes({"mesh": mesh, "manual_axes": {"b"}}) == {"b"}


@versions.varying_types
def test_axes_over_which_values_vary():
    mesh, spec = versions.auto_mesh((8,), ("d",)), jax.sharding.PartitionSpec
    seen = []

    def local(split, whole):
        seen.append([compatibility.varying_axes(x) for x in (split, whole)])
        return split

    program = versions.shard_map(
        local, mesh=mesh, in_specs=(spec("d"), spec()), out_specs=spec("d")
    )
    program(jnp.ones(8), jnp.ones(8))
    assert seen[0] == [{"d"}, set()]
