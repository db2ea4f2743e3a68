"""Changes to pytorch_model.bin."""

from __future__ import annotations

import io
import os
import random
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from tests.fuzz.change_json import Unfit, scratch
from tests.fuzz.change_weights import NAMES
from tests.fuzz.models import BIN, Files, as_pickle

MARKER = "executed"
"""What a call hidden in a pickle makes, in the current folder."""
CALLS: list[tuple[Callable[..., object], tuple[Any, ...]]] = [
    (os.system, (f"touch {MARKER}",)),
    (os.mkdir, (MARKER,)),
    (eval, (f"open('{MARKER}', 'w')",)),
    (getattr, (os, "getcwd")),
    (bytearray, (1 << 40,)),
    (torch.zeros, (1 << 36,)),
    (torch.load, (MARKER,)),
]


class Call:
    """What a pickle from a stranger can hold."""

    def __init__(self, function: Callable[..., object], arguments: tuple[Any, ...]):
        self.how = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.how


def state(files: Files) -> dict[Any, Any]:
    """What the file holds, without what was changed in its bytes before. Raises Unfit where it cannot be read."""
    try:
        loaded = torch.load(io.BytesIO(files[BIN]), weights_only=True)
    except Exception:
        raise Unfit from None
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise Unfit
    return loaded


def reorder(rng: random.Random, files: Files) -> None:
    content = state(files)
    files[BIN] = as_pickle(dict(rng.sample(list(content.items()), len(content))))


def other_container(rng: random.Random, files: Files) -> None:
    content = state(files)
    what = rng.randrange(4)
    if what == 0:
        files[BIN] = as_pickle(OrderedDict(content))
    elif what == 1:
        files[BIN] = as_pickle({name: torch.nn.Parameter(value) for name, value in content.items()})
    elif what == 2:
        files[BIN] = as_pickle(content, _use_new_zipfile_serialization=False)
    else:
        files[BIN] = as_pickle(content, pickle_protocol=rng.choice([2, 3]))


def views(rng: random.Random, files: Files) -> None:
    """The same numbers laid out in another way: as views of larger storages, transposed, or in another dtype."""
    content = state(files)
    for name, value in content.items():
        what = rng.randrange(5)
        if what == 0 and value.ndim == 2:
            content[name] = value.T.contiguous().T
        elif what == 1:
            content[name] = torch.cat([value, value])[: len(value)] if value.ndim else value
        elif what == 2:
            content[name] = value.to(rng.choice([torch.float32, torch.float64]))
        elif what == 3 and value.ndim == 2:
            content[name] = torch.stack([value, value], dim=-1)[..., rng.randrange(2)]
    files[BIN] = as_pickle(content)


def odd_values(rng: random.Random, files: Files) -> None:
    """Something else in the place of one tensor, or under another name."""
    content = state(files)
    if not content:
        raise Unfit
    name = rng.choice(list(content))
    shape = tuple(content[name].shape)
    with warnings.catch_warnings(action="ignore"):  # old, and yet found in files
        quantised = torch.quantize_per_tensor(torch.ones(shape), 0.1, 0, torch.qint8)
    odd: list[Any] = [
        None, 3, 1.5, "x", [1, 2], {"a": torch.ones(2)}, torch.ones(shape).to_sparse(), torch.ones(shape, device="meta"),
        torch.ones(()).expand(shape), torch.ones(1).expand(2**40), torch.ones(1, 1).expand(2**20, 2**20), torch.ones(()),
        torch.ones(shape, dtype=torch.complex64), torch.ones(shape, dtype=torch.bool), torch.full(shape, torch.nan),
        torch.ones(shape, dtype=torch.int32), torch.ones(shape).half(), torch.zeros(0), torch.ones(shape).to(torch.float8_e5m2),
        torch._neg_view(torch.ones(shape)), torch.ones(shape, dtype=torch.complex64).imag, quantised, torch.Size([1]),
        torch.nn.Parameter(torch.ones(shape)), torch.bfloat16, torch.ones(shape).untyped_storage(),
    ]  # fmt: skip
    key: Any = rng.choice([name, name, name, 7, None, ("a", 1), *rng.sample(NAMES, 2)])
    content[key] = rng.choice(odd)
    files[BIN] = as_pickle(content, _use_new_zipfile_serialization=rng.random() < 0.8)


def odd_container(rng: random.Random, files: Files) -> None:
    content = state(files)
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    whole: list[Any] = [list(content.values()), {"state_dict": content}, {}, None, loop, set(content), torch.ones(3)]
    files[BIN] = as_pickle(rng.choice(whole), _use_new_zipfile_serialization=rng.random() < 0.8)


def hidden_call(rng: random.Random, files: Files) -> None:
    content = state(files)
    call = Call(*rng.choice(CALLS))
    kinds: list[Any] = [{**content, "x": call}, call, {**content, call: 1}, [call]]
    try:
        files[BIN] = as_pickle(rng.choice(kinds), _use_new_zipfile_serialization=rng.random() < 0.7)
    except Exception:  # what is called cannot be pickled
        raise Unfit from None


def scratch_records(rng: random.Random, files: Files) -> None:
    """Bytes inside one file of the zip archive, whose directory and checksums are in order."""
    files[BIN] = rezip(files[BIN], lambda name, data: scratch(rng, data) if rng.random() < 0.2 else data)


def scratch_the_pickle(rng: random.Random, files: Files) -> None:
    files[BIN] = rezip(files[BIN], lambda name, data: scratch(rng, data) if name.endswith("data.pkl") else data)


def compress(rng: random.Random, files: Files) -> None:
    """Deflated records, of which one may be a bomb."""
    bomb = b"\0" * rng.choice([0, 0, 1 << 24])
    files[BIN] = rezip(
        files[BIN], lambda name, data: data + bomb * name.endswith("/3"), zipfile.ZIP_DEFLATED, rng.choice([1, 0.5])
    )


def rezip(
    content: bytes,
    change: Callable[[str, bytes], bytes],
    compression: int = zipfile.ZIP_STORED,
    share: float = 1,
) -> bytes:
    """The archive with its files changed. Raises Unfit where it is none."""
    out = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
            for number, name in enumerate(old.namelist()):
                kind = compression if number < share * len(old.namelist()) else zipfile.ZIP_STORED
                new.writestr(name, change(name, old.read(name)), kind)
    except Exception:
        raise Unfit from None
    return out.getvalue()


def scratch_file(rng: random.Random, files: Files) -> None:
    files[BIN] = scratch(rng, files[BIN])


PICKLES = (
    {change.__name__: change for change in (reorder, other_container, views)},
    {
        change.__name__: change
        for change in (
            odd_values, odd_container, hidden_call, scratch_records, scratch_the_pickle, compress, scratch_file,
        )
    },
)  # fmt: skip
