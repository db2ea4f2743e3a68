"""Changes to safetensors files and their index."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from typing import Any

import safetensors
import torch

from tests.fuzz.change_json import Tree, Unfit, dress, dump, edit, parse, places, scratch, spoil, spoil_text
from tests.fuzz.models import EMBEDDING, HEAD, INDEX, Files, as_json

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U32": 4, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = [
    "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.extra.weight", "extra.bias", "lm_head.bias", "", " ", "a b",
    "²", "a.²", "model.layers.٣.x.weight", "9" * 5000, "0.1.2", "a\nb", "\x1b[31mred", "é", "\u202e", "\ud800", "a\0b", ".",
    "model.layers.999999999999999999999.x", "x" * 3000, "__metadata__", "..", "model.embed_tokens.weight.absmax", "score.weight",
]  # fmt: skip
SHAPES: list[tuple[int, ...]] = [
    (), (1,), (0,), (3,), (20,), (20, 4), (4, 20), (2, 3), (0, 4), (4, 0), (2, 2, 2), (1, 1, 1, 1, 3), (2**40, 0), (2**33, 2**33, 0),
]  # fmt: skip


@dataclass
class Entry:
    """One tensor: what its header says, and its bytes."""

    name: str
    dtype: str
    shape: list[int]
    data: bytes


def weight_file(rng: random.Random, files: Files) -> str:
    """One of the weight files."""
    return rng.choice(sorted(name for name in files if name.endswith(".safetensors")))


def entries(content: bytes) -> list[Entry]:
    """The tensors of a sound file, in the order of their bytes. Raises Unfit where it is not."""
    try:
        found = safetensors.deserialize(content)
        header = json.loads(split(content)[0])
    except (safetensors.SafetensorError, ValueError, RecursionError):
        raise Unfit from None
    at = {name: header[name]["data_offsets"] for name, _ in found}
    listed = [Entry(name, info["dtype"], list(info["shape"]), bytes(info["data"])) for name, info in found]
    return sorted(listed, key=lambda entry: at[entry.name])


def split(content: bytes) -> tuple[bytes, bytes]:
    """Header and tensors."""
    stop = 8 + int.from_bytes(content[:8], "little")
    return content[8:stop], content[stop:]


def join(header: bytes, data: bytes) -> bytes:
    """A file of both."""
    return len(header).to_bytes(8, "little") + header + data


def header_of(listed: list[Entry]) -> Tree:
    """The header of tensors that lie one behind the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in listed:
        end = position + len(entry.data)
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [position, end]}
        position = end
    return header


def built(listed: list[Entry]) -> bytes:
    """A file of these tensors."""
    return join(dump(header_of(listed)), b"".join(entry.data for entry in listed))


def free(listed: list[Entry], files: Files) -> list[Entry]:
    """The tensors whose numbers may be others: where the embedding is tied to the head, not these two. Raises Unfit: none."""
    found = [
        entry for entry in listed if entry.dtype in FLOATS and not (INDEX in files and entry.name in (EMBEDDING, HEAD))
    ]
    if not found:
        raise Unfit
    return found


def reorder_tensors(rng: random.Random, files: Files) -> None:
    name = weight_file(rng, files)
    listed = entries(files[name])
    files[name] = built(rng.sample(listed, len(listed)))


def dress_header(rng: random.Random, files: Files) -> None:
    name = weight_file(rng, files)
    header, data = split(files[name])
    files[name] = join(dress(rng, parse(header)), data)


def other_metadata(rng: random.Random, files: Files) -> None:
    name = weight_file(rng, files)
    header, data = split(files[name])
    tree = parse(header)
    kinds: list[Any] = [None, {}, {"format": "pt", "author": "é\n\0", "": "x" * 2000}, {"format": "np"}]
    tree["__metadata__"] = rng.choice(kinds)
    if tree["__metadata__"] is None and rng.random() < 0.5:
        del tree["__metadata__"]
    files[name] = join(dump(tree), data)


def other_dtype(rng: random.Random, files: Files) -> None:
    """Stored in another dtype of floating-point numbers, one tensor or all."""
    name = weight_file(rng, files)
    listed = entries(files[name])
    chosen = free(listed, files)
    for entry in chosen if rng.random() < 0.5 else [rng.choice(chosen)]:
        to = rng.choice(list(FLOATS))
        values = torch.frombuffer(bytearray(entry.data), dtype=FLOATS[entry.dtype]).to(FLOATS[to])
        entry.dtype, entry.data = to, values.view(torch.uint8).numpy().tobytes()
    files[name] = built(listed)


def other_values(rng: random.Random, files: Files) -> None:
    """Other finite numbers in one tensor: small and large ones, zeros of both signs, denormal ones."""
    name = weight_file(rng, files)
    listed = entries(files[name])
    entry = rng.choice(free(listed, files))
    dtype = FLOATS[entry.dtype]
    scale = rng.choice([0.0, 1e-40, 1e-7, 1.0, 100.0])
    values = torch.tensor([rng.gauss(0, 1) * scale for _ in range(math.prod(entry.shape))]).to(dtype)
    if values.isfinite().all():
        entry.data = values.view(torch.uint8).numpy().tobytes()
        files[name] = built(listed)


def edit_header(rng: random.Random, files: Files) -> None:
    name = weight_file(rng, files)
    header, data = split(files[name])
    tree = parse(header)
    for _ in range(rng.choice([1, 1, 1, 2])):
        spoil(rng, tree)
    files[name] = join(dump(tree), data)


def nudge_offsets(rng: random.Random, files: Files) -> None:
    """Gaps, overlaps, and ranges out of the file."""
    name = weight_file(rng, files)
    header, data = split(files[name])
    tree = parse(header)
    numbers = [(node, key) for node, key in places(tree) if isinstance(node, list) and type(node[key]) is int]
    if not numbers:
        raise Unfit
    for _ in range(rng.choice([1, 2])):
        node, key = rng.choice(numbers)
        node[key] = rng.choice([node[key] + 1, node[key] - 1, node[key] + 8, 0, len(data), len(data) + 8, 2**61, -8])
    files[name] = join(dump(tree), data)


def reshape(rng: random.Random, files: Files) -> None:
    """Another shape of as many elements, as many bytes in another dtype, or another number of them."""
    name = weight_file(rng, files)
    listed = entries(files[name])
    entry = rng.choice(listed)
    count = math.prod(entry.shape)
    what = rng.randrange(5)
    if what == 0:
        entry.shape = rng.choice(
            [[count], [1, count], [count, 1], [*entry.shape, 1], [1, *entry.shape], entry.shape[::-1]]
        )
    elif what == 1:
        entry.dtype = rng.choice([dtype for dtype, size in SIZES.items() if size == SIZES.get(entry.dtype)] or ["F32"])
    else:
        entry.shape = list(rng.choice(SHAPES))
        entry.dtype = rng.choice([entry.dtype, entry.dtype, *SIZES])
        entry.data = bytes(rng.randrange(64) for _ in range(math.prod(entry.shape) * SIZES.get(entry.dtype, 1)))
    files[name] = built(listed)


def rename_tensor(rng: random.Random, files: Files) -> None:
    name = weight_file(rng, files)
    listed = entries(files[name])
    entry = rng.choice(listed)
    entry.name = rng.choice([*NAMES, rng.choice(listed).name, entry.name.replace("0", "1"), entry.name + "_orig"])
    files[name] = built(listed)
    index_names(files, name, [entry.name for entry in listed])


def more_tensors(rng: random.Random, files: Files) -> None:
    """Further tensors of odd names, shapes and dtypes."""
    name = weight_file(rng, files)
    listed = entries(files[name])
    for _ in range(rng.randrange(1, 4)):
        dtype, shape = rng.choice(list(SIZES)), rng.choice(SHAPES)
        data = bytes(rng.randrange(2 if dtype == "BOOL" else 64) for _ in range(math.prod(shape) * SIZES[dtype]))
        listed.append(Entry(rng.choice(NAMES), dtype, list(shape), data))
    files[name] = built(listed)
    index_names(files, name, [entry.name for entry in listed])


def fewer_tensors(rng: random.Random, files: Files) -> None:
    name = weight_file(rng, files)
    listed = entries(files[name])
    left = rng.sample(listed, rng.choice([0, 1, len(listed) - 1]))
    files[name] = built(left)
    index_names(files, name, [entry.name for entry in left])


def index_names(files: Files, file: str, names: list[str]) -> None:
    """Bring the index, where there is one, up to what a file holds now."""
    if INDEX in files:
        index = parse(files[INDEX])
        others = {name: other for name, other in index["weight_map"].items() if other != file}
        index["weight_map"] = others | dict.fromkeys(names, file)
        files[INDEX] = as_json(index)


def header_text(rng: random.Random, files: Files) -> None:
    name = weight_file(rng, files)
    header, data = split(files[name])
    files[name] = join(spoil_text(rng, header), data)


def header_length(rng: random.Random, files: Files) -> None:
    """A header length beyond the file, or a little wrong."""
    name = weight_file(rng, files)
    length = int.from_bytes(files[name][:8], "little")
    wrong = (
        rng.choice([0, 1, length - 1, length + 1, len(files[name]), 10**8, 2**31, 2**63, 2**64 - 1, length + 2**32])
        % 2**64
    )
    files[name] = wrong.to_bytes(8, "little") + files[name][8:]


HEADERS = (
    {change.__name__: change for change in (reorder_tensors, dress_header, other_metadata, other_dtype, other_values)},
    {
        change.__name__: change
        for change in (
            edit_header, nudge_offsets, reshape, rename_tensor, more_tensors, fewer_tensors, header_text, header_length,
        )
    },
)  # fmt: skip


def flip_low_bits(rng: random.Random, files: Files) -> None:
    """The last bit of some numbers."""
    name = weight_file(rng, files)
    listed = entries(files[name])
    entry = rng.choice(free(listed, files))
    data = bytearray(entry.data)
    for at in range(0, len(data), SIZES[entry.dtype] * rng.randrange(1, 5)):
        data[at] ^= 1
    entry.data = bytes(data)
    files[name] = built(listed)


def turn_a_matrix(rng: random.Random, files: Files) -> None:
    """A matrix upside down."""
    name = weight_file(rng, files)
    listed = entries(files[name])
    entry = rng.choice([entry for entry in free(listed, files) if len(entry.shape) == 2] or free(listed, files))
    width = len(entry.data) // entry.shape[0]
    entry.data = b"".join(entry.data[at : at + width] for at in range(len(entry.data) - width, -1, -width))
    files[name] = built(listed)


def scratch_tensors(rng: random.Random, files: Files) -> None:
    """Bytes behind the header; the file keeps its length, mostly."""
    name = weight_file(rng, files)
    content = files[name]
    start = min(len(content), 8 + int.from_bytes(content[:8], "little"))
    data = bytearray(content[start:])
    for _ in range(rng.choice([1, 1, 3, 20])):
        if data:
            data[rng.randrange(len(data))] = rng.choice([0, 255, 127, 128, rng.randrange(256)])
    files[name] = content[:start] + bytes(data)


def scratch_file(rng: random.Random, files: Files) -> None:
    name = weight_file(rng, files)
    files[name] = scratch(rng, files[name])


def cut_or_grow(rng: random.Random, files: Files) -> None:
    name = weight_file(rng, files)
    content = files[name]
    files[name] = rng.choice(
        [content[: rng.randrange(len(content) + 1)], content + b"\0", content[:-1], content * 2, b"", content[:8], b"\0" * 8, b"PK" + content]
    )  # fmt: skip


def swap_files(rng: random.Random, files: Files) -> None:
    """Two files of the folder in each other's place."""
    one, other = rng.sample(sorted(files), 2)
    files[one], files[other] = files[other], files[one]


BYTES = (
    {change.__name__: change for change in (flip_low_bits, turn_a_matrix, other_values)},
    {change.__name__: change for change in (scratch_tensors, scratch_file, cut_or_grow, swap_files)},
)


def dress_index(rng: random.Random, files: Files) -> None:
    index = parse(files[INDEX])
    index["weight_map"] = dict(rng.sample(list(index["weight_map"].items()), len(index["weight_map"])))
    files[INDEX] = dress(rng, index)


def other_total(rng: random.Random, files: Files) -> None:
    """What the index says besides the map, which nobody needs."""
    index = parse(files[INDEX])
    index["metadata"] = rng.choice([None, {}, {"total_size": -1}, {"total_size": 10**30}, "x", {"a": [1, 2.5]}])
    files[INDEX] = as_json(index)


def rename_files(rng: random.Random, files: Files) -> None:
    index = parse(files[INDEX])
    old = sorted(set(index["weight_map"].values()))
    new = rng.sample(
        [
            "a.safetensors",
            "ü ber.safetensors",
            "-x.safetensors",
            "model-1.safetensors",
            "😀.safetensors",
            "..x.safetensors",
        ],
        len(old),
    )
    names = dict(zip(old, new, strict=True))
    index["weight_map"] = {name: names[file] for name, file in index["weight_map"].items()}
    files.update({after: files.pop(before) for before, after in names.items()})
    files[INDEX] = as_json(index)


def move_tensors(rng: random.Random, files: Files) -> None:
    """Other files for the same tensors, perhaps fewer files."""
    index = parse(files[INDEX])
    old = sorted(set(index["weight_map"].values()))
    listed = [entry for file in old for entry in entries(files[file])]
    homes = {entry.name: rng.choice(old[: rng.randrange(1, 4)]) for entry in listed}
    for file in old:
        own = [entry for entry in listed if homes[entry.name] == file]
        files[file] = built(own)
    index["weight_map"] = homes
    files[INDEX] = as_json(index)


def edit_index(rng: random.Random, files: Files) -> None:
    files[INDEX] = edit(rng, files[INDEX])


def edit_weight_map(rng: random.Random, files: Files) -> None:
    index = parse(files[INDEX])
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise Unfit
    spoil(rng, weight_map)
    files[INDEX] = dump(index)


def index_text(rng: random.Random, files: Files) -> None:
    files[INDEX] = spoil_text(rng, files[INDEX])


def lose_a_file(rng: random.Random, files: Files) -> None:
    del files[weight_file(rng, files)]


def index_of_one(rng: random.Random, files: Files) -> None:
    """A second index, or a single file beside the shards."""
    what = rng.randrange(3)
    first = weight_file(rng, files)
    if what == 0:
        files["model.safetensors"] = files[first]
    elif what == 1:
        files["pytorch_model.bin.index.json"] = files[INDEX]
    else:
        files["pytorch_model.bin.index.json"] = files.pop(INDEX)


INDEXES = (
    {change.__name__: change for change in (dress_index, other_total, rename_files, move_tensors)},
    {
        change.__name__: change
        for change in (edit_index, edit_weight_map, index_text, lose_a_file, index_of_one)
    },
)  # fmt: skip
