"""Paths and URLs, and whole runs in object stores: as on a disk, to the bit."""

import contextlib
import errno
import itertools
import json
import re
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import lats_optax
from lats_optax import cli, data
from lats_optax.data import digits as data_digits
from lats_optax.files import storage
from lats_optax.files.atomic import replacing
from lats_optax.files.storage import URL, StoreError, as_path
from lats_optax.training import lock, plots, workdir
from lats_optax.training.checkpoint import load_state, load_variables
from lats_optax.training.config import PruneConfig, TrainConfig
from lats_optax.training.export import load_model
from lats_optax.training.logging import read_metrics
from lats_optax.training.manifest import MANIFEST
from lats_optax.training.parallel import PmapEngine
from lats_optax.training.recovery import CheckpointError, DamagedCheckpointWarning
from tests import matrix, stores, tiny
from tests.runs import KilledError, assert_equal_runs, at_step, die, events


@pytest.fixture(scope="module", params=stores.KINDS)
def scheme(request):
    """Each store in turn."""
    with stores.SERVERS[request.param]() as scheme:
        yield scheme


@pytest.fixture
def bucket(scheme):
    return stores.new_bucket(scheme)


@pytest.fixture
def place():
    """A place in memory, for what does not depend on the store."""
    return stores.new_bucket("memory")


# What a user names


@pytest.mark.parametrize(
    ("named", "meant"),
    [
        ("runs/x", Path("runs/x")),
        ("~/x", Path("/home/of/me/x")),
        (Path("~/x"), Path("/home/of/me/x")),
        ("file:///tmp/x", Path("/tmp/x")),
        ("memory://bucket/x", URL("memory://bucket/x")),
        (Path("memory://bucket/x"), URL("memory://bucket/x")),  # which has one slash
        (URL("memory://bucket/x"), URL("memory://bucket/x")),
        ("C:/x", Path("C:/x")),
        ("a=b:c/d", Path("a=b:c/d")),
    ],
)
def test_paths_and_urls_are_told_apart(monkeypatch, named, meant):
    monkeypatch.setenv("HOME", "/home/of/me")
    found = as_path(named)
    assert found == meant
    assert type(found) is type(meant)
    assert TrainConfig(workdir=named).workdir == meant


@pytest.mark.parametrize("named", ["gs://", "s3:///", "nope://bucket/x", "~nobody-of-this-name/x"])
def test_what_is_neither_is_refused(named):
    tiny.assert_refused(lambda: as_path(named, "workdir"), ["workdir", named])


def test_a_url_is_spelt_as_it_was():
    url = URL("gs://bucket") / "a" / "b.txt"
    assert str(url) == f"{url}" == "gs://bucket/a/b.txt"
    assert str(url.parent) == "gs://bucket/a"
    assert (url.name, url.suffix, str(url.with_name("c"))) == ("b.txt", ".txt", "gs://bucket/a/c")
    config = TrainConfig(workdir=Path("memory://bucket/run"))
    from lats_optax.training.config_json import to_json

    assert to_json(config)["workdir"] == "memory://bucket/run"


COMMANDS = [
    (cli.train, "digits --workdir {}"),
    (cli.train, "digits --init-from {}"),
    (cli.train, "digits --data.data-dir {}"),
    (cli.demo, "--workdir {}"),
    (cli.prepare, "digits --data-dir {}"),
    (cli.inspect, "model {}"),
    (cli.inspect, "schedule {}"),
    (cli.compact, "{}"),
]


@pytest.mark.parametrize(("command", "arguments"), COMMANDS)
@pytest.mark.parametrize(
    ("url", "package"), [("gs://bucket/x", "gcsfs"), ("s3://bucket/x", "s3fs")]
)
def test_a_missing_package_is_one_line(
    tmp_path, monkeypatch, capsys, command, arguments, url, package
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    registry = sys.modules["fsspec.registry"]._registry  # of what was imported before
    for name in ("gs", "gcs", "s3"):
        monkeypatch.delitem(registry, name, raising=False)
    assert command(arguments.format(url).split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert url in err
    assert f"pip install {package}" in err
    assert not any(tmp_path.iterdir())


def test_data_that_cannot_be_read_there_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command, option in ((cli.train, "--data.data-dir"), (cli.prepare, "--data-dir")):
        assert command(["digits", option, "memory://bucket/tfds"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "memory://bucket/tfds" in err
        assert "copied or mounted, or one on gs://" in err


# A store is asked as a disk is


def fill(root):
    for name, content in {"a.txt": b"a", "d/b": b"bb", "d/e/c": b"ccc"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def test_a_store_answers_as_a_disk_does(tmp_path, bucket):
    answers = []
    for root in (tmp_path / "x", bucket / "x"):
        fill(root)
        names = ["", "a.txt", "d", "d/b", "d/e", "no", "d/no", "a"]
        found = {
            n: [getattr(root / n, f)() for f in ("exists", "is_dir", "is_file")] for n in names
        }
        read = [(root / name).read_bytes() for name in ("a.txt", "d/b", "d/e/c")]
        listed = [sorted(p.name for p in (root / n).iterdir()) for n in ("", "d", "d/e")]
        for missing in (root / "no", root / "d" / "no"):
            with pytest.raises(FileNotFoundError):
                missing.read_bytes()
            missing.unlink(missing_ok=True)
        size = (root / "d" / "b").stat().st_size
        (root / "d" / "b").unlink()
        (root / "a.txt").write_bytes(b"another")
        after = [(root / "d" / "b").exists(), (root / "d").is_dir(), (root / "a.txt").read_bytes()]
        answers.append((found, read, listed, size, after))
    assert answers[0] == answers[1]


def test_objects_go_in_and_out(tmp_path, bucket):
    fill(bucket / "x")
    names = (bucket / "x").names()
    assert names == ["a.txt", "d/b", "d/e/c"]
    with storage.fetched(bucket / "x") as local:
        assert local.name == "x"
        assert [(local / name).read_bytes() for name in names] == [b"a", b"bb", b"ccc"]
        (bucket / "y").upload(local, names)
    with storage.fetched(bucket / "x" / "a.txt") as local:
        assert (local.name, local.read_bytes()) == ("a.txt", b"a")
    assert not local.exists()
    (bucket / "y").copy(["d/b"], bucket / "z")
    assert (bucket / "z" / "d" / "b").read_bytes() == b"bb"
    (bucket / "y").remove(["a.txt", "d/e/c"])
    assert (bucket / "y").names() == ["d/b"]
    assert (bucket / "x").names() == names
    assert (bucket / "no").names() == []
    assert (bucket / "new").create(b"1")
    assert not (bucket / "new").create(b"2")
    assert (bucket / "new").read_bytes() == b"1"


@pytest.mark.parametrize("end", [b"", b"\r", b"\n", b"\r\n", b"\n\n"])
def test_bytes_that_look_like_the_end_of_a_line_stay(bucket, end):
    (bucket / "x").write_bytes(b"data" + end)
    assert (bucket / "x").read_bytes() == b"data" + end


@pytest.mark.cover
def test_an_object_is_replaced_as_a_whole(bucket):
    with replacing(bucket / "notes.txt") as unfinished:
        unfinished.write_text("all of it")
    with contextlib.suppress(KilledError), replacing(bucket / "notes.txt") as unfinished:
        unfinished.write_text("half")
        raise KilledError
    assert (bucket / "notes.txt").read_bytes() == b"all of it"


def test_files_that_grow_are_copied(bucket):
    with storage.growing(bucket / "x") as (directory, copy):
        for text in ("one\n", "two\n", ""):
            with (directory / "log").open("a") as file:
                file.write(text)
            copy()
            assert (bucket / "x" / "log").read_bytes() == (directory / "log").read_bytes()
        assert (directory / "log").read_text() == "one\ntwo\n"


def test_a_sparse_file_goes_to_a_store(bucket):
    params = {"kernel": np.eye(9, dtype=np.float32), "bias": np.zeros(3, np.float32)}
    for path in (bucket / "w.safetensors", str(bucket / "v.safetensors")):
        lats_optax.save_sparse(path, params, {"of": "mine"})
        jax.tree.map(np.testing.assert_array_equal, lats_optax.load_sparse(path), params)
        assert lats_optax.read_metadata(path) == {"of": "mine"}
    with pytest.raises(FileNotFoundError, match=re.escape(str(bucket / "no"))):
        lats_optax.load_sparse(bucket / "no")


# Whole runs

SPARSE = PruneConfig(target_sparsity=0.75)


def run(directory, **changes):
    return tiny.train(tiny.config(directory, prune=SPARSE, **changes))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run on a disk, and its directory."""
    directory = tmp_path_factory.mktemp("disk") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny.install(patch)
        result = run(directory)
        plots.write_plots(result)
    return result, directory


@pytest.fixture
def zoo(monkeypatch):
    tiny.install(monkeypatch)


def kinds_of(names):
    """Names of files, less what is drawn at random in them."""
    plain = {re.sub(r"(tfevents\.).*|[0-9a-f]{32}", r"\1…", name) for name in names}
    return plain - {".lock"}


@pytest.mark.cover
def test_a_run_in_a_store_is_one_on_a_disk(bucket, zoo, straight, tmp_path, capsys):
    result, directory = straight
    place = bucket / "run"
    there = run(place)
    drawn = plots.write_plots(there)
    assert_equal_runs(there, result)
    on_disk = [path.relative_to(directory).as_posix() for path in directory.rglob("*")]
    files = [name for name in on_disk if (directory / name).is_file()]
    assert kinds_of(place.names()) == kinds_of(files)
    assert all(
        str(path) in map(str, drawn) for path in (place / "report.png", place / "weights.png")
    )
    model = place / "model.safetensors"
    weights = [lats_optax.load_sparse(of / "model.safetensors") for of in (place, directory)]
    jax.tree.map(np.testing.assert_array_equal, *weights)
    assert read_metrics(place / "metrics.jsonl") == there.metrics
    jax.tree.map(np.testing.assert_array_equal, load_state(str(place)), load_state(directory))
    saved = load_model(str(model))
    jax.tree.map(np.testing.assert_array_equal, load_variables(str(place)), saved.variables)
    with storage.fetched(place) as copy:
        assert events(copy).keys() == events(directory).keys()

    # And what reads runs and model files.
    for arguments in (
        ["model", str(place)],
        ["schedule", str(place), str(model.parent / "metrics.jsonl")],
    ):
        out = ["--out", str(bucket / "drawn.png")]
        assert cli.inspect([*arguments, *out]) == 0
        assert (bucket / "drawn.png").read_bytes().startswith(b"\x89PNG")
        (bucket / "drawn.png").unlink()
    fine = PruneConfig(mode="fine-tuning")
    tuned = tiny.train(tiny.config(bucket / "tuned", prune=fine, init_from=model, epochs=1))
    assert tuned.sparsity.zeros == result.sparsity.zeros
    assert (bucket / "tuned" / "initial.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 9, 14, 18])
def test_a_run_that_died_goes_on(place, zoo, straight, monkeypatch, step):
    with monkeypatch.context() as context:
        at_step(context, step, die)
        with pytest.raises(KilledError):
            run(place / "run")
    assert_equal_runs(run(place / "run", resume=True), straight[0])


@pytest.mark.slow
def test_a_run_that_died_goes_on_in_every_store(bucket, zoo, straight, monkeypatch):
    with monkeypatch.context() as context:
        at_step(context, 15, die)
        with pytest.raises(KilledError):
            run(bucket / "run")
    resumed = run(bucket / "run", resume=True)
    assert_equal_runs(resumed, straight[0])
    assert read_metrics(bucket / "run" / "metrics.jsonl") == resumed.metrics
    assert run(bucket / "run", resume=True).metrics == resumed.metrics  # when it is over
    again = run(bucket / "run", overwrite=True)
    assert_equal_runs(again, straight[0])
    found = [name for name in (bucket / "run").names() if name.startswith("events")]
    assert len(found) == 1


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2])
def test_a_checkpoint_that_is_half_there_is_none(place, zoo, straight, monkeypatch, at):
    """Killed before the first or the last upload of the second checkpoint."""
    sent, upload = [], URL.upload

    def uploading(self, directory, names):
        if self.parent.name == "checkpoints":
            sent.append(names)
            if len(sent) == 2 + at:
                raise KilledError
        upload(self, directory, names)

    with monkeypatch.context() as context:
        context.setattr(URL, "upload", uploading)
        with pytest.raises(CheckpointError, match="Those before it are whole"):
            run(place / "run")
    checkpoints = place / "run" / "checkpoints"
    assert bool((checkpoints / "12").names()) == (at == 2)
    assert load_state(place / "run").step == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is not taken for damage
        resumed = run(place / "run", resume=True)
    assert_equal_runs(resumed, straight[0])


def spoil(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(
            data[:-1] if how == "short" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
        )


@pytest.mark.parametrize("how", matrix.fast(["flipped", "short", "missing"], ["flipped"]))
def test_the_one_before_a_damaged_checkpoint_is_taken(place, zoo, straight, monkeypatch, how):
    with monkeypatch.context() as context:
        at_step(context, 14, die)
        with pytest.raises(KilledError):
            run(place / "run")
    checkpoints = place / "run" / "checkpoints"
    names = [name for name in (checkpoints / "12").names() if name != MANIFEST]
    spoil(
        checkpoints / "12" / max(names, key=lambda n: (checkpoints / "12" / n).stat().st_size), how
    )
    with pytest.warns(DamagedCheckpointWarning, match="the one before it is taken"):
        assert load_state(place / "run").step == 6
    with pytest.warns(DamagedCheckpointWarning, match=re.escape(f"{checkpoints}/12.damaged")):
        resumed = run(place / "run", resume=True)
    assert_equal_runs(resumed, straight[0])
    kept = {"12", "18", "12.damaged"}
    assert {name.partition("/")[0] for name in checkpoints.names()} == kept


@pytest.mark.slow
def test_where_none_is_whole_nothing_is_changed(place, zoo, monkeypatch):
    run(place / "run", epochs=1)
    spoil(place / "run" / "checkpoints" / "6" / MANIFEST, "flipped")
    before = {name: (place / "run" / name).read_bytes() for name in (place / "run").names()}
    with pytest.raises(CheckpointError, match="is whole"):
        run(place / "run", epochs=1, resume=True)
    assert {name: (place / "run" / name).read_bytes() for name in (place / "run").names()} == before


@pytest.mark.slow
def test_overwriting_removes_what_a_run_wrote_alone(place, zoo):
    run(place / "run", epochs=1)
    (place / "run" / "notes.txt").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="--resume goes on"):
        run(place / "run", epochs=1)
    with workdir.prepared(tiny.config(place / "run", overwrite=True), PmapEngine()):
        assert (place / "run").names() == [".lock", "notes.txt"]
    assert (place / "run").names() == ["notes.txt"]


# One run at a time


def hold(place, *, age=0.0, token="another"):
    content = {"holder": "process 7 on host", "token": token, "time": time.time() - age}
    (place / ".lock").write_bytes(json.dumps(content).encode())


@pytest.mark.cover
def test_a_second_run_is_refused(bucket, monkeypatch):
    monkeypatch.setattr(lock, "_SETTLED", 0.0)
    says = f"workdir {bucket} is in use by process .* on .*/.lock is removed"
    with lock.locked(bucket) as check:
        check()
        with pytest.raises(lock.WorkdirInUseError, match=says), lock.locked(bucket):
            pass
        check()
    assert not (bucket / ".lock").exists()
    with lock.locked(bucket) as check:
        check()


@pytest.mark.parametrize("age", [0, 170, 190, 1e6])
def test_a_dead_run_holds_the_place_for_three_minutes(place, monkeypatch, age):
    monkeypatch.setattr(lock, "_SETTLED", 0.0)
    hold(place, age=age)
    refused = contextlib.nullcontext() if age > 180 else pytest.raises(lock.WorkdirInUseError)
    with refused, lock.locked(place) as check:
        check()


def test_what_is_no_lock_holds_nothing(place, monkeypatch):
    monkeypatch.setattr(lock, "_SETTLED", 0.0)
    for content in (b"", b"process 1 on nowhere\n", b"[]", b'{"time": "x"}'):
        (place / ".lock").write_bytes(content)
        with lock.locked(place) as check:
            check()


def test_a_run_gives_signs_of_life(place, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT", 0.01)
    with lock.locked(place):
        first = (place / ".lock").read_bytes()
        deadline = time.monotonic() + 30
        while (place / ".lock").read_bytes() == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (place / ".lock").read_bytes() != first


@pytest.mark.slow
def test_a_run_that_was_taken_for_dead_writes_nothing_more(place, zoo, monkeypatch):
    """Another one has begun there; it may have ended, and so has removed its lock."""
    for act in (lambda: hold(place / "run"), (place / "run" / ".lock").unlink):
        before = {}

        def taken(act=act, before=before):
            act()
            there = place / "run"
            before |= {name: (there / name).read_bytes() for name in there.names()}

        with monkeypatch.context() as context:
            at_step(context, 8, taken)
            with pytest.raises(lock.WorkdirInUseError, match="was taken over by"):
                run(place / "run", overwrite=True)
        there = place / "run"
        assert {name: (there / name).read_bytes() for name in there.names()} == before
        (there / ".lock").unlink(missing_ok=True)


# What a store refuses


def assert_refused(done, capsys, *words):
    lines = [line for line in capsys.readouterr().err.splitlines() if "step/s" not in line]
    assert done == 1
    assert len([line for line in lines if line.strip()]) == 1, lines
    for word in ("lats-train: error: ", *words):
        assert word in lines[-1]


TINY = ["digits", "--data.batch-size", "8", "--checkpoint-every", "1", "--epochs", "2"]


@pytest.mark.parametrize(
    "method", matrix.fast(["exists", "info", "pipe_file", "put_file", "find", "rm"], ["pipe_file"])
)
def test_a_store_that_refuses_is_one_line(place, zoo, monkeypatch, capsys, method):
    def refuse(self, *args, **keywords):
        raise PermissionError("Access Denied.\nRequest ID: 1")

    with monkeypatch.context() as context:
        context.setattr(MemoryFileSystem, method, refuse)
        done = cli.train([*TINY, "--keep-checkpoints", "1", "--workdir", str(place / "run")])
    assert_refused(done, capsys, "Permission denied: Access Denied. Request ID: 1", str(place))
    assert cli.train([*TINY, "--resume", "--workdir", str(place / "run")]) in (0, 1)


@pytest.mark.slow
def test_a_store_that_is_away_while_a_run_goes_on_is_no_damage(place, zoo, monkeypatch, capsys):
    assert cli.train([*TINY, "--workdir", str(place / "run")]) == 0
    capsys.readouterr()

    def away(self, *args, **keywords):
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    arguments = [*TINY, "--resume", "--workdir", str(place / "run")]
    before = (place / "run").names()
    with monkeypatch.context() as context:
        context.setattr(MemoryFileSystem, "get_file", away)
        assert_refused(cli.train(arguments), capsys, "Connection timed out", str(place))
    assert [name for name in (place / "run").names() if name != ".lock"] == before
    assert cli.train(arguments) == 0


def test_errors_name_the_object(monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *a, **k: 1 / 0)
    with pytest.raises(StoreError, match="memory://bucket/x") as error:
        URL("memory://bucket/x").read_bytes()
    assert error.value.errno == errno.EIO
    assert isinstance(error.value, OSError)


# Data


@pytest.fixture(scope="module")
def google():
    with stores.google() as scheme:
        yield stores.new_bucket(scheme)


@pytest.mark.slow
def test_data_is_read_from_a_store_as_from_a_disk(google, tmp_path, capfd):
    data_dir = google / "tfds"
    assert cli.prepare(["digits", "--data-dir", str(data_dir)]) == 0
    version = data_dir / "sklearn_digits" / "1.0.0"
    assert capfd.readouterr().out.split() == [str(version)]
    assert (version / "dataset_info.json").is_file()
    before = {name: (data_dir / name).read_bytes() for name in data_dir.names()}
    batches = []
    for directory in (str(data_dir), str(tmp_path)):
        digits = data.load("digits", directory)
        with contextlib.closing(digits.train_batches(256)) as stream:
            batches.append([next(stream), *itertools.islice(digits.eval_batches(360), 1)])
    jax.tree.map(np.testing.assert_array_equal, *batches)
    assert {name: (data_dir / name).read_bytes() for name in data_dir.names()} == before


@pytest.mark.slow
def test_a_set_of_tfds_is_read_from_a_store(google, tmp_path):
    """Record by record, by ArrayRecord itself: in worker processes too."""
    made = Path(data_digits.prepare(str(tmp_path)).data_dir)
    target = google / "other" / "sklearn_digits" / "1.0.0"
    target.upload(made, [path.name for path in made.iterdir()])
    found = []
    for directory, workers in ((tmp_path, 0), (google / "other", 0), (google / "other", 2)):
        loaded = data.load("sklearn_digits", str(directory), workers=workers)
        with contextlib.closing(loaded.eval_batches(90)) as stream:
            found.append(list(stream))
    for others in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, found[0], others)


def test_data_that_is_not_there_is_one_line(google, capsys):
    for name in ("digits:9.9.9", "cifar10"):
        arguments = ["digits", "--data.name", name, "--data.data-dir", str(google / "none")]
        assert cli.train(arguments) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert f"lats-prepare {name} --data-dir {google}/none" in err
