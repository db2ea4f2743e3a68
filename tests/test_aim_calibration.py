"""Calibration text -> blocks of tokens: every file format, hub datasets, which texts are picked, and what is refused."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from aim.calibrate import check_block_size, read_blocks
from aim.calibration_text import PUBLISHED_DATASET, CalibrationData, TokenBlocks, make_blocks, open_texts
from checkpoints.errors import ArgumentError, InputError
from tests.aim_runs import encoder, open_folder, random_texts
from tests.fake_hub import FakeHub
from tests.golden_files import GOLDENS
from tests.reference.aim import pick_blocks

ROOT = Path(__file__).parent.parent
TEXTS = [*random_texts(30, seed=3), "  two  words \t", "a line\u2028that is one\x0ctext\x85still", "ünïcödé ✓"]


def encode(text: str) -> list[int]:
    return encoder().encode(text).ids


def letters(text: str) -> list[int]:
    """A token for each letter."""
    return [ord(letter) for letter in text]


def rows_of(path: Path, **fields: Any) -> list[str]:
    """The texts of a source, in order."""
    data = CalibrationData(str(path), **fields)
    return [row if isinstance(row, str) else row[data.text_field] for row in open_texts(data)]


# Formats


def write_parquet(path: Path, texts: list[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), path)


def write_saved(path: Path, texts: list[str]) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": texts}).save_to_disk(path)


def write_saved_splits(path: Path, texts: list[str]) -> None:
    import datasets

    wrong = datasets.Dataset.from_dict({"text": ["wrong split"]})
    right = datasets.Dataset.from_dict({"text": texts})
    datasets.DatasetDict({"test": wrong, "train": wrong, "validation": right}).save_to_disk(path)


def json_writer(make: Callable[[list[str]], Any]) -> Callable[[Path, list[str]], Any]:
    return lambda path, texts: path.write_text(json.dumps(make(texts)))


def lines_writer(end: str, start: str = "", **dump: Any) -> Callable[[Path, list[str]], None]:
    def write(path: Path, texts: list[str]) -> None:
        lines = (json.dumps({"meta": {"n": 1}, "text": text}, **dump) + end for text in texts)
        path.write_bytes((start + "".join(lines)).encode())

    return write


FORMATS: dict[str, tuple[str, Callable[[Path, list[str]], Any]]] = {
    "txt": ("x.txt", lambda path, texts: path.write_bytes("\n".join(texts).encode())),
    "txt of Windows": (
        "x.txt",
        lambda path, texts: path.write_bytes(("\ufeff" + "\r\n".join(texts) + "\r\n").encode()),
    ),
    "txt with empty lines": ("x.txt", lambda path, texts: path.write_bytes(("\n \n" + "\n\n".join(texts)).encode())),
    "json list of texts": ("x.json", json_writer(lambda texts: texts)),
    "json list of objects": ("x.json", json_writer(lambda texts: [{"text": text, "n": 1} for text in texts])),
    "json object with rows": ("x.json", json_writer(lambda texts: {"v": 1, "rows": [{"text": t} for t in texts]})),
    "json columns": ("x.json", json_writer(lambda texts: {"n": [0] * len(texts), "text": texts})),
    "jsonl": ("x.jsonl", lines_writer("\n")),
    "jsonl, plain letters": ("x.jsonl", lines_writer("\n", ensure_ascii=False)),
    "jsonl of Windows": ("x.jsonl", lines_writer("\r\n", start="\ufeff")),
    "jsonl with empty lines": ("x.jsonl", lines_writer("\n\n  \n")),
    "parquet": ("x.parquet", write_parquet),
    "saved dataset": ("x", write_saved),
    "saved splits": ("x", write_saved_splits),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_texts(kind: str, tmp_path: Path) -> None:
    name, write = FORMATS[kind]
    write(tmp_path / name, TEXTS)
    assert [text.strip() for text in rows_of(tmp_path / name)] == [text.strip() for text in TEXTS]
    if (tmp_path / name).is_file():
        zipped = tmp_path / f"{name}.gz"
        zipped.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        assert rows_of(zipped) == rows_of(tmp_path / name)


def test_a_text_field_of_another_name(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": "no", "body": text}) + "\n" for text in TEXTS))
    assert rows_of(path, text_field="body") == TEXTS


# Which texts, which tokens


@pytest.mark.parametrize(
    ("n_samples", "block_size", "seed"), [(10, 40, 42), (10, 40, 7), (3, 64, 0), (100, 300, 42), (4, 30, 1)]
)
def test_blocks_are_the_references(n_samples: int, block_size: int, seed: int, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(TEXTS))
    data = CalibrationData(str(tmp_path / "x.json"), n_samples=n_samples, block_size=block_size, seed=seed)
    blocks = make_blocks(data, encode)
    expected = pick_blocks(TEXTS, encode, n_samples=n_samples, block_size=block_size, seed=seed)
    assert blocks.tokens.dtype == torch.int64
    assert torch.equal(blocks.tokens, expected)
    assert blocks.texts <= n_samples
    lengths = [len(encode(text.strip())) for text in TEXTS]
    if n_samples >= len(TEXTS):  # every text was looked at
        assert blocks.texts == sum(length <= block_size for length in lengths)
        assert blocks.too_long == sum(length > block_size for length in lengths)
        kept = sum(length for length in lengths if length <= block_size)
        assert blocks.dropped_tokens == kept - blocks.tokens.numel() == kept % block_size


def test_counts_by_hand(tmp_path: Path) -> None:
    """Blocks of 4: "abc", "de", "fghi" are 9 tokens, hence 2 blocks and 1 left over; "jklmn" is too long, " " empty."""
    (tmp_path / "x.json").write_text(json.dumps(["abc", " de ", "fghi", "jklmn", " ", ""]))
    data = CalibrationData(str(tmp_path / "x.json"), block_size=4)
    blocks = make_blocks(data, letters)
    assert (blocks.texts, blocks.too_long, blocks.empty, blocks.dropped_tokens) == (3, 1, 2, 1)
    assert blocks.tokens.shape == (2, 4)
    summary = blocks.summary(data)
    assert all(part in summary for part in ("3 texts", "1 passed over as longer than 4 tokens", "2 as empty"))
    assert "2 blocks of 4 tokens, 1 tokens left over" in summary


@given(
    st.lists(st.text(alphabet="ab ", max_size=9), min_size=1, max_size=20),
    st.integers(1, 8),
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
)
def test_any_texts_give_what_the_reference_picks(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], n_samples: int, block_size: int, seed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(texts))
    data = CalibrationData(str(path), n_samples=n_samples, block_size=block_size, seed=seed)
    expected = pick_blocks(texts, letters, n_samples=n_samples, block_size=block_size, seed=seed)
    if not len(expected):
        with pytest.raises(InputError, match="at least one block"):
            make_blocks(data, letters)
    else:
        assert torch.equal(make_blocks(data, letters).tokens, expected)


def test_the_defaults_are_the_published_recipe() -> None:
    assert CalibrationData() == CalibrationData("mit-han-lab/pile-val-backup::validation", "text", 256, 512, 42)


def test_tokens_are_the_base_models_own() -> None:
    data = CalibrationData(str(GOLDENS / "inputs" / "calib.jsonl.gz"), n_samples=20, block_size=128)
    blocks: TokenBlocks = read_blocks(open_folder(GOLDENS / "inputs" / "base"), data)
    assert torch.equal(blocks.tokens, make_blocks(data, encode).tokens)
    assert (blocks.tokens == 1).sum() >= blocks.texts - 1  # <s> starts each text


# Hub datasets

HUB_PROBE = """
import json, sys
from pathlib import Path
from tokenizers import Tokenizer
from aim.calibration_text import CalibrationData, make_blocks, open_texts
from checkpoints.errors import InputError

answers = {}
for source in json.loads(sys.argv[1]):
    try:
        rows = open_texts(CalibrationData(source))
        answers[source] = [rows[index]["text"] for index in range(len(rows))]
    except InputError as error:
        answers[source] = str(error)
encode = Tokenizer.from_file(sys.argv[2]).encode
answers["published"] = make_blocks(CalibrationData(), lambda text: encode(text).ids).tokens.tolist()
print(json.dumps(answers))
"""


def write_lines(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def hub_answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process that knows only a fake hub makes of each source."""
    folder = tmp_path_factory.mktemp("hub")
    write_lines(folder / "splits" / "train.jsonl", "train 0")
    write_lines(folder / "splits" / "validation.jsonl", "validation 0", "validation 1")
    write_lines(folder / "splits" / "test.jsonl", "test 0")
    write_lines(folder / "train" / "train.jsonl", "only train")
    write_lines(folder / "test" / "test.jsonl", "only test")
    (folder / "parquet" / "data").mkdir(parents=True)
    write_parquet(folder / "parquet" / "data" / "validation-00000-of-00001.parquet", ["from parquet"])
    write_lines(folder / "configs" / "a.jsonl", "config a")
    write_lines(folder / "configs" / "b.jsonl", "config b")
    entries = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: validation\n    path: {name}.jsonl\n" for name in "ab"
    )
    (folder / "configs" / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    published = folder / "published"
    published.mkdir()
    (published / "validation.jsonl.gz").write_bytes((GOLDENS / "inputs" / "calib.jsonl.gz").read_bytes())
    repos = {f"org/{name}": folder / name for name in ("splits", "train", "test", "parquet", "configs")}
    repos["mit-han-lab/pile-val-backup"] = published
    sources = ["org/splits", "org/splits::test", "org/splits::train", "org/splits::nosuch", "org/train", "org/test"]
    sources += ["org/parquet", "org/configs:b", "org/configs:a:validation", "org/configs:nosuch", "org/missing"]
    tokenizer = GOLDENS / "inputs" / "base" / "tokenizer.json"
    with FakeHub(datasets=repos) as hub:
        done = subprocess.run(
            [sys.executable, "-c", HUB_PROBE, json.dumps(sources), str(tokenizer)],
            cwd=ROOT,
            env=hub.environment(folder / "cache"),
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("org/splits", ["validation 0", "validation 1"]),
        ("org/splits::test", ["test 0"]),
        ("org/splits::train", ["train 0"]),
        ("org/train", ["only train"]),
        ("org/parquet", ["from parquet"]),
        ("org/configs:b", ["config b"]),
        ("org/configs:a:validation", ["config a"]),
    ],
)
def test_hub_datasets_by_name_config_and_split(source: str, texts: list[str], hub_answers: Mapping[str, Any]) -> None:
    assert hub_answers[source] == texts


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("org/splits::nosuch", ["org/splits::nosuch", "nosuch"]),
        ("org/test", ["expected a split 'validation' or 'train', got test", "NAME:CONFIG:SPLIT"]),
        ("org/configs:nosuch", ["org/configs:nosuch", "nosuch"]),
        ("org/missing", ["source org/missing", "org/missing"]),
    ],
)
def test_hub_datasets_that_are_not_there(source: str, parts: list[str], hub_answers: Mapping[str, Any]) -> None:
    message = hub_answers[source]
    assert isinstance(message, str)
    assert all(part in message for part in parts), message


def test_the_default_dataset_gives_the_published_blocks(hub_answers: Mapping[str, Any]) -> None:
    expected = load_file(GOLDENS / "aim" / "aim_blocks.safetensors")["blocks"].long()
    assert torch.equal(torch.tensor(hub_answers["published"]), expected)


def test_without_a_network_the_message_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"mit-han-lab/pile-val-backup.*network.*local file"):
        open_texts(CalibrationData(PUBLISHED_DATASET))


# Refused


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("x.csv", b"text\nhello\n", ["expected .txt, .json, .jsonl, .parquet, or .gz", "'.csv'"]),
        ("x.gz", gzip.compress(b"hello\n", mtime=0), ["expected .txt, .json", "''"]),
        ("x.txt", b"", ["empty"]),
        ("x.txt", b"\n \n", ["empty"]),
        ("x.txt", "é".encode("latin-1"), ["cannot be read", "utf-8"]),
        ("x.txt.gz", b"no gzip", ["x.txt.gz: cannot be read"]),
        ("x.txt.gz", gzip.compress(b"hello " * 99, mtime=0)[:-9], ["x.txt.gz: cannot be read"]),
        ("x.json", b"{", ["expected JSON"]),
        ("x.json", b"[" * 100_000, ["expected JSON"]),
        ("x.json", b'"hello"', ["expected a list", "str"]),
        ("x.json", b"{}", ["expected a list", "dict"]),
        ("x.json", b'{"text": []}', ["empty"]),
        ("x.json", b"[]", ["empty"]),
        ("x.jsonl", b'{"text": "a"}\n{"text"\n', ["x.jsonl: line 2: expected JSON"]),
        ("x.parquet", b"PAR1 is not all", ["cannot be read as parquet"]),
        ("x.parquet.gz", gzip.compress(b"x" * 99, mtime=0), ["cannot be read as parquet"]),
    ],
)
def test_files_that_cannot_be_read(name: str, content: bytes, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_texts(CalibrationData(str(path)))
    assert str(path) in str(caught.value)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_damaged_stream_inside_a_gz_is_refused(tmp_path: Path) -> None:
    damaged = bytearray(gzip.compress("\n".join(TEXTS).encode()))
    for position in range(30, 60):
        damaged[position] ^= 0xFF
    (tmp_path / "x.txt.gz").write_bytes(damaged)
    with pytest.raises(InputError, match=r"x\.txt\.gz: cannot be read"):
        open_texts(CalibrationData(str(tmp_path / "x.txt.gz")))


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"body": "hello"}, ["row 0", "'text'", "body", "text_field"]),
        ({"text": 3, "n": 1}, ["row 0", "'text'", "int", "n, text"]),
        ({"text": None}, ["row 0", "'text'"]),
        ({"text": ["a", "b"]}, ["row 0", "'text'", "list"]),
        (17, ["row 0", "int"]),
        ({"text": ""}, ["at least one block", "1 empty"]),
        ({"text": "   "}, ["at least one block", "1 empty"]),
        ({"text": "hello"}, ["at least one block of 8 tokens, got 1 texts with 5 tokens", "block_size"]),
        ({"text": "hello world"}, ["at least one block of 8 tokens, got 0 texts with 0 tokens", "1 of 1 were longer"]),
    ],
)
def test_rows_that_give_no_text(row: Any, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps([row]))
    with pytest.raises(InputError) as caught:
        make_blocks(CalibrationData(str(tmp_path / "x.json"), block_size=8), letters)
    assert all(part in str(caught.value) for part in [str(tmp_path / "x.json"), *parts]), caught.value


def test_places_that_are_not_there(tmp_path: Path) -> None:
    for source in (f"{tmp_path}/no.txt", f"{tmp_path}/no", "./no", "no.jsonl", "no.json.gz"):
        with pytest.raises(InputError, match="no such file"):
            open_texts(CalibrationData(source))
    with pytest.raises(InputError, match="datasets library"):
        open_texts(CalibrationData(str(tmp_path)))


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ({"n_samples": 0}, "n_samples"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": -5}, "block_size"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 32}, "seed"),
    ],
)
def test_numbers_out_of_range(arguments: dict[str, Any], flag: str) -> None:
    with pytest.raises(ArgumentError, match=f"{flag}: expected"):
        CalibrationData("x.txt", **arguments)


def test_tokens_that_the_embedding_has_no_row_for(tmp_path: Path) -> None:
    """A tokenizer with one more token than the base has rows."""
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        (base / name).write_bytes((GOLDENS / "inputs" / "base" / name).read_bytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((GOLDENS / "inputs" / "instruct_pad" / name).read_bytes())
    (tmp_path / "x.txt").write_text("some text and a [PAD] token\n" * 20)
    with pytest.raises(InputError, match=r"id 300.*300 rows"):
        read_blocks(open_folder(base), CalibrationData(str(tmp_path / "x.txt"), block_size=32))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    with pytest.raises(InputError, match="tokenizer"):
        read_blocks(open_folder(base), CalibrationData(str(tmp_path / "x.txt"), block_size=32))


def test_blocks_longer_than_the_models_positions_are_refused() -> None:
    base = open_folder(GOLDENS / "inputs" / "base")
    check_block_size(base, 1024)
    with pytest.raises(InputError, match=r"block_size: expected at most .*1024.*got 1025"):
        check_block_size(base, 1025)
