"""Sizes at which 32 bits do not suffice, in sparse files: bytes and elements of a tensor, and where in a file one begins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import merge
from tests.pico import write_checkpoint
from tests.scene import call

ROWS, COLUMNS = 2**16, 2**15 + 8
"""Of a bfloat16 matrix: more than 2^31 elements, so more than 2^32 bytes."""
ENDS = {(0, 0): 1.0, (ROWS // 2, 7): 2.0, (ROWS - 1, COLUMNS - 1): 3.0}
NBYTES = 2 * ROWS * COLUMNS

pytestmark = pytest.mark.slow


def write_sparse(folder: Path, factor: float) -> Path:
    """A checkpoint of one large matrix of zeros but for ENDS times a factor, and of one number behind it."""
    write_checkpoint(folder, {"last.weight": torch.ones(1)}, {"model_type": "unknown"})
    header = {
        "large.weight": {"dtype": "BF16", "shape": [ROWS, COLUMNS], "data_offsets": [0, NBYTES]},
        "last.weight": {"dtype": "BF16", "shape": [1], "data_offsets": [NBYTES, NBYTES + 2]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        begin = file.tell()
        for (row, column), value in ENDS.items():
            file.seek(begin + 2 * (row * COLUMNS + column))
            file.write(bfloat16(value * factor))
        file.seek(begin + NBYTES)
        file.write(bfloat16(factor))
    return folder


def bfloat16(value: float) -> bytes:
    return torch.tensor(value).bfloat16().view(torch.int16).item().to_bytes(2, "little", signed=True)


def test_a_tensor_of_more_than_32_bits_of_elements_and_bytes(tmp_path: Path):
    """base + 0.5 (model - base): 1 and 3 of the base and the model give 2."""
    if shutil.disk_usage(tmp_path).free < 2 * NBYTES:
        pytest.skip("too little disk")
    base, model = write_sparse(tmp_path / "base", 1.0), write_sparse(tmp_path / "model", 3.0)
    inputs = ["--base_model", base, "--models_to_merge", model, "--save_path", tmp_path / "out", "--report=none"]
    call(merge, "--method=task_arithmetic", "--lambda=0.5", *inputs)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        merged = file.get_slice("large.weight")
        for (row, column), value in ENDS.items():
            found = merged[row : row + 1]
            assert found[0, column] == 2 * value
            assert torch.count_nonzero(found) == 1
        assert file.get_tensor("last.weight").tolist() == [2.0]
    shutil.rmtree(tmp_path / "out")  # which is not sparse
