"""What merge.py refuses: one clear message, exit code 2 (arguments) or 1 (content), nothing written, no input touched."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge
from checkpoints.errors import WriteError
from checkpoints.save_path import partial_folder
from checkpoints.staging import staged
from tests.fake_hub import FakeHub
from tests.pico import write_checkpoint
from tests.scene import Scene, call, names, snapshot

ROOT = Path(__file__).parent.parent
INPUTS = Path(__file__).parent / "goldens" / "inputs"
NORM = "model.norm.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"
DEEP = "[" * 100_000


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """A base and two models fine-tuned from it, and the command that merges them."""
    folder = tmp_path / "models"
    for name in ("base", "math", "code"):
        shutil.copytree(INPUTS / name, folder / name)
        (folder / name).chmod(0o755)
    return merging_scene(folder)


def merging_scene(folder: Path) -> Scene:
    models = names([folder / "math", folder / "code"])
    return Scene(folder, merge, {"--method": "ties", "--base_model": folder / "base", "--models_to_merge": models})


def test_the_scene_itself_merges(scene):
    _, out, err = scene.run()
    assert err == ""
    assert str(scene.out) in out


# ------------------------------------------------------------------------------------------------ weight files


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(weights(folder))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Write the tensors anew after `change`, which works in place."""
    content = tensors(folder)
    change(content)
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, weights(folder))


def rewrite_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON header of the weights and nothing else, not even its length."""
    content = weights(folder).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    weights(folder).write_bytes(content[:8] + text + content[8 + length :])


def shard(folder: Path) -> Path:
    """Store the weights in three files; gives the index."""
    content = tensors(folder)
    weights(folder).unlink()
    write_checkpoint(folder, content, json.loads((folder / "config.json").read_text()), shards=3)
    return folder / "model.safetensors.index.json"


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = shard(folder)
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


def add_to_first_shard(folder: Path, name: str) -> None:
    shard(folder)
    first = folder / "model-00001-of-00003.safetensors"
    save_file({**load_file(first), name: torch.ones(64, dtype=torch.bfloat16)}, first)


def as_header(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content


Spoil = Callable[[Path], object]
FILE = "model.safetensors"
SECOND = "model-00002-of-00003.safetensors"
SPOILT_WEIGHTS: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "no weights": (lambda m: weights(m).unlink(), (FILE, "pytorch_model.bin", "got config.json, tokenizer.json")),
    "adapter": (
        lambda m: (weights(m).unlink(), (m / "adapter_config.json").touch()),
        ("adapter_config.json", "expected JSON"),
    ),
    "empty": (lambda m: weights(m).write_bytes(b""), (FILE, "0 bytes", "download it again")),
    "truncated": (lambda m: os.truncate(weights(m), 100_000), (FILE, "expected 227056 bytes, got 100000", "download")),
    "one byte short": (lambda m: os.truncate(weights(m), 227_055), (FILE, "expected 227056 bytes, got 227055")),
    "cut in the header": (lambda m: os.truncate(weights(m), 300), (FILE, "300 bytes", "truncated")),
    "spare bytes": (
        lambda m: weights(m).write_bytes(weights(m).read_bytes() + b"?"),
        (FILE, "expected 227056 bytes, got 227057"),
    ),
    "garbage": (lambda m: weights(m).write_bytes(b"<!DOCTYPE html>" * 99), (FILE, "no safetensors file")),
    "huge header": (lambda m: weights(m).write_bytes(b"\xff" * 8 + b"{}"), (FILE, f"claims {2**64 - 1}")),
    "header of another type": (lambda m: weights(m).write_bytes(as_header(b"[1,2]")), (FILE, "JSON header")),
    "header no JSON": (lambda m: weights(m).write_bytes(as_header(b"{'a': 1}")), (FILE, "JSON header")),
    "header no text": (lambda m: weights(m).write_bytes(as_header(b"\xff\xfe{}")), (FILE, "JSON header")),
    "header too deep": (lambda m: weights(m).write_bytes(as_header(DEEP.encode())), (FILE, "JSON header")),
    "no tensors": (lambda m: weights(m).write_bytes(as_header(b"{}")), (FILE, "expected tensors, got none")),
    "no offsets": (lambda m: rewrite_header(m, lambda h: h[NORM].pop("data_offsets")), (FILE, NORM, "data_offsets")),
    "negative shape": (
        lambda m: rewrite_header(m, lambda h: h[NORM].update(shape=[-1])),
        (FILE, NORM, "whole numbers"),
    ),
    "shape and bytes differ": (
        lambda m: rewrite_header(m, lambda h: h[NORM].update(shape=[63])),
        (FILE, NORM, "expected 126 bytes"),
    ),
    "overlap": (
        lambda m: rewrite_header(m, lambda h: h[NORM].update(data_offsets=[0, 128])),
        (FILE, "got the range", "header is damaged"),
    ),
    "dtype unknown": (
        lambda m: rewrite_header(m, lambda h: h[NORM].update(dtype="F4")),
        (FILE, NORM, "'F4' is not supported", "BF16"),
    ),
    "git's pointer": (
        lambda m: weights(m).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        (FILE, "pointer", "git lfs pull"),
    ),
    "index wrong file": (
        lambda m: edit_index(m, lambda x: x.update({NORM: SECOND})),
        (NORM, f"the index puts it in {SECOND}", "headers in model-00003-of-00003.safetensors"),
    ),
    "index too much": (lambda m: edit_index(m, lambda x: x.update(ghost=SECOND)), ("ghost", SECOND, "no file")),
    "index too little": (lambda m: edit_index(m, lambda x: x.pop(NORM)), (NORM, "no file", "00003-of-00003")),
    "index missing file": (
        lambda m: edit_index(m, lambda x: x.update(ghost="model-00009.safetensors")),
        ("index.json", "not there", "model-00009.safetensors"),
    ),
    "index leads up": (lambda m: edit_index(m, lambda x: x.update(a="../base/x")), ("'../base/x'", "outside")),
    "index leads away": (lambda m: edit_index(m, lambda x: x.update(a="/etc/passwd")), ("'/etc/passwd'", "outside")),
    "index leads down": (lambda m: edit_index(m, lambda x: x.update(a="..")), ("'..'", "outside")),
    "index no JSON": (lambda m: shard(m).write_text("{"), ("index.json", "weight_map")),
    "index no map": (lambda m: shard(m).write_text('{"metadata": {}}'), ("index.json", "weight_map")),
    "index a list": (lambda m: shard(m).write_text('{"weight_map": ["a"]}'), ("index.json", "weight_map")),
    "index empty": (lambda m: shard(m).write_text('{"weight_map": {}}'), ("expected tensors, got none in its index",)),
    "index too deep": (lambda m: shard(m).write_text(DEEP), ("index.json", "weight_map")),
    "twice": (
        lambda m: add_to_first_shard(m, NORM),
        (NORM, "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors", "Remove one"),
    ),
    "missing tensor": (
        lambda m: rewrite(m, lambda t: t.pop(GATE)),
        (GATE, "expected as in", "base", "got no such tensor", "fine-tuned from this base"),
    ),
    "extra tensor": (
        lambda m: rewrite(m, lambda t: t.update({"model.extra.weight": torch.ones(2)})),
        ("model.extra.weight", "base has none, got one", "fine-tuned from this base"),
    ),
    "shape mismatch": (
        lambda m: rewrite(m, lambda t: t.update({GATE: torch.ones(128, 63, dtype=torch.bfloat16)})),
        (GATE, "[128, 64]", "[128, 63]", "base"),
    ),
    "transposed": (
        lambda m: rewrite(m, lambda t: t.update({GATE: t[GATE].T})),
        (GATE, "[128, 64]", "[64, 128]"),
    ),
    "int8 weights": (
        lambda m: rewrite(m, lambda t: t.update({GATE: t[GATE].to(torch.int8)})),
        (GATE, "float32, bfloat16, float16", "got int8", "unquantised"),
    ),
    "float8 weights": (
        lambda m: rewrite(m, lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)})),
        (GATE, "_scale_inv beside it, got none", "unquantised"),
    ),
    "GPTQ": (
        lambda m: rewrite(m, lambda t: t.update({GATE.replace("weight", "qweight"): torch.ones(2, dtype=torch.int32)})),
        ("gate_proj.qweight", "GPTQ", "unquantised"),
    ),
    "bitsandbytes": (
        lambda m: rewrite(m, lambda t: t.update({GATE + ".absmax": torch.ones(2)})),
        ("gate_proj.weight.absmax", "bitsandbytes", "unquantised"),
    ),
    "nan": (lambda m: rewrite(m, lambda t: t[GATE][3].fill_(torch.nan)), (GATE, "element 192 is nan", "damaged")),
    "inf": (lambda m: rewrite(m, lambda t: t[NORM][5:].fill_(torch.inf)), (NORM, "element 5 is inf", "damaged")),
    "beyond float32": (
        lambda m: rewrite(m, lambda t: t.update({NORM: torch.full((64,), 1e300, dtype=torch.float64)})),
        (NORM, "element 0 is 1e+300"),
    ),
    "minus inf": (lambda m: rewrite(m, lambda t: t[NORM][:1].fill_(-torch.inf)), (NORM, "element 0 is -inf")),
}


@pytest.mark.parametrize("case", SPOILT_WEIGHTS)
def test_weights_that_do_not_fit(scene, case):
    spoil, says = SPOILT_WEIGHTS[case]
    spoil(scene.math)
    message = scene.refuse(code=1, says=(str(scene.math), *says))
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("case", ["truncated", "garbage", "nan", "int8 weights", "index too little", "no weights"])
def test_a_base_that_does_not_fit(scene, case):
    spoil, says = SPOILT_WEIGHTS[case]
    spoil(scene.base)
    scene.refuse(code=1, says=(str(scene.base), *(part for part in says if part != "base")))


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "dare_linear", "dare_ties", "widen"])
def test_every_method_refuses_a_nan(scene, method):
    rewrite(scene.math, lambda t: t[GATE].view(-1)[-1:].fill_(torch.nan))
    scene.refuse(f"--method={method}", code=1, says=(str(scene.math), GATE, "element 8191 is nan"))


def test_all_problems_are_said_at_once(scene):
    rewrite(scene.math, lambda t: t.pop(GATE))
    rewrite(scene.folder / "code", lambda t: t.update({NORM: torch.ones(63)}))
    scene.out.mkdir()
    (scene.out / "precious").touch()
    message = scene.refuse(code=1, says=("3 problems", "not empty", GATE, NORM))
    assert len(message.splitlines()) == 4


def test_what_is_wrong_with_many_layers_is_one_problem(scene):
    rewrite(scene.math, lambda t: [t.pop(name) for name in list(t) if "gate_proj" in name])
    scene.refuse(code=1, says=("model.layers.0.mlp.gate_proj.weight and 1 more model.layers.*.mlp.gate_proj.weight",))


def test_every_model_that_cannot_be_opened_is_said(scene):
    weights(scene.base).unlink()
    weights(scene.math).write_bytes(b"")
    scene.refuse("--models_to_merge", f"{scene.math},{scene.folder / 'cod'}", code=1, says=("3 problems", "cod: "))


def test_merge_too_large_for_float16(scene):
    rewrite(scene.math, lambda t: t[NORM].fill_(70_000.0))
    flags = ("--method=task_arithmetic", "--dtype=float16")
    scene.refuse(*flags, code=1, says=(NORM, "float16", "65504", "--dtype bfloat16"))


def test_weights_that_change_while_they_are_read(scene, monkeypatch):
    from checkpoints.writer import CheckpointWriter

    sync = CheckpointWriter.sync

    def touch_and_sync(writer):
        os.utime(weights(scene.math), ns=(0, 0))
        return sync(writer)

    monkeypatch.setattr(CheckpointWriter, "sync", touch_and_sync)
    scene.refuse(code=1, says=(str(scene.math), FILE, "changed while it was read", "Run the command again"))


# --------------------------------------------------------------------------------------- config, tokenizer, quantised


def set_config(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


SPOILT_SIDE_FILES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "no config": (lambda m: (m / "config.json").unlink(), ("expected config.json", "got none")),
    "config no JSON": (lambda m: (m / "config.json").write_text("{"), ("config.json", "expected JSON")),
    "config a list": (lambda m: (m / "config.json").write_text("[]"), ("config.json", "object", "list")),
    "config no text": (lambda m: (m / "config.json").write_bytes(b"\xff\xfe"), ("config.json", "expected JSON")),
    "config too deep": (lambda m: (m / "config.json").write_text(DEEP), ("config.json", "expected JSON")),
    "quantised": (
        lambda m: set_config(m, quantization_config={"quant_method": "awq", "bits": 4}),
        ("quantised (awq)", "unquantised model"),
    ),
    "quantised, unnamed": (lambda m: set_config(m, quantization_config=True), ("quantised", "unquantised model")),
    "tokenizer no JSON": (lambda m: (m / "tokenizer.json").write_text("{"), ("tokenizer.json", "Download")),
    "tokenizer a list": (lambda m: (m / "tokenizer.json").write_text("[]"), ("tokenizer.json", "Download")),
    "tokenizer too deep": (lambda m: (m / "tokenizer.json").write_text(DEEP), ("tokenizer.json", "Download")),
    "tokenizer ids": (
        lambda m: (m / "tokenizer.json").write_text('{"model": {"vocab": {"a": "b"}}}'),
        ("tokenizer.json", "whole numbers"),
    ),
    "one id twice": (
        lambda m: (m / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 0}}}'),
        ("'a' and 'b'", "id 0"),
    ),
    "no token in common": (
        lambda m: (m / "tokenizer.json").write_text('{"model": {"vocab": {"never seen": 0}}}'),
        ("shares no token", "base"),
    ),
}


@pytest.mark.parametrize("case", SPOILT_SIDE_FILES)
def test_side_files_that_do_not_fit(scene, case):
    spoil, says = SPOILT_SIDE_FILES[case]
    spoil(scene.math)
    scene.refuse(code=1, says=(str(scene.math), *says))


def test_other_rows_and_no_tokenizer_to_match_them_by(scene):
    shutil.copytree(INPUTS / "instruct_pad", scene.folder / "pad")
    (scene.folder / "pad" / "tokenizer.json").unlink()
    (scene.folder / "pad" / "tokenizer_config.json").unlink()
    flags = ("--models_to_merge", f"{scene.math},{scene.folder / 'pad'}")
    scene.refuse(*flags, code=1, says=("model.embed_tokens.weight", "expected 300 rows", "got 301", "no tokenizer"))


def test_head_that_is_not_what_the_base_ties_it_to(scene):
    """The base ties head and embedding and stores one; a model has a head of its own."""
    for folder in (scene.base, scene.folder / "code"):
        rewrite(folder, lambda t: t.pop("lm_head.weight"))
        set_config(folder, tie_word_embeddings=True)
    says = ("lm_head.weight", "model.embed_tokens.weight", "ties it", "other numbers")
    scene.refuse(code=1, says=(str(scene.math), *says))


# ------------------------------------------------------------------------------------------------------- pickles


class Payload:
    """What a pickle from a stranger can hold: a call."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def as_pickle(folder: Path, content: Any, **keywords: Any) -> None:
    weights(folder).unlink()
    torch.save(content, folder / "pytorch_model.bin", **keywords)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_call_in_a_pickle_is_refused_and_not_made(scene, tmp_path, zipped):
    marker = tmp_path / "executed"
    as_pickle(scene.math, {**tensors(scene.math), "x": Payload(marker)}, _use_new_zipfile_serialization=zipped)
    scene.refuse(code=1, says=(str(scene.math), "pytorch_model.bin", "system", "Nothing in it was executed"))
    assert not marker.exists()
    (tmp_path / "plain.pickle").write_bytes(pickle.dumps(Payload(marker)))
    pickle.loads((tmp_path / "plain.pickle").read_bytes())  # the payload is a real one
    assert marker.exists()


def test_a_plain_pickle_with_a_call(scene, tmp_path):
    marker = tmp_path / "executed"
    weights(scene.math).unlink()
    (scene.math / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    scene.refuse(code=1, says=(str(scene.math), "pytorch_model.bin"))
    assert not marker.exists()


def corrupt_zip(folder: Path) -> None:
    """A zip archive whose directory is in order and whose pickle is not."""
    as_pickle(folder, tensors(folder))
    path = folder / "pytorch_model.bin"
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, b"\x80\x02}q" if entry.endswith("data.pkl") else old.read(entry))
    path.write_bytes(buffer.getvalue())


def cut_pickle(folder: Path, **keywords: Any) -> None:
    as_pickle(folder, tensors(folder), **keywords)
    os.truncate(folder / "pytorch_model.bin", 50_000)


BIN = "pytorch_model.bin"
SPOILT_PICKLES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "empty": (lambda m: (weights(m).unlink(), (m / BIN).touch()), ("torch checkpoint", "Download it again")),
    "garbage": (lambda m: (weights(m).unlink(), (m / BIN).write_bytes(b"no pickle" * 9)), (BIN,)),
    "cut zip": (cut_pickle, ("torch checkpoint",)),
    "cut old format": (lambda m: cut_pickle(m, _use_new_zipfile_serialization=False), (BIN,)),
    "corrupt zip": (corrupt_zip, (BIN,)),
    "a list": (lambda m: as_pickle(m, [torch.ones(2)]), ("expected tensors by name, got list",)),
    "an empty dictionary": (lambda m: as_pickle(m, {}), ("expected tensors, got none in pytorch_model.bin",)),
    "a dictionary inside": (
        lambda m: as_pickle(m, {"state_dict": tensors(m)}),
        ("state_dict", "expected a tensor, got dict"),
    ),
    "a number inside": (lambda m: as_pickle(m, {**tensors(m), "epoch": 3}), ("epoch", "expected a tensor, got int")),
    "a number as name": (lambda m: as_pickle(m, {7: torch.ones(2)}), ("got the name 7",)),
    "sparse": (
        lambda m: as_pickle(m, {NORM: torch.ones(2, 2).to_sparse()}),
        (NORM, "dense tensor of numbers, got sparse_coo"),
    ),
    "complex": (lambda m: as_pickle(m, {NORM: torch.ones(2, dtype=torch.complex64)}), (NORM, "got strided, complex64")),
    "int8": (lambda m: as_pickle(m, {**tensors(m), NORM: torch.ones(64, dtype=torch.int8)}), (NORM, "got int8")),
    "missing tensor": (lambda m: as_pickle(m, {k: v for k, v in tensors(m).items() if k != NORM}), (NORM,)),
    "nan": (lambda m: as_pickle(m, {**tensors(m), NORM: torch.full((64,), torch.nan)}), (NORM, "element 0 is nan")),
}


@pytest.mark.parametrize("case", SPOILT_PICKLES)
def test_pickles_that_do_not_fit(scene, case):
    spoil, says = SPOILT_PICKLES[case]
    spoil(scene.math)
    scene.refuse(code=1, says=(str(scene.math), *says))


# ----------------------------------------------------------------------------------------------------- arguments

BAD_ARGUMENTS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "unknown method": (["--method=tis"], ("unknown method 'tis'", "Did you mean 'ties'", "task_arithmetic")),
    "method of no kind": (["--method=xyzzy"], ("unknown method 'xyzzy'. Known",)),
    "unknown flag": (["--lamda=1"], ("unknown flag '--lamda'", "Did you mean '--lambda'", "--help")),
    "abbreviated flag": (["--dens=0.5"], ("unknown flag '--dens'", "--density")),
    "stray word": (["stray"], ("'stray' belongs to no flag", "commas", "quote")),
    "flag without value": (["--density"], ("--density", "expected one argument")),
    "too few weights": (["--weights=1,2,3"], ("--weights", "one number or 2", "got 3")),
    "weight no number": (["--weights=1,x"], ("--weights", "numbers", "'1,x'")),
    "no weights": (["--weights="], ("--weights", "numbers")),
    "weight nan": (["--weights=nan"], ("--weights", "finite", "nan")),
    "weight inf": (["--weights=1,inf"], ("--weights", "finite", "inf")),
    "weight -inf": (["--weights", "-inf,1"], ("--weights", "finite", "-inf")),
    "weights add up to 0": (["--method=linear", "--weights=1,-1"], ("--weights", "add up to 0", "--no-normalize")),
    "lambda inf": (["--lambda=inf"], ("--lambda", "finite", "inf")),
    "lambda nan": (["--lambda=nan"], ("--lambda", "finite", "nan")),
    "lambda no number": (["--lambda=x"], ("--lambda", "a number", "'x'")),
    "two lambdas": (["--lambda=1,2"], ("--lambda", "one number", "'1,2'")),
    "density above 1": (["--density=1.5"], ("--density", "[0, 1]", "1.5")),
    "density below 0": (["--density=0.5,-0.1"], ("--density", "[0, 1]", "-0.1")),
    "density nan": (["--density=nan"], ("--density", "[0, 1]", "nan")),
    "three densities": (["--density=1,1,1"], ("--density", "one number or 2", "got 3")),
    "ratio below 0": (["--method=widen", "--widen_ratio=-1"], ("--widen_ratio", "-1")),
    "seed not drawn": (["--seed=0"], ("--seed", "ties draws no random numbers")),
    "seed no number": (["--method=dare_ties", "--seed=x"], ("--seed", "whole number", "'x'")),
    "flag of another method": (["--widen_ratio=1"], ("--widen_ratio", "ties does not use it", "--density")),
    "weights for widen": (["--method=WIDEN", "--weights=1"], ("--weights", "widen does not use it", "--widen_ratio")),
    "density for linear": (["--method=linear", "--density=1"], ("--density", "linear does not use it")),
    "lambda for linear": (["--method=linear", "--lambda=1"], ("--lambda", "linear does not use it")),
    "normalize for widen": (["--method=widen", "--normalize"], ("--normalize", "widen does not use it")),
    "dtype": (["--dtype=bf16"], ("--dtype", "Did you mean 'bfloat16'")),
    "dtype float64": (["--dtype=float64"], ("--dtype", "float32")),
    "regex": (["--exclude=("], ("--exclude", "regular expression", "'('")),
    "regex that matches nothing": (["--exclude=nothing"], ("--exclude", "'nothing'", "lm_head.weight")),
    "shard size": (["--max_shard_size=big"], ("--max_shard_size", "5GB", "'big'")),
    "shard size 0": (["--max_shard_size=0"], ("--max_shard_size", "'0'")),
    "shard size below 0": (["--max_shard_size", "-5GB"], ("--max_shard_size", "'-5GB'")),
    "shard size without end": (["--max_shard_size=" + "9" * 400], ("--max_shard_size",)),
    "digest": (["--digest=ful"], ("--digest", "Did you mean 'full'")),
    "report": (["--report=all"], ("--report", "sample")),
    "device": (["--device=gpu"], ("--device", "cpu", "'gpu'")),
    "device of no machine": (["--device=cuda:99"], ("--device", "cuda:99", "--device c")),
    "workers 0": (["--workers=0"], ("--workers", "above 0", "'0'")),
    "workers below 0": (["--workers", "-1"], ("--workers", "above 0", "'-1'")),
    "json without dry run": (["--json"], ("--json", "--dry_run")),
    "no base": (["--base_model="], ("--base_model", "expected the name of a model")),
    "no models": (["--models_to_merge="], ("--models_to_merge", "separated by commas")),
    "empty model": (["--models_to_merge={math},"], ("--models_to_merge", "separated by commas")),
    "weights twice": (["--models_to_merge={math}:1,{code}:1", "--weights=1"], ("--weights", "Give them once")),
    "weight for one": (["--models_to_merge={math}:1,{code}"], ("--models_to_merge", "1 of 2")),
    "inline weight": (["--models_to_merge={math}:x,{code}:1"], ("--models_to_merge", "math:x", "after the colon", "'x'")),
    "inline nan": (["--models_to_merge={math}:nan,{code}:1"], ("--weights", "finite")),
    "model twice": (["--models_to_merge={math},{code},{math}"], ("math is named twice",)),
    "model twice, two ways": (["--models_to_merge={math},{code}/../math/"], ("named twice",)),
    "model twice, by a link": (["--models_to_merge={math},{link}"], ("link is named twice",)),
    "hub model twice": (["--models_to_merge=org/a,Org/A"], ("Org/A is named twice",)),
    "revision of a folder": (["--models_to_merge={math}@main"], ("math is a local folder", "no revisions")),
    "no output": (["--save_path="], ("--save_path", "expected a folder")),
    "output is the base": (["--save_path={base}"], ("--save_path", "is the input", "base")),
    "output is a model": (["--save_path={math}", "--overwrite"], ("--save_path", "is the input", "math")),
    "output is a model, by a link": (["--save_path={link}", "--overwrite"], ("--save_path", "is the input", "math")),
    "output in a model": (["--save_path={math}/out"], ("--save_path", "lies inside the input", "math")),
    "output holds the models": (["--save_path={folder}", "--overwrite"], ("--save_path", "holds the input")),
    "output is the root": (["--save_path=/"], ("--save_path", "holds the input")),
    "output not empty": (["--save_path={full}"], ("--save_path", "not empty", "--overwrite")),
    "output not ours": (["--save_path={full}", "--overwrite"], ("--save_path", "merge_recipe.json")),
    "output is a file": (["--save_path={file}"], ("--save_path", "expected a folder, got a file")),
    "output below a file": (["--save_path={file}/a/b"], ("--save_path", "file is a file, no folder")),
    "output in a circle": (["--save_path={circle}"], ("--save_path", "circle")),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_arguments_that_do_not_fit(scene, case):
    flags, says = BAD_ARGUMENTS[case]
    folder = scene.folder
    (folder / "full").mkdir()
    (folder / "full" / "precious").touch()
    (folder / "file").touch()
    (folder / "link").symlink_to(scene.math)
    (folder / "circle").symlink_to(folder / "circle")
    places = {name: folder / name for name in ("base", "math", "code", "full", "file", "link", "circle")}
    scene.refuse(*(flag.format(folder=folder, **places) for flag in flags), code=2, says=says)


@pytest.mark.parametrize("missing", ["--method", "--base_model", "--models_to_merge", "--save_path"])
def test_needed_flags(missing):
    flags = {"--method": "ties", "--base_model": "a", "--models_to_merge": "b", "--save_path": "c"}
    del flags[missing]
    _, _, err = call(merge, *(part for pair in flags.items() for part in pair), code=2)
    assert err == f"merge.py: the following arguments are required: {missing}. See merge.py --help.\n"


def test_all_argument_errors_are_said_at_once(scene):
    flags = [
        "--seed=1",
        "--density=2",
        "--lambda=x",
        "--weights=1,2,3",
        "--dtype=int8",
        "--exclude=*",
        "--widen_ratio=1",
    ]
    message = scene.refuse(*flags, code=2, says=("7 problems",))
    assert len(message.splitlines()) == 8


def test_current_folder_as_output(scene, monkeypatch):
    (scene.folder / "here").mkdir()
    monkeypatch.chdir(scene.folder / "here")
    for path in (".", "../here", str(scene.folder / "here"), ""):
        scene.refuse(f"--save_path={path}", code=2, says=("--save_path",))


def test_refusals_as_json(scene):
    rewrite(scene.math, lambda t: t.pop(GATE))
    rewrite(scene.folder / "code", lambda t: t.pop(NORM))
    _, out, err = scene.run("--dry_run", "--json", code=1)
    assert err.startswith("merge.py: 2 problems:\n")
    refusals = json.loads(out)["refusals"]
    assert [GATE in refusals[0], NORM in refusals[1]] == [True, True]
    _, out, err = scene.run("--dry_run", "--json", "--density=7", code=2)
    assert json.loads(out) == {"refusals": ["--density: expected a number in [0, 1], got 7.0."]}
    assert not scene.out.exists()


# ------------------------------------------------------------------------------------------- models that are not there


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("{folder}/mat", ("no such folder", "Did you mean", "math")),
        ("./nowhere", ("./nowhere", "no such folder")),
        ("{math}/config.json", ("expected a folder, got a file", "Give the folder")),
        ("{folder}", ("expected model.safetensors", "got base, code, math")),
        ("org/model", ("org/model", "HF_HUB_OFFLINE=1", "or give a folder")),
        ("org/model@v1.0", ("org/model@v1.0", "cache holds no copy")),
        ("org/model:0.5", ("org/model: ", "cache holds no copy")),
    ],
)
def test_models_that_are_not_there(scene, monkeypatch, tmp_path, name, says):
    monkeypatch.chdir(tmp_path)
    text = name.format(folder=scene.folder, math=scene.math)
    scene.refuse(f"--models_to_merge={text}", code=1, says=says)
    if ":0.5" not in text:
        scene.refuse(f"--base_model={text}", code=1, says=says)


def test_hub_name_without_network(scene, tmp_path):
    """With a hub that cannot be reached, not one that is forbidden."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "hf"),
    }
    flags = ["--method", "ties", "--base_model", scene.base, "--models_to_merge", f"{scene.math},org/model"]
    before = snapshot(scene.folder)
    done = subprocess.run(
        [sys.executable, ROOT / "merge.py", *flags, "--save_path", scene.out],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("merge.py: org/model: no such folder, the hub cannot be reached")
    assert len(done.stderr.splitlines()) == 1
    assert snapshot(scene.folder) == before


def test_one_hub_model_under_two_names(scene, monkeypatch, tmp_path):
    """A branch and the default one are one commit; that shows before weights are fetched."""
    with FakeHub({"org/math": scene.math}) as hub:
        hub.attach(monkeypatch, tmp_path / "cache")
        flag = "--models_to_merge=org/math,org/math@main"
        scene.refuse(flag, code=2, says=("org/math and org/math@main are the same model", "Give it once"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


# ----------------------------------------------------------------------------------------------------------- disk


def test_too_little_disk(scene, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000))
    message = scene.refuse(code=1, says=("--save_path", "1,000 free", "Free space"))
    assert "227,056" not in message  # tokenizer, config, recipe and card come on top of the weights


def test_disk_that_fills_up_on_the_way(scene, monkeypatch):
    write = os.pwrite
    written = 0

    def limited(descriptor, view, offset):
        nonlocal written
        written += len(view)
        if written > 100_000:
            raise OSError(28, "No space left on device")
        return write(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", limited)
    scene.refuse(code=1, says=("out.partial/model.safetensors", "No space left on device", "Free space"))


def test_disk_that_fills_up_at_the_end(scene, monkeypatch):
    """What is finished stays, and the same command goes on with it."""
    from checkpoints.folder import Folder

    write = Folder.write

    def fail(folder, name, content):
        if name == "merge_recipe.json":
            raise WriteError(folder / name, OSError(28, "No space left on device"))
        write(folder, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", fail)
        ended = scene.run(code=1)
    assert "merge_recipe.json: cannot be written: No space left on device" in ended.err
    assert not scene.out.exists()
    assert "going on: 21 of 21 tensors are there" in scene.run().err
    assert not partial_folder(scene.out).exists()


def test_new_parents_of_the_output_are_removed_again(scene):
    rewrite(scene.math, lambda t: t[NORM].fill_(torch.nan))
    scene.refuse(f"--save_path={scene.folder}/new/and/newer/out", code=1, says=(NORM,))


@pytest.fixture
def unprivileged(scene: Scene) -> Iterator[Scene]:
    """The scene for a user whom permissions bind: ours, or nobody where we are root."""
    if os.geteuid() != 0:
        yield scene
        return
    if not hasattr(os, "setresuid"):
        pytest.skip("root may write everywhere, and this system cannot lend us another user")
    scene.run()  # imports all modules, which another user may not be allowed to read
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for name in ("base", "math", "code"):
            shutil.copytree(scene.folder / name, Path(folder, name))
        lent = merging_scene(Path(folder))
        try:
            os.setresuid(65534, 65534, 0)
            yield lent
        finally:
            os.setresuid(0, 0, 0)


def test_output_that_may_not_be_written(unprivileged):
    home = unprivileged.folder
    mode = home.stat().st_mode
    try:
        if home.stat().st_uid == os.geteuid():
            home.chmod(0o555)
        unprivileged.refuse(code=1, says=("--save_path", f"{home} cannot be written to", "permissions"))
        unprivileged.refuse(f"--save_path={home}/a/b", code=1, says=("--save_path", f"{home} cannot be written to"))
    finally:
        if home.stat().st_uid == os.geteuid():
            home.chmod(mode)


def test_weights_that_may_not_be_read(scene, unprivileged):
    file = weights(unprivileged.math)
    if os.geteuid() == 65534:
        os.setresuid(0, 0, 0)
    file.chmod(0)
    if unprivileged is not scene:
        os.setresuid(65534, 65534, 0)
    _, out, err = unprivileged.run(f"--save_path={unprivileged.folder}/x", code=1)
    assert out == ""
    assert "math: model.safetensors: cannot be opened: Permission denied" in err


# ---------------------------------------------------------------------------------------------- two runs, and kills


def test_two_runs_on_one_output(scene):
    with staged(scene.out, overwrite=False) as stage:
        (stage.folder / "model.safetensors").write_text("of the other run")
        scene.refuse(code=1, says=("another run is writing it", "--save_path"))
        (scene.folder / "code" / "x").touch()  # whatever happens meanwhile
    assert (scene.out / "model.safetensors").read_text() == "of the other run"


def test_a_run_that_another_one_overtakes(scene, monkeypatch):
    """Between our plan and our first byte another run finishes: its result stays."""
    from merging import merge_work

    plan = merge_work.make_plan

    def overtaken(*arguments, **keywords):
        with staged(scene.out, overwrite=False) as stage:
            (stage.folder / "merge_recipe.json").write_text("of the other run")
        return plan(*arguments, **keywords)

    monkeypatch.setattr(merge_work, "make_plan", overtaken)
    assert "not empty" in scene.run(code=2).err
    assert snapshot(scene.out) == {"merge_recipe.json": b"of the other run"}
    assert not partial_folder(scene.out).exists()


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import merge
from checkpoints.writer import CheckpointWriter
write = CheckpointWriter.write
def slow(self, *arguments):
    print("writing", flush=True)
    time.sleep(0.3)
    write(self, *arguments)
CheckpointWriter.write = slow
sys.exit(merge.main(sys.argv[1:]))
"""


def test_kills_from_outside(scene):
    """An earlier result stays as it was; the next run goes on after Ctrl-C and after a hard kill."""
    out, hard = scene.folder / "out", scene.folder / "hard"
    scene.run()
    before = snapshot(scene.folder)
    flags = [
        "--method=ties",
        f"--base_model={scene.base}",
        f"--models_to_merge={scene.math}",
        "--overwrite",
        "--workers=1",
    ]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW.format(root=str(ROOT)), *flags, "--save_path", path],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for path in (out, hard)
    ]  # fmt: skip
    for process, path, number in zip(running, (out, hard), (signal.SIGINT, signal.SIGKILL), strict=True):
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert partial_folder(path).is_dir()
        process.send_signal(number)
    errors = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [130, -signal.SIGKILL]
    assert errors[0].startswith("merge.py: interrupted")
    assert errors[1] == ""
    assert partial_folder(hard).is_dir()
    assert not hard.exists()
    assert {name: content for name, content in snapshot(scene.folder).items() if "partial" not in name} == before
    for path in (out, hard):
        scene.run(f"--models_to_merge={scene.math}", f"--save_path={path}", "--overwrite")
        assert not partial_folder(path).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals(scene, monkeypatch, number):
    from checkpoints.writer import CheckpointWriter

    write = CheckpointWriter.write
    handler = signal.getsignal(number)

    def interrupted(*arguments):
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        time.sleep(0.05)
        write(*arguments)

    sent: list[signal.Signals] = []
    monkeypatch.setattr(CheckpointWriter, "write", interrupted)
    before = snapshot(scene.folder)
    assert scene.run("--workers=1", code=130).err.startswith("merge.py: interrupted")
    assert {name: content for name, content in snapshot(scene.folder).items() if "partial" not in name} == before
    assert sent
    assert signal.getsignal(number) == handler


def test_nohup_stays_in_force(scene, monkeypatch):
    from checkpoints.writer import CheckpointWriter

    close = CheckpointWriter.close

    def hang_up(writer):
        os.kill(os.getpid(), signal.SIGHUP)
        return close(writer)

    monkeypatch.setattr(CheckpointWriter, "close", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        scene.run()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_may_run_the_command(scene):
    """Where no signal can be handled."""
    thread = threading.Thread(target=lambda: results.append(scene.run().code))
    results: list[int] = []
    thread.start()
    thread.join()
    assert results == [0]
