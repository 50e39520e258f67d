"""The whole path on small real data: the ImageNet presets, from JPEG files to accuracy.

Tar files such as ImageNet's are prepared by TFDS's own builder; the command trains on eight
devices, is interrupted, resumed and evaluated. Reduced are width, resolution, batch and steps.
"""

import io
import signal
from functools import partial

import jax
import numpy as np
import pytest
import scipy.special
from flax import traverse_util
from PIL import Image

from lats_optax import cli, models
from lats_optax.data.normalization import IMAGENET_MEAN, IMAGENET_STD
from lats_optax.data.prepare import prepare
from lats_optax.data.tfds_source import Records, open_builder
from lats_optax.training.checkpoint import load_variables
from lats_optax.training.logging import read_metrics
from lats_optax.training.presets import PRESETS
from tests import small_imagenet
from tests.runs import at_step

TRAIN, VALIDATION, BATCH, SIZE, WIDTH = 40, 21, 16, 64, 0.125
STEPS = 2 * (TRAIN // BATCH)
IMAGENET = [name for name in PRESETS if name.startswith("imagenet-")]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    small_imagenet.write(path, TRAIN, VALIDATION, sizes=(70, 120))
    return path


# Each compiles a network for eight devices; in `test_data_tfds` a tiny one goes the same way.
@pytest.mark.slow
# In four steps of narrow networks layers die; the run says so.
@pytest.mark.filterwarnings("ignore:opt_state. every weight of")
@pytest.mark.parametrize("name", IMAGENET)
def test_a_preset_trains_resumes_and_is_evaluated(data_dir, tmp_path, monkeypatch, capsys, name):
    command = [
        *(name, "--data.data-dir", str(data_dir), "--data.image-size", str(SIZE)),
        *("--data.batch-size", str(BATCH), "--model.width", str(WIDTH)),
        *("--epochs", "2", "--optimizer.warmup-epochs", "1", "--log-every", "1"),
        *("--optimizer.learning-rate", "0.01"),
        *("--workdir", str(tmp_path / "run")),
    ]
    assert len(jax.devices()) == 8
    with monkeypatch.context() as context:
        at_step(context, 3, lambda: signal.raise_signal(signal.SIGTERM))
        assert cli.train(command) == 130
    assert "after step 3; --resume" in capsys.readouterr().err
    assert cli.train([*command, "--resume"]) == 0
    out = capsys.readouterr().out

    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    training = [record for record in records if record["split"] == "train"]
    assert [record["step"] for record in training] == list(range(1, STEPS + 1))
    assert all(np.isfinite(record["loss"]) for record in training)

    variables = load_variables(tmp_path / "run")
    prune = PRESETS[name].config.prune
    kernels = {
        path: leaf
        for path, leaf in traverse_util.flatten_dict(variables["params"], sep="/").items()
        if path.endswith("/kernel") and not path.startswith(prune.exclude or ("none",))
    }
    size = sum(leaf.size for leaf in kernels.values())
    zeros = sum(int((leaf == 0).sum()) for leaf in kernels.values())
    assert zeros == round((prune.target_sparsity or 0) * size)
    assert f"{zeros / size:.2%}" in out

    accuracy, loss = evaluated_plainly(name, variables, data_dir)
    assert records[-1]["split"] == "test"
    assert records[-1]["accuracy"] == pytest.approx(accuracy)
    assert records[-1]["loss"] == pytest.approx(loss, rel=1e-4)


def evaluated_plainly(name, variables, data_dir):
    """Accuracy and loss, image by image: Pillow alone, one device, no batches of the pipeline's."""
    model = PRESETS[name].config.model
    network = models.create(model.name, num_classes=1000, width=WIDTH)
    images, labels = [], []
    for record in validation_records(data_dir):
        image = Image.open(io.BytesIO(record["image"]))
        short = round(SIZE * 256 / 224)
        width, height = (int(short * side / min(image.size)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
        pixels = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)), np.float64)
        images.append((pixels / 255 - IMAGENET_MEAN) / IMAGENET_STD)
        labels.append(int(record["label"]))
    apply = jax.jit(partial(network.apply, train=False))
    logits = np.asarray(apply(variables, np.stack(images).astype(np.float32)), np.float64)
    log_p = scipy.special.log_softmax(logits, axis=1)
    losses = -log_p[np.arange(VALIDATION), labels]
    return np.mean(logits.argmax(axis=1) == labels), np.mean(losses)


def validation_records(data_dir):
    records = Records(open_builder("imagenet2012", str(data_dir)), "validation")
    assert len(records) == VALIDATION
    return [records[index] for index in range(len(records))]


def test_preparing_again_changes_nothing(data_dir):
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*") if path.is_file()}
    prepare("imagenet2012", str(data_dir))
    assert before == {path: path.stat().st_mtime_ns for path in before}
