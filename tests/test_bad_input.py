"""What a user types wrong, a line a case: exit code 2, one readable line, nothing written.

A line holds the arguments of `lats-train` and, behind `=>`, what the message says is allowed. It
names the last option and its value, too.
"""

import re
import shlex

import pytest

from lats_optax import cli
from tests import matrix, tiny

TINY = "--data.batch-size 8"
JOIN = "--distributed --coordinator host:1 --num-processes 2"
FLOAT32 = "1.2e-38 to 3.4e+38, the numbers of float32"
WHOLE = "invalid literal for int"
SPARSE = "without prune.target_sparsity or prune.final_threshold"

RUN = f"""
digits --epochs 0 => 1 or more
digits --epochs -1 => 1 or more
digits --epochs 1.5 => {WHOLE}
digits --epochs 1e3 => {WHOLE}
digits --epochs many => {WHOLE}
digits {TINY} --epochs 99999999999 => at most 100,000,000 steps, or 16,666,666 epochs of 6 steps
digits --seed -1 => 0 <= seed < 2**32
digits --seed 4294967296 => 0 <= seed < 2**32
digits --seed 1.5 => {WHOLE}
digits --label-smoothing 1 => 0 <= label_smoothing < 1
digits --label-smoothing -0.1 => 0 <= label_smoothing < 1
digits --label-smoothing nan => 0 <= label_smoothing < 1
digits --ema-decay 1 => 0 < ema_decay < 1
digits --ema-decay 0 => 0 < ema_decay < 1
digits --ema-decay nan => 0 < ema_decay < 1
digits --bn-recalibration-batches -1 => 0 or more
digits-lats {TINY} --bn-recalibration-batches 99999999999 => at most 50, which an epoch of 6 batches
digits --log-every 0 => 1 to 2147483647
digits --log-every 99999999999999999999 => 1 to 2147483647
digits --eval-every 0 => 1 to 2147483647
digits --checkpoint-every 0 => 1 to 2147483647
digits --keep-checkpoints 0 => 1 to 2147483647
digits --workdir /dev/null => a directory
digits --workdir nope://bucket/run => gs://, s3:// and what else fsspec knows
digits --init-from nope://bucket/model => gs://, s3:// and what else fsspec knows
digits --workdir ~nobody-of-this-name/run => a path of this machine
digits {TINY} --init-from /dev/null => a model file that is there
digits {TINY} --init-from no => a model file that is there
digits --init-from ~nobody-of-this-name/model => a path of this machine
digits --resume --overwrite => one of the two
digits --distributed => SLURM
digits --coordinator host:1 => with distributed
digits --num-processes 2 => with coordinator
digits --process-id 0 => with coordinator
digits {JOIN} --coordinator host => HOST:PORT
digits {JOIN} --coordinator host:port => HOST:PORT
digits {JOIN} --coordinator host:0 => a port from 1 to 65535
digits {JOIN} --coordinator host:99999 => a port from 1 to 65535
digits --process-timeout 10 => the default without distributed
digits {JOIN} --process-id 0 --process-timeout 0 => 1 to 2147483647
digits {JOIN} --process-id 2 => 0 to 1
digits {JOIN} --process-id -1 => 0 to 1
digits {JOIN} --process-id 0 --num-processes 0 => 1 or more
"""

DATA = f"""
digits --data.batch-size 0 => 1 or more
digits --data.batch-size -8 => 1 or more
digits --data.batch-size 1e9 => {WHOLE}
digits --data.batch-size 12 => on 8 devices: a multiple of 8
digits --data.batch-size 99999999992 => at most 53, the training images
digits --data.image-size 0 => 1 or more
digits --data.image-size -3 => 1 or more
digits --data.workers -1 => 0 to 1024
digits --data.workers 99999999 => 0 to 1024
digits --data.synthetic-examples 10 => but for the data set synthetic
digits --data.synthetic-classes 10 => but for the data set synthetic
digits --data.name synthetic --data.synthetic-examples 0 => 1 to 2147483647
digits --data.name synthetic --data.synthetic-examples 99999999999999 => 1 to 2147483647
digits --data.name synthetic --data.synthetic-classes 0 => 1 to 2147483647
digits --data.name synthetic --data.synthetic-classes 99999999999 => 1 to 2147483647
"""

OPTIMIZER = f"""
digits --optimizer.learning-rate 0 => {FLOAT32}
digits --optimizer.learning-rate -1 => {FLOAT32}
digits --optimizer.learning-rate nan => {FLOAT32}
digits --optimizer.learning-rate inf => {FLOAT32}
digits --optimizer.learning-rate 1e39 => {FLOAT32}
digits --optimizer.learning-rate 1e-60 => {FLOAT32}
digits --optimizer.learning-rate 0,3 => could not convert
digits --optimizer.momentum 1 => 0 <= momentum < 1
digits --optimizer.momentum -0.1 => 0 <= momentum < 1
digits --optimizer.momentum nan => 0 <= momentum < 1
digits --optimizer.weight-decay -1 => 0, or {FLOAT32}
digits --optimizer.weight-decay nan => 0, or {FLOAT32}
digits --optimizer.weight-decay 1e39 => 0, or {FLOAT32}
digits --optimizer.weight-decay 1e-60 => 0, or {FLOAT32}
digits --optimizer.momentum 0 --optimizer.nesterov => False without momentum
digits --optimizer.no-decay-norm => True without weight_decay
digits --optimizer.minimum-learning-rate 1 => below learning_rate, 0.3
digits --optimizer.minimum-learning-rate -1 => 0 or more
digits --optimizer.minimum-learning-rate nan => 0 or more
digits --optimizer.warmup-epochs -1 => 0 or more
digits --optimizer.warmup-epochs 20 => less than epochs, 20
digits --grad-accum-steps 0 => 1 or more
digits --data.batch-size 64 --grad-accum-steps 3 => a multiple of 24
digits --data.batch-size 64 --grad-accum-steps 9999999 => a multiple of 79999992
digits --optimizer.name adam => Expected one of
digits --optimizer.beta2 0.9 => the default, but for adamw
digits --optimizer.name adamw --optimizer.beta2 1 => 0 < beta2 < 1
digits --optimizer.clip-norm 0 => {FLOAT32}
digits --optimizer.clip-norm nan => {FLOAT32}
digits --optimizer.lr-update never => Expected one of
"""

PRUNE = f"""
digits --prune.target-sparsity 1 => 0 <= target_sparsity < 1
digits --prune.target-sparsity 95 => 0 <= target_sparsity < 1
digits --prune.target-sparsity -0.1 => 0 <= target_sparsity < 1
digits --prune.target-sparsity nan => 0 <= target_sparsity < 1
digits --prune.target-sparsity 95% => FLOAT
digits --prune.final-threshold -1 => 0, or {FLOAT32}
digits --prune.final-threshold inf => 0, or {FLOAT32}
digits --prune.final-threshold nan => 0, or {FLOAT32}
digits --prune.final-threshold 1e39 => 0, or {FLOAT32}
digits-lats --prune.final-threshold 1 => one of the two
digits --prune.schedule linear => Expected one of
digits --prune.schedule pgh => 'lats' {SPARSE}
digits --prune.schedule s-lats => 'lats' {SPARSE}
digits-lats --prune.schedule constant => all but 'constant'
digits-lats --prune.schedule pgh --prune.beta 0 => {FLOAT32}
digits-lats --prune.schedule pgh --prune.beta nan => {FLOAT32}
digits-lats --prune.schedule pgh --prune.beta 1e300 => {FLOAT32}
digits-lats --prune.schedule pgh => with schedule pgh, a number above 0
digits --prune.final-threshold 1 --prune.schedule pgh => with schedule pgh, a number above 0
digits-lats --prune.beta 0.5 => None, but for schedule pgh
digits-lats --prune.granularity blocks => two numbers of 1 or more
digits-lats --prune.granularity n-of-m => with granularity n-of-m, N M with 1 <= N < M
digits-lats --prune.granularity n-of-m --prune.pattern 4 2 => N M with 1 <= N < M
digits-lats --prune.granularity n-of-m --prune.pattern 2 4 => up to 0.5 with pattern 2 4
digits-lats --prune.pattern 2 4 => None, but for granularity n-of-m
digits --parallel.fsdp 2 => 1, but for engine jit
digits --parallel.engine jit --parallel.fsdp 0 => 1 or more
digits {TINY} --parallel.engine jit --parallel.fsdp 3 => what divides 8
digits --parallel.engine xmap => Expected one of
digits --prune.beta 2 => None, but for schedule pgh
digits --prune.operator soft => None in a dense run
digits-lats --prune.operator softer => Expected one of
digits --prune.final-threshold 0.1 --prune.operator annealed => another one without target_sparsity
digits --prune.first-epoch 2 => 0 {SPARSE}
digits-lats --prune.first-epoch -1 => 0 or more
digits-lats --prune.first-epoch 20 => less than the epochs of the threshold, 20
digits --prune.reach 0.5 => None without a target_sparsity
digits-lats --prune.reach 0 => 0 < reach <= 1
digits-lats --prune.reach 1.5 => 0 < reach <= 1
digits-lats --prune.reach nan => 0 < reach <= 1
digits --prune.update-every 4 => None without a target_sparsity
digits-lats --prune.update-every 0 => 1 or more
digits-lats {TINY} --prune.update-every 99999999999999999999 => <= 2147483647
digits-lats {TINY} --prune.include ( => is not a regular expression
digits-lats {TINY} --prune.include Cnv => Conv_0/kernel
digits-lats {TINY} --prune.exclude ( => is not a regular expression
digits-lats {TINY} --prune.exclude Cnv => Conv_0/kernel
digits-lats {TINY} --prune.exclude . => at least one of the parameters
digits --prune.include kernel => none {SPARSE.replace(" or", ",")} or mode fine-tuning
digits --prune.exclude stem => none {SPARSE.replace(" or", ",")} or mode fine-tuning
digits --prune.weight-decay-on weights => 'latent' {SPARSE}
digits-lats --prune.weight-decay-on weights => 'latent' without optimizer.weight_decay
digits-lats --prune.weight-decay-on both => Expected one of
digits --prune.mode early => {SPARSE}
digits --prune.mode fine-tuning => fine-tuning with init_from
digits-lats --prune.mode late => Expected one of
digits-lats --prune.mode early --prune.search-epochs 0 => with mode early, 1 or more
digits-lats --prune.mode early --prune.search-epochs 20 => less than epochs, 20
digits-lats --prune.search-epochs 3 => None, but for the modes early and at-initialization
digits --prune.distribution erk => global without prune.target_sparsity
digits-lats --prune.distribution even => Expected one of
digits-lats --prune.layer-sparsity stem 0.5 => none without distribution uniform
digits-lats --prune.distribution uniform --prune.layer-sparsity stem 1.5 => 0 <= sparsity < 1
digits-lats --prune.distribution uniform --prune.layer-sparsity stem => Could not find valid parse
digits --prune.granularity filters => none {SPARSE}
digits-lats --prune.granularity rows => Expected one of
digits-lats --prune.block 4 4 => None, but for granularity blocks
digits-lats --prune.granularity blocks --prune.block 0 4 => two numbers of 1 or more
digits-lats --prune.granularity blocks --prune.block 4 => INT INT
"""

MODEL = """
digits --model.dtype float16 => Expected one of
digits --model.classifier-bias maybe => Expected one of
"""


def cases(*tables: str) -> list[tuple[str, str]]:
    """The lines of the tables, as arguments and what is allowed."""
    lines = [line for table in tables for line in table.strip().splitlines()]
    return [(arguments, allowed) for arguments, allowed in (line.split(" => ") for line in lines)]


def last_option(arguments: str) -> tuple[str, list[str]]:
    """The name of the last option and its values."""
    words = shlex.split(arguments)
    place = max(index for index, word in enumerate(words) if word.startswith("--"))
    return words[place], words[place + 1 :]


def assert_refused(capsys, arguments: list[str], directory) -> str:
    """Exit code 2, one line, nothing written; the line."""
    assert cli.train(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lats-train: error: ")
    assert err.count("\n") == 1
    assert not re.search("[-─]{3}", err)
    assert not any(directory.iterdir())
    return err


@pytest.mark.parametrize(("arguments", "allowed"), cases(RUN, DATA, OPTIMIZER, PRUNE, MODEL))
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, arguments, allowed):
    tiny.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    line = assert_refused(capsys, shlex.split(arguments), tmp_path)
    option, values = last_option(arguments)
    name = option.removeprefix("--").removeprefix("optimizer.no-")
    # A library that parses a value names the option; we name the field, or the part of it.
    assert re.sub(r"[-_.]", " ", name).split()[-1] in re.sub(r"[-_.]", " ", line)
    assert allowed in line
    for value in values:
        assert value in line or repr(float(value)) in line


ZOO = """
digts => known are: digits, digits-lats
digits extra => --help lists what is allowed
digits --prune.target-sparity 0.9 => perhaps you meant --prune.target-sparsity
digits --optimizer.nesterov True --optimizer.momentum 0 => --help lists what is allowed
digits --data.name '' => NAME, NAME/CONFIG
digits --data.name nope => 'digits', 'synthetic'
digits --data.name ../x => NAME, NAME/CONFIG
digits --data.name a/b/c:1.2.3 => NAME, NAME/CONFIG
digits --data.name digits:9.9.9 => lats-prepare digits:9.9.9
digits --data.image-size 999999999 => 8 or None
digits --data.eval-split nope => 'test' or None
digits --data.data-dir /dev/null => a directory
digits --model.name nope => 'digits-cnn', 'resnet18'
digits --model.width 0 => to 1000
digits --model.width -1 => to 1000
digits --model.width nan => to 1000
digits --model.width inf => to 1000
digits --model.width 1e9 => to 1000
digits --model.width 1e-9 => to 1000
digits --model.time-steps 4 => 'width', 'classifier_bias'
digits --model.connection ADD => 'width', 'classifier_bias'
digits --model.neuron if => 'width', 'classifier_bias'
digits --model.stem cifar => 'width', 'classifier_bias'
digits --model.depth 9 => 'width', 'classifier_bias'
digits --model.patch-size 4 => 'width', 'classifier_bias'
digits --model.name vit-tiny --model.depth 1000000000 => 1 to 100
digits --model.name vit-tiny --model.patch-size -4 => 1 or more
digits --model.name vit-tiny --model.patch-size 4 --model.width 0.001 => to 1000
digits-lats --prune.granularity blocks --prune.block 1099511627776 1 => <= 2147483647
digits-lats --prune.distribution uniform --prune.layer-sparsity ( 0.5 => regular expression
digits-lats --prune.distribution uniform --prune.layer-sparsity nothing 0.5 => stem/kernel
"""


@pytest.mark.parametrize(("arguments", "allowed"), matrix.fast(cases(ZOO), 3))
def test_a_name_that_nothing_has_is_one_line(tmp_path, monkeypatch, capsys, arguments, allowed):
    monkeypatch.chdir(tmp_path)
    assert allowed in assert_refused(capsys, shlex.split(arguments), tmp_path)


def test_a_model_beyond_the_memory_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["synthetic", "--data.synthetic-classes", "2000000000", "--data.image-size", "8"]
    line = assert_refused(capsys, ["digits", "--data.name", *arguments], tmp_path)
    assert "GB of parameters" in line
    assert "number of classes" in line
