"""Nothing fails in silence: every row of the tables in `tests/misuse/`."""

import importlib
import pkgutil

import pytest

from tests import misuse

# Rows that take more than about a second, most of them in compiling what they train.
SLOW = {
    "calibration: SparseGPT by diagonals",
    "calibration: a parameter used twice, and one never",
    "calibration: a singular Gram matrix",
    "calibration: a smaller last batch",
    "diagnosis: a layer that died as a whole",
    "diagnosis: a state that was lost",
    "diagnosis: a state that was lost, before the target was met again",
    "diagnosis: a survivor that is NaN",
    "diagnosis: an optimizer before it and another one within",
    "diagnosis: an optimizer for each part, and one within",
    "diagnosis: averaged afterwards",
    "diagnosis: averaged around it",
    "diagnosis: before Adam",
    "diagnosis: before an optimizer that diverges",
    "diagnosis: before the optimizer",
    "diagnosis: behind a partition of two optimizers",
    "diagnosis: calls for steps under MultiSteps",
    "diagnosis: calls for steps under MultiSteps, where half of the steps meet the target",
    "diagnosis: decayed afterwards",
    "diagnosis: epochs for steps",
    "diagnosis: everything masked, at the end",
    "diagnosis: gradients that are not finite",
    "diagnosis: plain sgd before it and the same within",
    "diagnosis: scaled afterwards",
    "diagnosis: sgd with a schedule before it and the same within",
    "diagnosis: sgd with injected hyperparameters before it and the same within",
    "diagnosis: the right steps",
    "diagnosis: the table of a run that stopped early",
    "diagnosis: too many steps, a target for each layer",
    "diagnosis: trained twice as long",
    "diagnosis: transforms of gradients before an optimizer within",
    "diagnosis: twice",
    "diagnosis: two steps of a run too few",
    "diagnosis: updates that apply_if_finite skipped",
    "diagnosis: updates that apply_if_finite skipped, made up for",
    "files: a model file that asks for huge images",
    "files: a threshold of another epoch than the checkpoint's",
    "files: the last threshold for a checkpoint of an earlier epoch",
    "masks: biases of attention heads have two dimensions",
    "masks: floats of Python as parameters",
    "masks: layers that Linen stacks for a scan",
    "masks: modules of Equinox that call everything weight",
    "masks: the keys of dropout among the state",
    "masks: the same in Linen",
    "numerics: all channels are equal",
    "numerics: all weights are equal, and one has to survive",
    "numerics: all weights of one of two layers are equal",
    "numerics: replicas of pmap whose gradients are averaged",
    "numerics: replicas of pmap whose gradients are not averaged",
    "numerics: seeds under vmap at different steps",
    "numerics: the closed loop under vmap over seeds",
    "numerics: the closed loop under vmap within vmap",
    "numerics: the derivative through a selection, blocks",
    "numerics: the derivative through a selection, weights",
    "numerics: the largest weights tie, beyond the target",
    "numerics: weights that are the same on all devices of a shard_map",
    "numerics: weights that are the same on all devices of an unchecked shard_map",
    "numerics: weights that differ between the devices of an unchecked shard_map",
    "numerics: weights too small for float16 beside latent weights in float32",
    "macs: a BCSR parameter",
    "stacked: a convolution taken for a stack of layers",
    "stacked: channels across attention within a scan, under lats_optax.groups.input_channels()",
    "stacked: channels across attention within a scan, under lats_optax.groups.output_channels()",
    "stacked: channels across experts in a scan, under lats_optax.groups.input_channels()",
    "stacked: channels across experts in a scan, under lats_optax.groups.output_channels()",
    "stacked: channels across vmapped experts in nnx, under lats_optax.groups.input_channels()",
    "stacked: channels across vmapped experts in nnx, under lats_optax.groups.output_channels()",
    "stacked: channels across vmapped layers of Equinox, under lats_optax.groups.input_channels()",
    "stacked: channels across vmapped layers of Equinox, under lats_optax.groups.output_channels()",
    "stacked: no warning of channels of modules of Equinox",
    "stacked: no warning of channels within attention in a scan",
    "stacked: no warning of channels within experts",
    "trainer: Ctrl-C in the last step",
    "trainer: Ctrl-C twice",
    "trainer: Ctrl-C while the model is written",
    "trainer: LATS with a late first epoch and a minimal rate implies one L1 coefficient",
    "trainer: Nesterov's momentum, and no decay of what normalizes, against optax",
    "trainer: a dense run whose batch statistics lag ends far below its training accuracy",
    "trainer: a run that meets its target says so",
    "trainer: a sparse file to begin a dense run from",
    "trainer: a target sparsity with a late first epoch and schedule epoch-lats",
    "trainer: a target sparsity with a late first epoch and schedule lats",
    "trainer: a target sparsity with a late first epoch and schedule s-lats",
    "trainer: the same, resumed as the warning says, without training again",
    "trainer: x64 is kept by the compiled steps of a preset: loss, learning rate and threshold",
}
CASES = [
    (f"{module.name}: {case.what}", case)
    for module in pkgutil.iter_modules(misuse.__path__)
    for case in importlib.import_module(f"tests.misuse.{module.name}").CASES
]


def test_slow_rows_are_rows():
    assert not SLOW - {name for name, _ in CASES}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=pytest.mark.slow if name in SLOW else ())
        for name, case in CASES
    ],
)
def test_case(case):
    case.expect(case.act)
