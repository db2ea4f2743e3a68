"""What the merge of a mutant should be, from the bytes, read by other code than ours: safetensors, torch, tokenizers."""

from __future__ import annotations

import io
import json
import struct
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import sentencepiece.sentencepiece_model_pb2 as sentencepiece_model
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer

from streaming.blocks import TensorSpec
from tests.fuzz.models import BIN, EMBEDDING, HEAD, INDEX, WEIGHTS, Files
from tests.in_memory import assert_rounds_to, expect, make_method

Tensors = dict[str, Tensor]


def read_tensors(files: Files) -> Tensors:
    """Every tensor of a checkpoint, as transformers would find it. Raises what the libraries raise."""
    if WEIGHTS in files:
        return safetensors.torch.load(files[WEIGHTS])
    if INDEX not in files and BIN in files:
        return read_pickle(files[BIN])
    weight_map: dict[str, str] = json.loads(files[INDEX if INDEX in files else f"{BIN}.index.json"].decode())[
        "weight_map"
    ]
    read = {
        file: safetensors.torch.load if file.endswith(".safetensors") else read_pickle for file in weight_map.values()
    }
    shards = {file: read_one(files[file]) for file, read_one in read.items()}
    return {name: shards[file][name] for name, file in weight_map.items()}


def read_pickle(content: bytes) -> Tensors:
    """The tensors of a pickle."""
    if zipfile.is_zipfile(io.BytesIO(content)):
        content = rewritten(content)
    loaded: Tensors = torch.load(io.BytesIO(content), weights_only=True)
    return loaded


def rewritten(content: bytes) -> bytes:
    """An archive with the same pickle and storages, and nothing else that may be damaged: checksums and dates, say."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            folder, _, name = entry.filename.partition("/")
            if name == "data.pkl" or name.startswith("data/"):
                name_length, extra_length = struct.unpack(
                    "<HH", content[entry.header_offset + 26 : entry.header_offset + 30]
                )
                start = entry.header_offset + 30 + name_length + extra_length
                new.writestr(f"{folder}/{name}", content[start : start + entry.file_size])
        new.writestr(f"{folder}/version", b"3\n")
    return out.getvalue()


def read_tokens(files: Files, *, is_sound: bool) -> dict[str, int] | None:
    """Token -> row of the embedding, None without a tokenizer.

    Where the library that tokenizers are run with cannot read a tokenizer.json, what the file says. What transformers makes
    of other tokenizers whose files are not sound, it alone knows, so it is asked.
    """
    if "tokenizer.json" in files:
        try:
            tokens: dict[str, int] = Tokenizer.from_str(files["tokenizer.json"].decode()).get_vocab(True)
            return tokens
        except Exception:
            content = json.loads(files["tokenizer.json"].decode())
            vocab = content["model"]["vocab"]
            return dict(vocab) | {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    if not is_sound and ("tokenizer.model" in files or "vocab.json" in files or "added_tokens.json" in files):
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            return dict(AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab())
    if "tokenizer.model" in files:
        model = sentencepiece_model.ModelProto()
        model.ParseFromString(files["tokenizer.model"])
        return {piece.piece: row for row, piece in enumerate(model.pieces)}
    if "vocab.json" in files:
        content = json.loads(files["vocab.json"].decode()) | json.loads(files.get("added_tokens.json", b"{}").decode())
        return dict(content)
    return None


def token_files(files: Files) -> Files:
    """What says which tokens there are: one file of the newer kind, else all."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "added_tokens.json")
    found = {name: files[name] for name in names if name in files}
    return {"tokenizer.json": found["tokenizer.json"]} if "tokenizer.json" in found else found


def rows_of(base: dict[str, int], base_rows: int, model: dict[str, int], rows: int) -> list[int | None]:
    """For each row of the base's table the model's: by token, and by position behind the last token."""
    words = {row: word for word, row in base.items()}
    ours, theirs = max(base.values(), default=-1) + 1, max(model.values(), default=-1) + 1
    found: list[int | None] = []
    for row in range(base_rows):
        there = model.get(words[row]) if row in words else row - ours + theirs if row >= ours else None
        found.append(there if there is not None and there < rows else None)
    return found


def align(base: Tensor, model: Tensor, rows: Sequence[int | None]) -> Tensor:
    """A model's table in the base's order; the base's row where there is none."""
    dtype = torch.promote_types(base.dtype, model.dtype)
    picked = [base[at].to(dtype) if row is None else model[row].to(dtype) for at, row in enumerate(rows)]
    return torch.stack(picked) if picked else model[:0]


def check_merge(family: dict[str, Files], flags: Sequence[str], out: Tensors, *, is_sound: bool) -> None:
    """Compare a merge with the float64 reference.

    Args:
        family: all files of the models; flags: of merge.py; out: what it wrote; is_sound: whether only gentle changes were made.

    Raises: AssertionError: a tensor that is missing, too much, or has other numbers; whatever the libraries raise that
        read the inputs: what they cannot read should have been refused.
    """
    base, *others = [read_tensors(files) for files in family.values()]
    left_out = base.keys() - out.keys()
    assert not out.keys() - base.keys(), f"too much: {out.keys() - base.keys()}"
    for name in left_out:
        twin = {HEAD: EMBEDDING, EMBEDDING: HEAD}.get(name)
        same = twin in out and torch.equal(base[name].double(), base[twin].double())
        assert same or name.endswith("inv_freq"), f"{name} is missing"
    sides = list(family.values())
    for at, model in enumerate(others):
        tables = [name for name in (EMBEDDING, HEAD) if name in out and _of_model(name, model) is not None]
        even = all(_of_model(name, model).shape == base[name].shape for name in tables)  # type: ignore[union-attr]
        if even and token_files(sides[0]) == token_files(sides[at + 1]):
            continue
        ours, theirs = (read_tokens(files, is_sound=is_sound) for files in (sides[0], sides[at + 1]))
        if ours is not None and theirs is not None and (ours != theirs or not even):
            others[at] = dict(model)
            for name in tables:
                table = _of_model(name, model)
                assert table is not None
                others[at][name] = align(base[name], table, rows_of(ours, len(base[name]), theirs, len(table)))
    for name in out:
        _check_tensor(name, base[name], [_of_model(name, model) for model in others], flags, out[name])


def _of_model(name: str, model: Tensors) -> Tensor | None:
    """A model's tensor; of two that are tied, the one that it has."""
    if name not in model and name in (EMBEDDING, HEAD):
        name = HEAD if name == EMBEDDING else EMBEDDING
    return model.get(name)


def _check_tensor(
    name: str, base: Tensor, models: Sequence[Tensor | None], flags: Sequence[str], actual: Tensor
) -> None:
    """One tensor of the output."""
    dtype = torch.float32 if base.dtype == torch.float64 else base.dtype
    assert actual.dtype == dtype, f"{name}: expected {dtype}, got {actual.dtype}"
    assert actual.shape == base.shape, f"{name}: expected {tuple(base.shape)}, got {tuple(actual.shape)}"
    there = [model for model in models if model is not None]
    if not base.dtype.is_floating_point or len(there) < len(models):
        buffer = not base.dtype.is_floating_point or not name.endswith(("weight", "bias"))
        assert buffer, f"{name}: a model lacks it, and it was merged all the same"
        assert torch.equal(actual.double(), base.double()), f"{name}: is not the base's"
        return
    for model in (base, *there):
        assert model.shape == base.shape, f"{name}: a model has {tuple(model.shape)}, the base {tuple(base.shape)}"
        assert model.dtype.is_floating_point, f"{name}: a model has {model.dtype}"
        assert model.double().isfinite().all(), f"{name}: a number of the input is not finite"
    given = dict(flag[2:].split("=") for flag in flags)
    method = given.pop("method")
    arguments: dict[str, Any] = {key: float(value) for key, value in given.items() if key != "seed"}
    chosen = make_method(method, len(there), seed=int(given.get("seed", 0)), **arguments)
    spec = TensorSpec(name, tuple(base.shape), is_embedding=name == EMBEDDING)
    expected, slack, unclear = expect(method, chosen, spec, base, there)
    assert_rounds_to(actual, expected, slack, unclear, name)
