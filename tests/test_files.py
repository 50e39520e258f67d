"""Sparse files: bit for bit what was saved, small, and nothing but an error when they are wrong."""

import hashlib
import math
import os
import resource
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from lats_optax import load_sparse, read_metadata, save_sparse
from lats_optax.files import sparse as sparse_files
from tests import matrix
from tests.signed import write_signed

DTYPES = [*sparse_files._DTYPES.values()]


def noise(dtype, shape, density, seed=0):
    """Any bits at all in a fraction of the entries, all zero in the others."""
    rng = np.random.default_rng(seed)
    size = math.prod(shape)
    raw = rng.integers(0, 256, (size, dtype.itemsize), np.uint8) if dtype.kind != "b" else 1
    entries = np.where(rng.random((size, 1)) < density, raw, 0).astype(np.uint8)
    return np.ascontiguousarray(entries).view(dtype).reshape(shape)


def assert_identical(a, b):
    """The same tree, types of nodes included, of the same bits."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b):
            assert_identical(one, other)
    elif a is not None:
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()
        assert b.flags.writeable


def stored(path):
    """Names of the tensors in a file, as the library of the format reads them."""
    return {name: tensor for name, tensor in safetensors.deserialize(path.read_bytes())}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


# --- round trips ----------------------------------------------------------------------------------

SHAPES = [(), (0,), (3, 0, 2), (1,), (7,), (254,), (255,), (256,), (9, 31), (3, 3, 20, 40)]


@pytest.mark.parametrize("density", [0.0, 0.002, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_of_every_type_come_back_bit_for_bit(path, dtype, density):
    tree = [noise(dtype, shape, density, seed) for seed, shape in enumerate(SHAPES)]
    save_sparse(path, tree)
    assert_identical(load_sparse(path), tree)


def test_zeros_and_numbers_that_are_none_keep_their_bits(path):
    special = np.array([0x80000000, 0x7FC00001, 0x7F800001, 0xFFFFFFFF, 1], np.uint32)
    array = np.zeros(100_000, np.uint32)
    array[[0, 500, 501, 70_000, 99_999]] = special
    tree = {"sparse": array.view(np.float32), "dense": special.view(np.float32)}
    save_sparse(path, tree)
    assert set(stored(path)) == {"dense", "sparse:gaps", "sparse:values"}
    assert_identical(load_sparse(path), tree)


def test_trees(path):
    one = np.ones(2, np.float32)
    tree = {
        "params": {"Dense_0": {"kernel": one}, "layers": [one, (one * 2, None, [])], 3: {0: one}},
        "batch_stats": {},
        "": one,
        'ключ "quoted" and/or:colon': (),
        "step": np.array(7, np.int64),
    }
    save_sparse(path, tree)
    assert_identical(load_sparse(path), tree)
    for alone in (one, None, [], {"a": {}}):
        save_sparse(path, alone)
        assert_identical(load_sparse(path), alone)


def test_what_arrays_may_be(path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    tree = {
        "jax": jnp.asarray(values),
        "columns": values.T,
        "strided": values[::2, ::3],
        "big-endian": values.astype(">f4"),
        "read-only": np.broadcast_to(values[0], (2, 4)),
        "scalar": np.float32(2.5),
        "bfloat16": jnp.asarray(values, jnp.bfloat16),
    }
    save_sparse(path, tree)
    found = load_sparse(path)
    for key, value in tree.items():
        np.testing.assert_array_equal(found[key], value)
        assert found[key].dtype.name == value.dtype.name


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_positions_of_any_kind(data, tmp_path_factory):
    size = data.draw(st.integers(0, 3000))
    places = data.draw(st.sets(st.integers(0, max(size - 1, 0)), max_size=min(size, 40)))
    array = np.zeros(size, np.float64)
    array[sorted(places)] = -0.0
    path = tmp_path_factory.getbasetemp() / "positions.safetensors"
    save_sparse(path, array)
    assert_identical(load_sparse(path), array)


@pytest.mark.parametrize("seed", range(6))
def test_gaps_against_a_loop(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 4000))
    positions = np.flatnonzero(rng.random(size) < 10.0 ** -rng.integers(0, 4))
    expected, since = [], 0
    for position in range(size):
        if position in set(positions.tolist()):
            expected.append(since)
            since = 0
        elif since == 254:
            expected.append(255)
            since = 0
        else:
            since += 1
    assert sparse_files._gaps(positions, size).tolist() == expected
    np.testing.assert_array_equal(
        sparse_files._from_gaps("x", np.array(expected, np.uint8), size), positions
    )


def test_dense_arrays_are_read_by_any_reader_of_the_format(path):
    tree = {"a": {"kernel": np.ones((3, 4), np.float32)}, "b": np.arange(5)}
    save_sparse(path, tree)
    found = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(found["a/kernel"], tree["a"]["kernel"])
    np.testing.assert_array_equal(found["b"], tree["b"])


def test_equal_trees_make_equal_files_of_any_metadata(path, tmp_path):
    other = tmp_path / "other"
    for name in (path, other):
        save_sparse(name, {"a": np.ones(3)}, {"model": "resnet50"})
    assert read_metadata(other) == {"model": "resnet50"}
    assert load_sparse(other)["a"].sum() == 3
    # What looks like the place of the checksum is none.
    odd = {"x": '"sha256":"' + "0" * 64, 'sha256":"': "é\n", "": ""}
    save_sparse(path, {}, odd)
    assert (load_sparse(path), read_metadata(path)) == ({}, odd)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    current = os.umask(0)
    os.umask(current)
    return current


# --- size -----------------------------------------------------------------------------------------


@pytest.mark.cover
@pytest.mark.parametrize(("sparsity", "most"), [(0.95, 0.09), (0.99, 0.03), (0.999, 0.01)])
@pytest.mark.parametrize("clustered", matrix.fast([False, True], [True]))
def test_size_at_the_shapes_of_resnet50(path, sparsity, most, clustered):
    """A tenth of the shapes: each stage's last block, the stem and the classifier."""
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, shape in resnet_shapes().items() if len(shape) > 1}
    sizes = np.array([np.prod(shape) for shape in shapes.values()])
    # Layers differ: some have many times the density of others, at the same sparsity of all.
    factors = rng.choice([0.1, 1.9], len(shapes)) if clustered else np.ones(len(shapes))
    densities = (1 - sparsity) * factors / (factors @ sizes / sizes.sum())
    density = dict(zip(shapes, densities))
    tree = {}
    for name, shape in resnet_shapes().items():
        keep = rng.random(shape) < density.get(name, 1)
        tree[name] = np.where(keep, rng.normal(size=shape), 0).astype(np.float32)
    save_sparse(path, tree)
    safetensors.numpy.save_file(tree, path.with_name("dense"))
    dense = path.with_name("dense").stat().st_size
    zeros = sum((w == 0).sum() for w in tree.values() if w.ndim > 1)
    size = sum(w.size for w in tree.values() if w.ndim > 1)
    assert abs(zeros / size - sparsity) < 1e-3
    assert path.stat().st_size <= most * dense
    assert_identical(load_sparse(path), tree)


def resnet_shapes():
    pytest.importorskip("flax")
    from lats_optax import models

    model = models.create("resnet50", num_classes=1000)
    variables = jax.eval_shape(
        lambda key, x: model.init(key, x, train=False),
        jax.random.key(0),
        jnp.zeros((1, 64, 64, 3)),
    )
    flat = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
    keep = ("stem", "stage4_block3", "stage3_block6", "stage2_block4", "classifier")
    names = {jax.tree_util.keystr(k, simple=True, separator="."): leaf.shape for k, leaf in flat}
    return {name: shape for name, shape in names.items() if name.startswith(keep)}


# --- writing --------------------------------------------------------------------------------------


def test_a_save_interrupted_at_any_byte_leaves_the_previous_file_whole(path, tmp_path):
    before = {"kernel": np.arange(40, dtype=np.float32)}
    after = {"kernel": noise(np.dtype(np.float32), (30, 30), 0.05)}
    save_sparse(path, after)
    length = path.stat().st_size
    save_sparse(path, before)
    content = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in range(length):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        try:
            with pytest.raises(OSError, match="too large"):
                save_sparse(path, after)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == content
        assert os.listdir(tmp_path) == [path.name]
    save_sparse(path, after)
    assert_identical(load_sparse(path), after)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_save_that_fails_after_the_last_byte(path, tmp_path, monkeypatch, call):
    save_sparse(path, {"a": np.ones(3)})

    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(os, call, fail)
        with pytest.raises(KeyboardInterrupt):
            save_sparse(path, {"b": np.ones(3)})
    assert list(load_sparse(path)) == ["a"]
    assert os.listdir(tmp_path) == [path.name]


WRONG = {
    "directory": (lambda p: (p / "nowhere" / "x", {}), FileNotFoundError, "there is no directory"),
    "number": (lambda p: (p / "x", {"a": {"b": 1.0}}), ValueError, "params: a/b is a float; allow"),
    "object": (lambda p: (p / "x", object()), ValueError, "params: params is a object"),
    "key": (lambda p: (p / "x", {"a": {2.5: 1}}), ValueError, "params: a has the key 2.5; allowed"),
    "bool key": (lambda p: (p / "x", {True: 1}), ValueError, "has the key True"),
    "dtype": (
        lambda p: (p / "x", {"a": np.ones(2, np.complex128)}),
        ValueError,
        "params: a is complex128; allowed: bool, int8",
    ),
    "text": (lambda p: (p / "x", np.array("a")), ValueError, "is <U1; allowed"),
    "random key": (lambda p: (p / "x", jax.random.key(0)), ValueError, "is key<fry>; allowed"),
    "one name": (
        lambda p: (p / "x", {"a/b": np.ones(1), "a": {"b": np.ones(1)}}),
        ValueError,
        "params: the name a/b is taken",
    ),
    "reserved name": (
        lambda p: (p / "x", {"__metadata__": np.ones(1)}),
        ValueError,
        "params: the name __metadata__ is taken",
    ),
    "metadata": (lambda p: (p / "x", {}, {"a": 1}), ValueError, "metadata: 'a' is 1; allowed"),
    "taken": (lambda p: (p / "x", {}, {"sha256": ""}), ValueError, "metadata: 'sha256' is taken"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_saved(tmp_path, case):
    make, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        save_sparse(*make(tmp_path))
    assert not list(tmp_path.iterdir())


# --- damaged files --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file with an array of every form, its bytes and its tree."""
    path = tmp_path_factory.mktemp("small") / "model"
    bitmap, gaps = noise(np.dtype(np.float32), (300,), 0.3), np.zeros((20, 60), np.float16)
    gaps[3, 3] = gaps[19, 50] = 1
    tree = {"a": np.array([True, False]), "b": [bitmap, gaps], "c": None}
    save_sparse(path, tree, {"model": "x"})
    names = {"a", "b/0:bitmap", "b/0:values", "b/1:gaps", "b/1:values"}
    assert set(stored(path)) == names
    return path.read_bytes(), tree


@pytest.mark.slow
def test_a_change_of_any_byte_is_an_error(small, path):
    content, _ = small
    for at in range(len(content)):
        data = bytearray(content)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        read = read_metadata if at % 5 == 0 else load_sparse
        with pytest.raises(ValueError, match=r"is damaged or not a|is damaged: |but not one of"):
            read(path)


@pytest.mark.slow
def test_a_file_cut_anywhere_or_lengthened_is_an_error(small, path):
    content, _ = small
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
            load_sparse(path)
    for more in (b"\0", b" " * 8, content):
        path.write_bytes(content + more)
        with pytest.raises(ValueError, match="is damaged"):
            load_sparse(path)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_at_all(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "bytes"
    for content in (data, len(data).to_bytes(8, "little") + data):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
            load_sparse(path)


def test_foreign_files(path):
    safetensors.numpy.save_file({"a": np.ones(3)}, path)
    with pytest.raises(ValueError, match="is a safetensors file, but not one of save_sparse"):
        load_sparse(path)
    safetensors.numpy.save_file({"a": np.ones(3)}, path, {"lats_optax": "{}"})
    with pytest.raises(ValueError, match="but not one of save_sparse"):
        load_sparse(path)
    path.write_bytes(b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_sparse(path)
    with pytest.raises(FileNotFoundError):
        load_sparse(path.with_name("none"))


# --- hostile files, whose checksum is right -------------------------------------------------------


def u1(*values):
    return np.array(values, np.uint8)


def f4(count):
    return np.ones(count, np.float32)


def tree(node, version=1):
    return {"version": version, "tree": node}


def gaps(shape, where, values):
    return {"params:gaps": where, "params:values": values}, tree({"array": "gaps", "shape": shape})


def bitmap(shape, where, values):
    stored = {"params:bitmap": where, "params:values": values}
    return stored, tree({"array": "bitmap", "shape": shape})


DENSE = {"params": f4(2)}
HOSTILE = {
    "no JSON": ({}, "{", "its layout cannot be read"),
    "deep JSON": ({}, '{"version": 1, "tree": ' + "[" * 100_000, "its layout cannot be read"),
    "long number": ({}, '{"version": ' + "9" * 9999 + "}", "its layout cannot be read"),
    "list": ({}, [], "its layout is not a version and a tree"),
    "no version": ({}, {"tree": None}, "its layout is not a version and a tree"),
    "more": ({}, {**tree(None), "x": 1}, "its layout is not a version and a tree"),
    "version": ({}, tree(None, 2), "its version is 2; known is 1"),
    "text for a node": ({}, tree("dense"), "params: the layout has 'dense' there"),
    "number for a node": ({}, tree(0), "params: the layout has '0' there"),
    "list for a node": ({}, tree([None]), "the layout has '.None.' there"),
    "unknown node": ({}, tree({"set": []}), r"has the fields \['set'\]"),
    "two kinds": ({}, tree({"list": [], "dict": []}), "has the fields"),
    "children": ({}, tree({"list": {}}), "has the fields"),
    "empty": ({}, tree({}), "has the fields"),
    "pairs": ({}, tree({"dict": [["a", None, None]]}), "has a dict of"),
    "no pairs": ({}, tree({"dict": ["ab"]}), "has a dict of"),
    "key": ({}, tree({"dict": [[1.5, None]]}), "has a dict of"),
    "bool key": ({}, tree({"dict": [[True, None]]}), "has a dict of"),
    "key twice": ({}, tree({"dict": [["a", None], ["a", None]]}), "has the key 'a' twice"),
    "missing": ({}, tree({"array": "dense"}), "params is missing"),
    "used twice": (
        {"a": f4(1)},
        tree({"dict": [["a", {"array": "dense"}], ["", {"dict": [["a", {"array": "dense"}]]}]]}),
        "a is missing",
    ),
    "unused": (DENSE, tree(None), "params: in no place of the tree"),
    "form": (DENSE, tree({"array": "zip"}), "has the fields"),
    "form of no text": (DENSE, tree({"array": ["dense"], "shape": [2]}), "has the fields"),
    "shape of a dense one": (DENSE, tree({"array": "dense", "shape": [2]}), "has the fields"),
    "no values": ({"params:gaps": u1()}, gaps([1], 0, 0)[1], "params:values is missing"),
    "no gaps": ({"params:values": f4(1)}, gaps([1], 0, 0)[1], "params:gaps is missing"),
    "negative": (*gaps([-1], u1(), f4(0)), r"the shape \[-1\]"),
    "fraction": (*gaps([1.0], u1(0), f4(1)), r"the shape \[1.0\]"),
    "bool": (*gaps([True], u1(0), f4(1)), r"the shape \[True\]"),
    "text": (*gaps("1", u1(0), f4(1)), "the shape 1"),
    "many axes": (*gaps([1] * 65, u1(0), f4(1)), "the shape"),
    "huge": (*gaps([10**12], u1(0), f4(1)), "1000000000000 entries, and its gaps reach 1"),
    "huge bitmap": (*bitmap([2**50], u1(1), f4(1)), "a bitmap of 1 bytes"),
    "beyond": (*gaps([2**40] * 40, u1(0), f4(1)), "the shape"),
    "huge and empty": (*gaps([0, 2**62], u1(), f4(0)), "the shape"),
    "very huge": (*gaps([10**4000], u1(), f4(0)), "the shape"),
    "gaps too short": (*gaps([256], u1(0), f4(1)), "256 entries, and its gaps reach 1"),
    "gaps too long": (*gaps([5], u1(2, 2), f4(2)), "5 entries, and its gaps reach 6"),
    "fewer values": (*gaps([5], u1(0, 0), f4(1)), "1 values for 2 places"),
    "more values": (*gaps([5], u1(0), f4(2)), "2 values for 1 places"),
    "gaps of a type": (*gaps([5], np.zeros(1, np.int8), f4(1)), "stored as int8"),
    "gaps of a shape": (*gaps([5], u1(0)[None], f4(1)), "stored as uint8"),
    "values of a shape": (*gaps([5], u1(0), f4(1)[None]), r"\[1, 1\] values"),
    "bitmap too short": (*bitmap([9], u1(1), f4(1)), "9 entries and a bitmap of 1 bytes"),
    "bitmap too long": (*bitmap([8], u1(1, 0), f4(1)), "8 entries and a bitmap of 2 bytes"),
    "behind the end": (*bitmap([3], u1(9), f4(2)), "has places behind its end"),
    "fewer bits": (*bitmap([8], u1(1), f4(2)), "2 values for 1 places"),
    "bools": (
        {"params": u1(0, 2).view(bool)},
        tree({"array": "dense"}),
        "has bools other than 0 and 1",
    ),
    "bools for values": (
        *gaps([1], u1(0), u1(7).view(bool)),
        "has bools other than 0 and 1",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(path, case):
    tensors, layout, message = HOSTILE[case]
    write_signed(path, tensors, layout)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as caught:
            load_sparse(path)
        assert len(str(caught.value)) < 400 + len(str(path))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_type_that_numpy_lacks(path):
    write_signed(path, {"params": u1(1)}, tree({"array": "dense"}))
    data = path.read_bytes().replace(b'"U8"', b'"F8_E8M0"')
    header = int.from_bytes(data[:8], "little") + len("F8_E8M0") - len("U8")
    data = header.to_bytes(8, "little") + data[8:]
    at = data.index(b'"sha256":"') + 10
    data = data[:at] + b"0" * 64 + data[at + 64 :]
    path.write_bytes(data[:at] + hashlib.sha256(data).hexdigest().encode() + data[at + 64 :])
    with pytest.raises(ValueError, match="params is of type F8_E8M0; allowed are BOOL"):
        load_sparse(path)


FIELDS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 300)
    | st.sampled_from(["dense", "bitmap", "gaps", "a", "", 1e300, 2**63, 2**64]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["array", "shape", "dict", "list", "tuple", "x"]), inner, max_size=3
        )
    ),
    max_leaves=12,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(layout=FIELDS, whole=st.booleans())
def test_any_layout_at_all(tmp_path_factory, layout, whole):
    path = tmp_path_factory.getbasetemp() / "layout"
    tensors = {"params:gaps": u1(3), "params:values": f4(1), "a": f4(2)}
    write_signed(path, tensors, layout if whole else tree(layout))
    try:
        load_sparse(path)
    except ValueError as error:
        assert "is damaged" in str(error)  # noqa: PT017


@pytest.mark.slow
def test_without_safetensors(tmp_path):
    program = (
        "import sys; sys.modules['safetensors'] = None\n"
        "import lats_optax\n"
        "for call in (lats_optax.load_sparse, lambda path: lats_optax.save_sparse(path, {})):\n"
        "    try: call('x')\n"
        "    except ImportError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.stdout.count("safetensors is missing") == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_fine_tuning_goes_on_from_a_file(path):
    import optax

    import lats_optax

    params = {"kernel": jnp.asarray(noise(np.dtype(np.int8), (40, 30), 0.1) / 64, jnp.float32)}
    save_sparse(path, params)
    loaded = jax.tree.map(jnp.asarray, load_sparse(path))
    tx = optax.chain(optax.adam(0.1), lats_optax.keep_support(lats_optax.support(loaded)))
    updates, _ = tx.update({"kernel": jnp.ones((40, 30))}, tx.init(loaded), loaded)
    tuned = optax.apply_updates(loaded, updates)
    np.testing.assert_array_equal(tuned["kernel"] == 0, params["kernel"] == 0)
    assert (tuned["kernel"] != params["kernel"]).any()
