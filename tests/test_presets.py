"""Presets and model options: the published settings, written out, and what a user may get wrong."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import lats_optax
from lats_optax import cli, models
from lats_optax.training import assembly, experiment
from lats_optax.training.config import ModelConfig, PruneConfig, TrainConfig
from lats_optax.training.optimizer import make_optimizer
from lats_optax.training.parallel import PmapEngine
from lats_optax.training.presets import PRESETS
from tests import matrix

# The table "Training settings of the published runs", and the published commands.
IMAGENET = {
    "data.name": "imagenet2012",
    "data.batch_size": 256,
    "model.dtype": "float32",
    "optimizer.learning_rate": 0.256,
    "optimizer.warmup_epochs": 5,
    "optimizer.lr_update": "epoch",
    "optimizer.momentum": 0.875,
    "optimizer.weight_decay": 3.0517578125e-5,
    "prune.weight_decay_on": "latent",
    "label_smoothing": 0.1,
    "epochs": 100,
}
RESNET50 = IMAGENET | {"model.name": "resnet50"}
MOBILENET = IMAGENET | {"model.name": "mobilenet-v1"}
SEW = IMAGENET | {
    "model.name": "sew-resnet18",
    "model.time_steps": 4,
    "model.connection": "ADD",
    "model.neuron": "if",
    "model.stem": None,
    "optimizer.learning_rate": 0.1,
    "optimizer.warmup_epochs": 0,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 0.0,
    "label_smoothing": 0.0,
    "epochs": 320,
}
CIFAR = {
    "data.name": "cifar10",
    "data.batch_size": 128,
    "optimizer.learning_rate": 0.1,
    "optimizer.momentum": 0.9,
    "optimizer.warmup_epochs": 0,
    "label_smoothing": 0.0,
    "epochs": 160,
}
SEW_CIFAR = CIFAR | {
    "model.name": "sew-resnet18",
    "model.time_steps": 4,
    "model.stem": "cifar",
    "optimizer.weight_decay": 0.0,
}
VIT = {
    "data.name": "imagenet2012",
    "data.batch_size": 1024,
    "model.name": "vit-small",
    "model.width": None,
    "model.patch_size": None,
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 1e-3,
    "optimizer.momentum": 0.9,
    "optimizer.beta2": 0.999,
    "optimizer.weight_decay": 0.1,
    "optimizer.decay_norm": False,
    "optimizer.clip_norm": 1.0,
    "optimizer.warmup_epochs": 8,
    "optimizer.lr_update": "step",
    "label_smoothing": 0.0,
    "epochs": 90,
}
DENSE = {"prune.target_sparsity": None, "prune.final_threshold": None}


def sparse(target, schedule, beta=None, exclude=()):
    return {
        "prune.target_sparsity": target,
        "prune.schedule": schedule,
        "prune.beta": beta,
        "prune.include": (),
        "prune.exclude": exclude,
    }


def on_cifar(model, weight_decay):
    return CIFAR | {"model.name": model, "optimizer.weight_decay": weight_decay}


SETTINGS = {
    "imagenet-resnet50-dense": RESNET50 | DENSE,
    "imagenet-resnet50-lats": RESNET50 | sparse(0.9, "epoch-lats"),
    "imagenet-resnet50-s-lats": RESNET50 | sparse(0.9, "s-lats"),
    "imagenet-resnet50-s-lats-1024": RESNET50
    | sparse(0.9, "s-lats")
    | {"data.batch_size": 1024, "optimizer.learning_rate": 0.512},
    "imagenet-resnet50-pgh": RESNET50 | sparse(0.9, "pgh", beta=0.01),
    "imagenet-mobilenet-v1-dense": MOBILENET | DENSE,
    "imagenet-mobilenet-v1-lats": MOBILENET | sparse(0.8, "epoch-lats"),
    "imagenet-mobilenet-v1-s-lats": MOBILENET | sparse(0.8, "s-lats"),
    "imagenet-sew-resnet18-dense": SEW | DENSE,
    "imagenet-sew-resnet18-lats": SEW | sparse(0.9, "epoch-lats", exclude=("classifier",)),
    "imagenet-sew-resnet18-s-lats": SEW | sparse(0.9, "s-lats", exclude=("classifier",)),
    "imagenet-vit-s16-dense": VIT | DENSE,
    "imagenet-vit-s16-target": VIT | sparse(0.8, "lats") | {"prune.operator": None},
    "cifar10-resnet20-dense": on_cifar("resnet20", 1e-4) | DENSE,
    "cifar10-resnet20-lats": on_cifar("resnet20", 1e-4) | sparse(0.9, "lats"),
    "cifar10-resnet32-dense": on_cifar("resnet32", 1e-4) | DENSE,
    "cifar10-resnet32-lats": on_cifar("resnet32", 1e-4) | sparse(0.9, "lats"),
    "cifar10-vgg16-dense": on_cifar("vgg16-bn", 5e-4) | DENSE,
    "cifar10-vgg16-lats": on_cifar("vgg16-bn", 5e-4) | sparse(0.95, "lats"),
    "cifar10-sew-resnet18-dense": SEW_CIFAR | DENSE,
    "cifar10-sew-resnet18-lats": SEW_CIFAR | sparse(0.9, "lats", exclude=("classifier",)),
}


def test_every_preset_is_in_the_table():
    run_here = {"digits", "digits-lats", "fashion-mnist", "fashion-mnist-lats"}
    run_here |= {"fashion-mnist-vit", "fashion-mnist-vit-target"}
    assert PRESETS.keys() - run_here == SETTINGS.keys()
    for name, preset in PRESETS.items():
        assert preset.config.workdir == Path("runs") / name
        assert preset.description.startswith(f"lats-train {name}: ")


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_these(name):
    preset = PRESETS[name]
    for path, expected in SETTINGS[name].items():
        value = preset.config
        for field in path.split("."):
            value = getattr(value, field)
        assert value == expected, path
    assert preset.config.eval_every == preset.config.checkpoint_every == 1
    for words in ("not run here", "Settings: ", "Not run here: "):
        assert words in preset.description


# Parameters of each network, with the classes of its data set, and those of them that are pruned.
NETWORKS = {
    "imagenet-resnet50-s-lats": (1000, 224, 25_556_032, 25_502_912),
    "imagenet-mobilenet-v1-s-lats": (1000, 224, 4_230_976, 4_209_088),
    # With a dense classifier of 512 × 1000 weights and 1000 biases, and 9,600 of normalization.
    "imagenet-sew-resnet18-s-lats": (1000, 224, 11_689_512, 11_689_512 - 513_000 - 9_600),
    # Patches, twelve blocks of 12 c² and a classifier, of c = 384 channels.
    "imagenet-vit-s16-target": (1000, 224, 22_050_664, 768 * 384 + 144 * 384**2 + 384_000),
    # Of c = 96: kernels, then biases and norms, the class token and 50 positions.
    "fashion-mnist-vit-target": (
        *(10, 28, 16 * 96 + 48 * 96**2 + 960 + (96 + 4 * 13 * 96 + 2 * 96 + 10) + 96 + 50 * 96),
        16 * 96 + 48 * 96**2 + 960,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_step_of_a_preset_needs_no_data(name):
    """Shapes alone: state and metrics of the real step, at the real size."""
    classes, size, parameters, pruned = NETWORKS[name]
    config = PRESETS[name].config
    model = assembly.make_model(config, classes, PmapEngine.axis_name)
    optimizer = make_optimizer(config, steps_per_epoch=10)
    (phase,) = optimizer.phases
    step = assembly.bind_step(config, model, phase)
    channels = 1 if config.data.name == "fashion_mnist" else 3
    batch = {
        "image": jax.ShapeDtypeStruct((1, 2, size, size, channels), jnp.float32),
        "label": jax.ShapeDtypeStruct((1, 2), jnp.int32),
    }
    state = jax.eval_shape(assembly.bind_state(config, model, phase, (size, size, channels)))
    mean = lambda tree: jax.lax.pmean(tree, "replica")  # noqa: E731
    replicas = jax.vmap(
        lambda state, batch: step(state, batch, mean),
        in_axes=(None, 0),
        out_axes=None,
        axis_name="replica",
    )
    after, metrics = jax.eval_shape(replicas, state, batch)
    assert after == state
    assert metrics.keys() == {"loss", "accuracy", "gradient_norm"}
    latent = optax.tree.get(state.opt_state, "latent")
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == parameters
    assert sum(leaf.size for leaf in jax.tree.leaves(latent)) == pruned


@pytest.mark.slow
def test_published_thresholds_can_be_given(capsys):
    """The command that the notes of the presets name."""
    parsed = []

    def build(config):
        parsed.append(config)
        raise ValueError("far enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "build", build)
        for name in ("imagenet-resnet50-s-lats", "imagenet-resnet50-pgh"):
            options = ["--prune.target-sparsity", "None", "--prune.final-threshold", "0.01"]
            assert cli.train([name, *options]) == 2
    assert "far enough" in capsys.readouterr().err
    assert [config.prune for config in parsed] == [
        PruneConfig(final_threshold=0.01, schedule="s-lats", operator="soft"),
        PruneConfig(final_threshold=0.01, schedule="pgh", beta=0.01, operator="soft"),
    ]


def test_help_is_short_for_all_and_long_for_one(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.train(["--help"])
    everything = capsys.readouterr().out
    assert all(name in everything for name in PRESETS)
    assert "Appendix I" not in everything
    assert everything.count("\n") < 4 * len(PRESETS)
    with pytest.raises(SystemExit, match="0"):
        cli.train(["imagenet-resnet50-pgh", "--help"])
    assert "Appendix I" in capsys.readouterr().out


# Model options


def test_options_reach_the_model():
    config = ModelConfig(
        name="sew-resnet34",
        dtype="bfloat16",
        width=0.5,
        classifier_bias=False,
        time_steps=2,
        connection="IAND",
        neuron="plif",
        stem="cifar",
    )
    model = assembly.make_model(TrainConfig(model=config), num_classes=7)
    assert isinstance(model, models.SEWResNet)
    assert (model.depth, model.num_classes, model.dtype) == (34, 7, jnp.bfloat16)
    assert (model.width, model.classifier_bias, model.time_steps) == (0.5, False, 2)
    assert (model.connection, model.neuron, model.stem) == ("IAND", models.Neuron("plif"), "cifar")
    config = ModelConfig("vit-base", width=0.5, depth=3, patch_size=8)
    model = assembly.make_model(TrainConfig(model=config), num_classes=7)
    assert isinstance(model, models.VisionTransformer)
    assert (model.size, model.width, model.depth, model.patch_size) == ("base", 0.5, 3, 8)


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("sew-resnet18", models.SEWResNet, {"time_steps", "connection", "neuron", "stem"}),
        ("vit-tiny", models.VisionTransformer, {"depth", "patch_size"}),
    ],
)
def test_options_that_are_not_given_are_the_models_own(name, kind, options):
    model = assembly.make_model(TrainConfig(model=ModelConfig(name)), num_classes=7)
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    for option in options | {"width", "classifier_bias"}:
        assert getattr(ModelConfig(name), option) is None
        assert getattr(model, option) == fields[option]


@pytest.mark.parametrize(
    ("arguments", "words"),
    matrix.fast(
        [
            (["--model.name", "resnet19"], ["resnet19", "'digits-cnn', 'resnet18'"]),
            (["--model.connection", "XOR"], ["'digits-cnn'", "'connection'", "'width'"]),
            (["--model.name", "resnet20", "--model.time-steps", "2"], ["'time_steps'", "'width'"]),
            (["--model.name", "sew-resnet18", "--model.connection", "XOR"], ["'XOR'", "'IAND'"]),
            (["--model.name", "sew-resnet18", "--model.neuron", "izh"], ["'izh'", "'plif'"]),
            (["--model.name", "sew-resnet18", "--model.stem", "big"], ["'big'", "'cifar'"]),
            (
                ["--model.name", "sew-resnet18", "--model.time-steps", "0"],
                ["time_steps is 0", "1 or more"],
            ),
            (["--model.name", "vgg16-bn"], ["(1, 8, 8, 1)", "at least 32"]),
            (["--model.name", "vit-tiny"], ["(1, 8, 8, 1)", "at least 16"]),
            (
                ["--model.name", "vit-tiny", "--model.patch-size", "3"],
                ["multiples of patch_size, 3"],
            ),
            (["--model.name", "vit-tiny", "--model.depth", "0"], ["depth is 0", "1 to 100"]),
            (["--model.patch-size", "2"], ["'digits-cnn'", "'patch_size'", "'width'"]),
            (["--model.width", "0"], ["width is 0.0", "to 1000"]),
            (["--model.classifier-bias", "maybe"], ["--model.classifier-bias", "maybe"]),
        ],
        4,
    ),
)
def test_a_wrong_model_is_one_line(tmp_path, capsys, arguments, words):
    assert cli.train(["digits", *arguments, "--workdir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("lats-train: error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_sparsity_report_leaves_the_classifier_of_a_spiking_network_dense():
    config = PRESETS["cifar10-sew-resnet18-lats"].config
    mask = make_optimizer(config, steps_per_epoch=1).mask
    params = {"stem": {"kernel": jnp.ones((2, 2))}, "classifier": {"kernel": jnp.ones((2, 2))}}
    assert lats_optax.sparsity(params, mask).size == 4
