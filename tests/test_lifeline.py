"""Processes that come together, and that end when one of them is lost: threads, then processes."""

import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lats_optax.training import lifeline
from tests import matrix


@pytest.fixture
def address():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def meet_all(address, calls, timeout=5.0):
    """What `meet` gives or raises for each (count, index), at once."""

    def one(call):
        try:
            return lifeline.meet(address, *call, timeout)
        except (ValueError, TimeoutError) as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


def watched(line, ends):
    return line.watch("; --resume goes on", ends.append)


def test_all_meet_and_part_in_peace(address):
    ends, lines = [], meet_all(address, [(3, 2), (3, 1), (3, 0)])
    for line in lines:
        watched(line, ends).__enter__()
    for line in lines:
        line.__exit__(None, None, None)
    time.sleep(0.3)
    assert ends == []


def test_somebody_else_at_the_port_is_sent_away(address):
    host, port = address.split(":")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lifeline.meet, address, 2, 0, 5.0)
        time.sleep(0.2)
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\n")
            assert stranger.recv(1) == b""
        with lifeline.meet(address, 2, 1, 5.0), first.result():
            pass


@pytest.mark.parametrize(
    ("calls", "errors"),
    [
        ([(3, 0), (3, 1)], ["num_processes is 3; missing at {}: process 2", ""]),
        ([(2, 1)], ["coordinator is '{}', where process 0 is not: "]),
        ([(3, 0), (3, 1), (3, 1)], ["process_id is 1 in two processes; allowed: 1 to 2"]),
        ([(2, 0), (3, 1)], ["num_processes is 2 in process 0 and 3 in process 1; allowed"]),
    ],
    ids=["one is missing", "nobody is there", "an index twice", "other counts"],
)
def test_those_who_do_not_meet_are_named_in_time(address, calls, errors):
    begin = time.monotonic()
    found = meet_all(address, calls, timeout=1.0)
    assert time.monotonic() - begin < 4
    for error, words in zip(found, errors):
        assert isinstance(error, ValueError | TimeoutError)
        assert words.format(address) in str(error)


def test_an_impossible_address_is_named():
    with pytest.raises(TimeoutError, match=r"coordinator is 'nohost.invalid:1234', where process"):
        lifeline.meet("nohost.invalid:1234", 2, 1, 0.5)


def test_a_port_that_is_taken_is_named(address):
    host, port = address.split(":")
    with (
        socket.create_server((host, int(port))),
        pytest.raises(ValueError, match=f"coordinator is '{address}'; allowed: a free port"),
    ):
        lifeline.meet(address, 2, 0, 0.5)


@pytest.mark.parametrize("lost", [0, 2])
def test_all_others_hear_who_is_lost(address, lost):
    lines = meet_all(address, [(3, 0), (3, 1), (3, 2)])
    ends: dict[int, list[str]] = {index: [] for index in range(3)}
    for index, line in enumerate(lines):
        if index != lost:
            watched(line, ends[index]).__enter__()
    for connection in lines[lost]._connections.values():
        connection.close()  # as the kernel does for a process that is killed
    time.sleep(1)
    for line in lines:
        line.close()
    for index in range(3):
        told = [f"process {lost} of the run is gone; --resume goes on"]
        assert ends[index] == ([] if index == lost else told)


@pytest.mark.parametrize("failed", matrix.fast([0, 1], [0]))
def test_one_that_fails_is_named_unless_all_end_by_themselves(address, monkeypatch, failed):
    monkeypatch.setattr(lifeline, "_GRACE", 0.1)
    monkeypatch.setattr(lifeline, "_PATIENCE", 0.5)
    lines = meet_all(address, [(3, 0), (3, 1), (3, 2)])
    ends: dict[int, list[str]] = {index: [] for index in range(3)}
    for index, line in enumerate(lines):
        watched(line, ends[index]).__enter__()
    lines[failed].__exit__(OSError, OSError("full"), None)
    # One of the others hears of it otherwise, and ends by itself in time.
    lines[2].__exit__(RuntimeError, RuntimeError("agreed"), None)
    time.sleep(1.5)
    waits = 1 - failed
    told = f"process {failed} of the run has failed; its last line says why; --resume goes on"
    assert ends == {failed: [], 2: [], waits: [told]}
    lines[waits].close()


def test_a_collective_that_fails_first_is_told_as_the_loss(address):
    lines, ends = meet_all(address, [(2, 0), (2, 1)]), []

    def lose():
        time.sleep(0.2)
        for connection in lines[1]._connections.values():
            connection.close()

    threading.Thread(target=lose).start()
    with pytest.raises(RuntimeError, match="gloo"), watched(lines[0], ends):
        raise RuntimeError("gloo: connection closed by peer")
    assert ends == ["process 1 of the run is gone; --resume goes on"]
    lines[1].close()


PROGRAM = """
import sys, time
from lats_optax.training import lifeline
with lifeline.meet(sys.argv[1], 2, int(sys.argv[2]), 20).watch("; resume"):
    print("met", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("killed", matrix.fast([0, 1], [0]))
def test_a_killed_process_ends_the_other_with_one_line(address, killed):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == "met\n"
        processes[killed].kill()
        begin = time.monotonic()
        _, err = processes[1 - killed].communicate(timeout=30)
        assert time.monotonic() - begin < 20
        assert processes[1 - killed].returncode == lifeline.LOST
        assert err == f"lats-train: error: process {killed} of the run is gone; resume\n"
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def start(address, index, workdir, *more):
    """`lats-train` as one of two processes."""
    join = ["--distributed", "--coordinator", address, "--num-processes", "2"]
    arguments = ["digits-lats", *join, "--process-id", str(index), "--workdir", str(workdir)]
    main = "import sys; from lats_optax import cli; sys.exit(cli.train(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", main, *arguments, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        },
    )


@pytest.mark.slow
def test_a_run_whose_other_process_does_not_come_ends_in_time(address, tmp_path):
    begin = time.monotonic()
    alone = start(address, 0, tmp_path, "--process-timeout", "2")
    _, err = alone.communicate(timeout=60)
    assert time.monotonic() - begin < 50
    assert alone.returncode == 2
    assert err == f"lats-train: error: num_processes is 2; missing at {address}: process 1\n"


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_run_that_loses_a_process_ends_in_time(address, tmp_path, killed):
    often = ["--checkpoint-every", "1", "--eval-every", "100", "--epochs", "100"]
    processes = [start(address, index, tmp_path / "run", *often) for index in range(2)]
    try:
        end = time.monotonic() + 200
        while not list(tmp_path.glob("run/checkpoints/[0-9]*")):
            assert time.monotonic() < end
            time.sleep(0.2)
        processes[killed].kill()
        begin = time.monotonic()
        _, err = processes[1 - killed].communicate(timeout=60)
        assert time.monotonic() - begin < 30
        assert processes[1 - killed].returncode == lifeline.LOST
        # What libraries print of it, if anything, is above or below.
        assert (
            f"lats-train: error: process {killed} of the run is gone; the same command with "
            "--resume goes on"
        ) in err.splitlines()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
