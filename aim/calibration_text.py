"""Turn calibration text into blocks of tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoints.errors import ArgumentError, InputError, first_line
from checkpoints.settings import setting
from checkpoints.text_files import READERS, read_rows

PUBLISHED_DATASET = "mit-han-lab/pile-val-backup::validation"


@dataclass(frozen=True)
class CalibrationData:
    """What the base model is run on. The defaults are the AIM paper's recipe.

    Attributes:
        source: a hub dataset, `NAME`, `NAME:CONFIG` or `NAME:CONFIG:SPLIT` (an empty CONFIG is the dataset's default, an absent
            SPLIT `validation`, else `train`); or a local .txt (one text a line), .json, .jsonl or .parquet file, or .gz of one;
            or a folder that `datasets` saved.
        text_field: which field of a row holds the text.
        n_samples: texts kept.
        block_size: tokens of one forward pass, and of the longest text that is kept.
        seed: of the shuffle before texts are picked.
    """

    source: str = PUBLISHED_DATASET
    text_field: str = "text"
    n_samples: int = 256
    block_size: int = 512
    seed: int = 42

    def __post_init__(self) -> None:
        for name, number in (("n_samples", self.n_samples), ("block_size", self.block_size)):
            if number < 1:
                raise ArgumentError(f"{setting(name)}: expected at least 1, got {number}.")
        if not 0 <= self.seed < 1 << 32:
            raise ArgumentError(
                f"{setting('calibration.seed')}: expected a whole number from 0 to 4294967295, got {self.seed}."
            )

    def as_json(self) -> dict[str, Any]:
        """Its fields, for recipes and activation files."""
        return asdict(self)


@dataclass(frozen=True)
class TokenBlocks:
    """Token blocks, and what became of the texts.

    tokens: `[blocks, block_size]` int64; texts: how many were kept; too_long, empty: how many were passed over on the way;
    dropped_tokens: the tail that filled no block.
    """

    tokens: torch.Tensor
    texts: int
    too_long: int
    empty: int
    dropped_tokens: int

    def as_json(self) -> dict[str, int]:
        """The counts, for recipes and activation files."""
        return {
            "texts": self.texts,
            "too_long": self.too_long,
            "empty": self.empty,
            "blocks": len(self.tokens),
            "dropped_tokens": self.dropped_tokens,
        }

    def summary(self, data: CalibrationData) -> str:
        """One line for people."""
        passed = f"{self.too_long} passed over as longer than {data.block_size} tokens, {self.empty} as empty"
        asked = "" if self.texts == data.n_samples else f" (of the {data.n_samples} asked for)"
        return (
            f"calibration: {self.texts} texts{asked} of {data.source} ({passed}), {len(self.tokens)} blocks of "
            f"{data.block_size} tokens, {self.dropped_tokens} tokens left over"
        )


def make_blocks(data: CalibrationData, encode: Callable[[str], list[int]], *, quiet: bool = False) -> TokenBlocks:
    """Shuffle, pick, encode and cut calibration texts, as the AIM authors' program does.

    Texts are shuffled with `data.seed`; each is stripped and encoded with the tokenizer's own special tokens; the first
    `n_samples` that are neither empty nor longer than `block_size` tokens are joined and cut into blocks, the tail dropped.

    Args:
        data: which texts.
        encode: text -> token ids, special tokens included.
        quiet: no progress bars of a download.

    Raises: InputError: no such data; a row whose field is missing or no text; too little text for one block.
    """
    rows = open_texts(data, quiet=quiet)
    kept: list[int] = []
    texts = too_long = empty = 0
    # The permutation that datasets.Dataset.shuffle(seed) applies.
    for index in np.random.default_rng(data.seed).permutation(len(rows)):
        tokens = encode(_text_of(rows[int(index)], int(index), data).strip())
        if not tokens:
            empty += 1
        elif len(tokens) > data.block_size:
            too_long += 1
        else:
            kept += tokens
            texts += 1
            if texts == data.n_samples:
                break
    blocks = len(kept) // data.block_size
    if not blocks:
        raise InputError(
            f"{data.source}: expected text for at least one block of {data.block_size} tokens, got {texts} texts with {len(kept)} tokens "
            f"({too_long} of {len(rows)} were longer than a block, {empty} empty). Use a smaller {setting('block_size')}, or more text."
        )
    used = blocks * data.block_size
    tokens_tensor = torch.tensor(kept[:used], dtype=torch.int64).view(blocks, data.block_size)
    return TokenBlocks(tokens_tensor, texts, too_long, empty, len(kept) - used)


def _text_of(row: Any, index: int, data: CalibrationData) -> str:
    if isinstance(row, str):
        return row
    text = row.get(data.text_field) if isinstance(row, dict) else None
    if isinstance(text, str):
        return text
    if not isinstance(row, dict):
        raise InputError(
            f"{data.source}: row {index}: expected a text or an object, got {type(row).__name__}. Mend or remove it."
        )
    got = "no such field" if data.text_field not in row else type(text).__name__
    raise InputError(
        f"{data.source}: row {index}: expected text in the field '{data.text_field}', got {got}. "
        f"The row has: {', '.join(sorted(map(str, row)))}. Name another field with {setting('text_field')}."
    )


def open_texts(data: CalibrationData, *, quiet: bool = False) -> Sequence[Any]:
    """The rows of a data source, each a string or a mapping with the text field. Raises InputError where there are none."""
    path = Path(data.source).expanduser()
    if path.is_file():
        rows: Sequence[Any] = read_rows(path)
    elif path.is_dir():
        rows = _load_saved(path, data)
    elif is_local(data.source):
        raise InputError(
            f"{setting('calibration.source', data.source)}: no such file. Give a file of texts, or a hub dataset NAME:CONFIG:SPLIT."
        )
    else:
        rows = _load_hub(data, quiet)
    if not len(rows):
        raise InputError(f"{data.source}: expected texts, got an empty file. Give another.")
    return rows


def is_local(source: str) -> bool:
    """Whether a source means a file or folder, there or not, and no hub dataset."""
    path = Path(source).expanduser()
    return path.exists() or source.startswith((".", "/", "~")) or path.suffix in (*READERS, ".gz")


def _load_saved(path: Path, data: CalibrationData) -> Sequence[Any]:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise InputError(
            f"{path}: expected a folder saved by the datasets library, got {first_line(error)}. Give a folder that it saved, or a file of texts."
        ) from None
    return _pick_split(loaded, "", data) if isinstance(loaded, datasets.DatasetDict) else loaded


def _load_hub(data: CalibrationData, quiet: bool) -> Sequence[Any]:
    """A hub dataset, downloaded or from the cache."""
    import datasets

    name, _, rest = data.source.partition(":")
    config, _, split = rest.partition(":")
    try:
        with _datasets_bars(shown=not quiet and sys.stderr.isatty()):
            loaded = datasets.load_dataset(name, config or None, split=split or None)
    except Exception as error:  # every kind: network, missing, builder scripts, broken files
        if "zst" in str(error):
            raise InputError(
                f"{setting('calibration.source', data.source)}: is compressed with zstd, which takes the package zstandard. Run `pip install zstandard`."
            ) from error
        raise InputError(
            f"{setting('calibration.source', data.source)}: is no local file, and the hub dataset cannot be loaded: {first_line(error)}. "
            "Check the name and the network, or give a local file of texts."
        ) from error
    return loaded if split else _pick_split(loaded, split, data)


@contextmanager
def _datasets_bars(*, shown: bool) -> Iterator[None]:
    """Show or hide the progress bars of the datasets library, which draws them without a terminal too."""
    import datasets

    enabled = not datasets.are_progress_bars_disabled()
    level = datasets.logging.get_verbosity()
    if not shown:
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if enabled:
            datasets.enable_progress_bars()


def _pick_split(loaded: Any, split: str, data: CalibrationData) -> Sequence[Any]:
    for candidate in (split, "validation", "train"):
        if candidate in loaded:
            rows: Sequence[Any] = loaded[candidate]
            return rows
    raise InputError(
        f"{data.source}: expected a split 'validation' or 'train', got {', '.join(loaded)}. Name one: NAME:CONFIG:SPLIT."
    )
