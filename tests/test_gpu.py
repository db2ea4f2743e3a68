"""What a GPU gives, against the CPU. Without one, `TEST_DEVICE=cpu` runs the same code, as `benchmarks/gpu.py --dry` does."""

import os

import pytest
import torch
from safetensors.torch import load_file

from aim.calibrate import CalibrationOptions, calibrate
from aim.calibration_text import CalibrationData
from benchmarks.synthetic import Shape, make_checkpoints
from checkpoints.model import open_model
from commands import merge, perform_aim
from merging.methods import METHODS, get_method
from merging.randomness import drop
from streaming.blocks import Block, Region, TensorSpec
from streaming.elements import Tensors, hash_range
from tests.in_memory import required_flags
from tests.reference.of_method import find
from tests.scene import call

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"),
]
SMOOTH = [name for name in METHODS if not get_method(name).needs_data and not find(name).jumps]
"""Methods for which a last bit changes no rank and no threshold by much; a count of the others' differences is in the benchmark."""
SHAPE = Shape(hidden=128, layers=3, intermediate=256, heads=4, kv_heads=2, vocabulary=512)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A random Llama and three fine-tunes."""
    return make_checkpoints(tmp_path_factory.mktemp("family"), SHAPE, 3, say=lambda line: None)


def tensors(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def steps_between(one, other):
    """The largest distance between two results, in steps of bfloat16."""
    assert one.keys() == other.keys()
    return max(
        int((one[name].view(torch.int16).int() - other[name].view(torch.int16).int()).abs().max()) for name in one
    )


def on_both(command, flags, tmp_path):
    results = []
    for device in ("cpu", DEVICE):
        call(command, *flags, "--save_path", tmp_path / device, "--device", device, "--overwrite")
        results.append(tensors(tmp_path / device))
    return results


def test_hashes_and_masks_are_the_cpus_to_the_bit():
    for start, count in ((0, 1000), ((1 << 31) - 500, 1000), ((1 << 40) + 3, 1000)):
        of = (start, start + count, lambda high: (7, 11))
        on_cpu = hash_range(*of, torch.device("cpu"))
        assert torch.equal(hash_range(*of, torch.device(DEVICE)).cpu(), on_cpu)
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    region = Region(TensorSpec("w", (1 << 20,)), 5, 100_005)
    blocks = [Block(region, None, [values.to(device)], []) for device in ("cpu", DEVICE)]
    kept = [drop(Tensors(block), block.task_vectors[0], 0.3, seed=3, tensor="w", model=1).cpu() for block in blocks]
    assert torch.equal(*kept)


@pytest.mark.parametrize("method", SMOOTH)
def test_merges_are_the_cpus_to_one_rounding(method, family, tmp_path):
    """Thresholds and masks too: a number that was kept on one side alone would be many steps away."""
    cls = get_method(method)
    models = ",".join(map(str, family.fine_tunes[: cls.max_models or None]))
    flags = ["--method", method, "--base_model", family.base, "--models_to_merge", models, *required_flags(method)]
    one, other = on_both(merge, flags, tmp_path)
    assert steps_between(one, other) <= 1


@pytest.mark.parametrize("protect", ["channels", "mean"])
def test_relaxed_weights_are_the_cpus_to_one_rounding(protect, family, tmp_path):
    statistics = tmp_path / "statistics.safetensors"
    data = CalibrationData(str(family.texts), n_samples=4, block_size=64)
    calibrate(open_model(str(family.base)), data, CalibrationOptions(device=torch.device("cpu"))).save(statistics)
    given = [
        "--merged_model",
        family.fine_tunes[2],
        "--pretrained_model_name",
        family.base,
        "--activations",
        statistics,
    ]
    one, other = on_both(perform_aim, [*given, "--omega", "0.2", "--protect", protect], tmp_path)
    assert steps_between(one, other) <= 1


def test_regmean_is_the_cpus_to_float32_rounding(family, tmp_path):
    texts = ",".join([str(family.texts)] * 3)
    files = ["--base_model", family.base, "--models_to_merge", ",".join(map(str, family.fine_tunes))]
    one, other = on_both(merge, ["--method", "regmean", *files, "--model_data", texts, "--dtype", "float32"], tmp_path)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_calibration_is_the_cpus_to_float32_rounding_as_a_whole_and_layer_by_layer(family):
    base = open_model(str(family.base))
    data = CalibrationData(str(family.texts), n_samples=8, block_size=64)
    expected = calibrate(base, data, CalibrationOptions(device=torch.device("cpu"), dtype="float32")).statistics
    for mode in ("whole", "layerwise"):
        options = CalibrationOptions(device=torch.device(DEVICE), dtype="float32", mode=mode, batch_size=2)
        found = calibrate(base, data, options).statistics
        assert found.keys() == expected.keys()
        for name, statistics in found.items():
            torch.testing.assert_close(statistics.mean_abs, expected[name].mean_abs, rtol=1e-3, atol=1e-5, msg=name)
