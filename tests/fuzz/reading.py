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
        tokens: dict[str, int]
        try:
            tokens = Tokenizer.from_str(files["tokenizer.json"].decode()).get_vocab(True)
        except Exception:
            content = json.loads(files["tokenizer.json"].decode())
            vocab = content["model"]["vocab"]
            tokens = dict(vocab) | {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
        for index, token in sorted(added_beside(files).items()):
            if token not in tokens and index not in tokens.values():
                tokens[token] = index
        return tokens
    if not is_sound and ("tokenizer.model" in files or "vocab.json" in files or "added_tokens.json" in files):
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder, name)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
            return dict(AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab())
    if "tokenizer.model" in files:
        model = sentencepiece_model.ModelProto()
        model.ParseFromString(files["tokenizer.model"])
        return {piece.piece: row for row, piece in enumerate(model.pieces)}
    if "vocab.json" in files:
        content = json.loads(files["vocab.json"].decode()) | json.loads(files.get("added_tokens.json", b"{}").decode())
        return dict(content)
    return None


def added_beside(files: Files) -> dict[int, str]:
    """Id -> token of those that stand in other files than tokenizer.json."""
    listed = json.loads(files.get("added_tokens.json", b"{}").decode())
    decoder = json.loads(files.get("tokenizer_config.json", b"{}").decode()).get("added_tokens_decoder") or {}
    return {index: token for token, index in listed.items()} | {
        int(index): token["content"] for index, token in decoder.items()
    }


def token_files(files: Files) -> list[object]:
    """What says which tokens there are: one file of the newer kind, else all; and those beside."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "added_tokens.json")
    found = {name: files[name] for name in names if name in files}
    if "tokenizer.json" in found:
        found = {"tokenizer.json": found["tokenizer.json"]}
    try:
        return [found, added_beside(files)]
    except (
        ValueError,
        AttributeError,
        TypeError,
        KeyError,
        RecursionError,
    ):  # damaged, which no merge looks at where all are equal
        return [found, files.get("tokenizer_config.json"), files.get("added_tokens.json")]


def unite(tokens: Sequence[dict[str, int]], rows: Sequence[int], out: dict[str, int], out_rows: int) -> None:
    """Check the tokens and the rows of a merge: the base's tokens as they were, behind them each one that another model has.

    Args:
        tokens, rows: of the models, the base first, what their tables have; out, out_rows: of the merge.

    Raises: AssertionError.
    """
    base, *_ = tokens
    theirs = {
        word for ours, there in zip(tokens[1:], rows[1:], strict=True) for word, row in ours.items() if row < there
    }
    assert {word: out.get(word) for word in base} == base, "a token of the base has another id, or none"
    expected = base.keys() | theirs
    assert out.keys() == expected, (
        f"tokens that should not be there: {out.keys() - expected}, missing: {expected - out.keys()}"
    )
    size = max(base.values(), default=-1) + 1
    new = sorted(out[word] for word in theirs - base.keys())
    assert new == list(range(size, size + len(new))), f"the new tokens have the ids {new}"
    have = {word for ours, there in zip(tokens, rows, strict=True) for word, row in ours.items() if row < there}
    least = max((out[word] + 1 for word in have), default=0)
    assert out_rows == max(rows[0], least), f"expected {max(rows[0], least)} rows, got {out_rows}"


def rows_of(out: dict[str, int], out_rows: int, model: dict[str, int], rows: int) -> list[int | None]:
    """For each row of the merge's table the model's: by token, and by position behind the last token."""
    words = {row: word for word, row in out.items()}
    ours, theirs = max(out.values(), default=-1) + 1, max(model.values(), default=-1) + 1
    found: list[int | None] = []
    for row in range(out_rows):
        there = model.get(words[row]) if row in words else row - ours + theirs if row >= ours else None
        found.append(there if there is not None and there < rows else None)
    return found


def align(tables: Sequence[Tensor], rows: Sequence[Sequence[int | None]]) -> list[Tensor]:
    """Every model's table in the merge's order. A row that it lacks is the base's; else the mean of those of the models that
    have it, which is the one's where only one does; else the mean of the base's rows."""
    mean = tables[0].double().mean(dim=0).to(tables[0].dtype)
    spare = []
    for there in zip(*rows, strict=True):
        owned = [table[row].double() for table, row in zip(tables, there, strict=True) if row is not None]
        spare.append(mean if not owned else owned[0] if there[0] is not None else torch.stack(owned).mean(dim=0))
    aligned = []
    for table, own in zip(tables, rows, strict=True):
        picked = [(spare[at] if row is None else table[row]).double() for at, row in enumerate(own)]
        aligned.append(torch.stack(picked) if picked else table[:0])
    return aligned


def check_merge(
    family: dict[str, Files], flags: Sequence[str], out: Tensors, out_files: Files, *, is_sound: bool
) -> bool:
    """Compare a merge with the float64 reference.

    Args:
        family: all files of the models; flags: of merge.py; out, out_files: what it wrote; is_sound: whether only gentle
            changes were made.

    Returns: whether the merge has tokens or rows that the base lacks.

    Raises: AssertionError: a tensor that is missing, too much, or has other numbers; whatever the libraries raise that
        read the inputs: what they cannot read should have been refused.
    """
    models = [read_tensors(files) for files in family.values()]
    base = models[0]
    left_out = base.keys() - out.keys()
    assert not out.keys() - base.keys(), f"too much: {out.keys() - base.keys()}"
    for name in left_out:
        twin = {HEAD: EMBEDDING, EMBEDDING: HEAD}.get(name)
        same = twin in out and torch.equal(base[name].double(), base[twin].double())
        assert same or name.endswith("inv_freq"), f"{name} is missing"
    found = {name: [_of_model(name, model) for model in models] for name in out}
    tables = {name: found[name] for name in (EMBEDDING, HEAD) if name in out and None not in found[name]}
    is_larger = bool(tables) and _align_tables(found, tables, list(family.values()), out, out_files, is_sound)  # type: ignore[arg-type]
    for name, (ours, *theirs) in found.items():
        assert ours is not None
        _check_tensor(name, ours, base[name].dtype, theirs, flags, out[name])
    return is_larger


def _align_tables(
    found: dict[str, list[Tensor | None]],
    tables: dict[str, list[Tensor]],
    sides: Sequence[Files],
    out: Tensors,
    out_files: Files,
    is_sound: bool,
) -> bool:
    """Put the tables in `found` into the merge's order. Returns: whether it has tokens or rows that the base lacks."""
    even = all(table.shape == same[0].shape for same in tables.values() for table in same)
    if even and all(token_files(side) == token_files(sides[0]) for side in sides):
        return False
    tokens = [read_tokens(files, is_sound=is_sound) for files in sides]
    if even and all(one == tokens[0] for one in tokens):
        return False
    out_rows, *further = (len(out[name]) for name in tables)
    assert all(one == out_rows for one in further), "tables of several lengths"
    rows = [len(table) for table in next(iter(tables.values()))]
    if None in tokens:
        named = tokens[0]
        matched = [
            list(range(out_rows)) if named is None or one is None else rows_of(named, out_rows, one, there)
            for one, there in zip(tokens, rows, strict=True)
        ]
    else:
        written = read_tokens(out_files, is_sound=False)
        assert written is not None
        unite(tokens, rows, written, out_rows)  # type: ignore[arg-type]
        matched = [rows_of(written, out_rows, one, there) for one, there in zip(tokens, rows, strict=True)]  # type: ignore[arg-type]
        named = written
    for name, same in tables.items():
        found[name] = list(align(same, matched))
    return out_rows != rows[0] or named != tokens[0]


def _of_model(name: str, model: Tensors) -> Tensor | None:
    """A model's tensor; of two that are tied, the one that it has."""
    if name not in model and name in (EMBEDDING, HEAD):
        name = HEAD if name == EMBEDDING else EMBEDDING
    return model.get(name)


def _check_tensor(
    name: str, base: Tensor, dtype: torch.dtype, models: Sequence[Tensor | None], flags: Sequence[str], actual: Tensor
) -> None:
    """One tensor of the output, whose base has numbers of a dtype."""
    dtype = torch.float32 if dtype == torch.float64 else dtype
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
