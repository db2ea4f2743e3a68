"""What a checkpoint is on disk, piece by piece: the file layout, reading, writing, staging, side files, tokens, provenance."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save, save_file

from checkpoints import VERSION, writer
from checkpoints.errors import ArgumentError, InputError, Refusals, first_line, unknown
from checkpoints.files import write_text
from checkpoints.folder import Folder
from checkpoints.location import Location, ModelName
from checkpoints.model import Model, open_models
from checkpoints.provenance import common_licence, describe_input, model_card, versions, write_recipe
from checkpoints.reader import find_weight_files, open_checkpoint, read_tensor, same_values
from checkpoints.rows import AlignedRows
from checkpoints.safetensors_format import build_header, parse_header, pread_exactly, read_header
from checkpoints.save_path import check_save_path, check_space, partial_folder
from checkpoints.side_names import LARGEST, MOST_OTHERS
from checkpoints.sidecars import (
    SideFiles,
    config_with_dtype,
    licence_of,
    list_left_out,
    list_side_files,
    read_json,
)
from checkpoints.source import SAFETENSORS_DTYPES, TensorInfo, TensorRef
from checkpoints.staging import staged
from checkpoints.tensor_names import split_name
from checkpoints.vocabulary import MISSING, Vocabulary, match_rows, read_vocabulary, vocabulary_digest
from checkpoints.work_folder import STATE
from checkpoints.writer import CheckpointWriter, chunked_digest, natural_key, plan_shards
from tests.pico import copy_tokenizer, write_checkpoint

F32, BF16, I64 = torch.float32, torch.bfloat16, torch.int64


def info_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def buffer_for(elements: int) -> torch.Tensor:
    return torch.empty(8 * elements, dtype=torch.uint8)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ------------------------------------------------------------------------------------------------------ file layout

HEADER = (
    b'{"__metadata__":{"format":"pt"},"a.b":{"data_offsets":[4,8],"dtype":"BF16","shape":[2]},'
    b'"z":{"data_offsets":[0,4],"dtype":"F32","shape":[]}}'
)


def test_header_byte_for_byte():
    header, offsets = build_header({"z": TensorInfo(F32, ()), "a.b": TensorInfo(BF16, (2,))})
    text = HEADER + b" " * 4  # 140 bytes are padded to 144, so that the tensors start at a multiple of 8
    assert len(text) % 8 == 0
    assert header == len(text).to_bytes(8, "little") + text
    assert offsets == {"z": 152, "a.b": 156}


def test_header_as_the_library_writes_it():
    """Another order of keys is all that differs."""
    tensors = {"one": torch.arange(3, dtype=F32), "two": torch.zeros(2, 0), "three": torch.tensor(True)}
    library = save(tensors, metadata={"format": "pt"})
    length = int.from_bytes(library[:8], "little")
    in_its_order = sorted(tensors, key=lambda name: json.loads(library[8 : 8 + length])[name]["data_offsets"])
    header, _ = build_header({name: info_of(tensors)[name] for name in in_its_order})
    assert json.loads(header[8:]) == json.loads(library[8 : 8 + length])


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
tensors_strategy = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(list(SAFETENSORS_DTYPES.values())), shapes),
    max_size=5,
).map(lambda kinds: {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in kinds.items()})


@given(tensors_strategy)
def test_we_read_what_the_library_writes(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("x") / "file.safetensors"
    save_file(tensors, path)
    content = path.read_bytes()
    stored = read_header(path, "M")
    assert {name: place.info for name, place in stored.items()} == info_of(tensors)
    for name, place in stored.items():
        assert content[place.offset : place.offset + place.info.nbytes] == raw(tensors[name])


@given(tensors_strategy)
def test_the_library_reads_what_we_write(tmp_path_factory, tensors):
    folder = tmp_path_factory.mktemp("x")
    write_all(folder, tensors, 10**9)
    content = (folder / "model.safetensors").read_bytes()
    if tensors:
        read = load_bytes(content)
        assert info_of(read) == info_of(tensors)
        assert all(raw(read[name]) == raw(tensors[name]) for name in tensors)
    for place in read_header(folder / "model.safetensors", "M").values():
        assert place.offset % place.info.dtype.itemsize == 0


@given(st.binary(max_size=80), st.integers(0, 200))
def test_any_header_is_read_or_refused(header, spare):
    with suppress(InputError):
        stored = parse_header(header, 8 + len(header) + spare, "M: x")
        assert sum(place.info.nbytes for place in stored.values()) == spare


header_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**63) | st.floats() | st.sampled_from(["F32", "BF16", "x", ""]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), header_values))
def test_any_json_header_is_read_or_refused(header):
    text = json.dumps(header).encode()
    with suppress(InputError):
        parse_header(text, 8 + len(text), "M: x")


def test_reads_that_stop_half_way_are_continued(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"0123456789")
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: whole(fd, [view[:3] for view in views], offset))
    with (tmp_path / "x").open("rb") as file:
        view = bytearray(7)
        pread_exactly(file.fileno(), memoryview(view), 2, "M")
        assert bytes(view) == b"2345678"
        with pytest.raises(InputError, match=r"M: the file ended while it was read"):
            pread_exactly(file.fileno(), memoryview(view), 4, "M")


# ---------------------------------------------------------------------------------------------------------- reading


def sample() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return {
        "matrix": draw(5, 7).to(BF16),
        "cube": draw(3, 4, 5),
        "vector": draw(11).half(),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "ids": torch.arange(6),
        "mask": torch.tensor([[True, False], [False, True]]),
    }


@pytest.mark.parametrize(("kind", "shards"), [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 3)])
def test_every_range_of_every_tensor(tmp_path, kind, shards):
    tensors = sample()
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, shards=shards, weights=kind), "M")
    assert checkpoint.tensors == {name: info_of(tensors)[name] for name in sorted(tensors)}
    assert list(checkpoint.tensors) == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(read_tensor(checkpoint, name), tensor)
        for start in range(tensor.numel()):
            for stop in range(start + 1, tensor.numel() + 1):
                read = checkpoint.read(name, start, stop, buffer_for(stop - start))
                assert read.dtype == tensor.dtype
                assert torch.equal(read, tensor.reshape(-1)[start:stop])
    checkpoint.close()
    checkpoint.close()


def test_tensors_of_a_pickle_that_are_views_of_others(tmp_path):
    """Transposed, overlapping and tied tensors, and parameters."""
    whole = torch.arange(24.0).view(4, 6)
    content = {"t": whole.T, "part": whole[1:3, 2:], "tied": whole, "parameter": torch.nn.Parameter(whole[0])}
    torch.save(content, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path, "M")
    for name, tensor in content.items():
        flat = tensor.detach().reshape(-1)
        for start in range(flat.numel()):
            assert torch.equal(checkpoint.read(name, start, start + 1, buffer_for(1)), flat[start : start + 1])
        assert torch.equal(read_tensor(checkpoint, name), tensor)
        assert not read_tensor(checkpoint, name).requires_grad


def test_reading_from_many_threads(tmp_path):
    tensors = {name: torch.arange(10_000.0) + index for index, name in enumerate("abcd")}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, shards=2), "M")

    def read(index: int) -> bool:
        name, start = "abcd"[index % 4], index * 37 % 9_000
        values = checkpoint.read(name, start, start + 1000, buffer_for(1000))
        return torch.equal(values, tensors[name][start : start + 1000])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(500)))


def test_which_weights_are_taken(tmp_path):
    """In the order of transformers: safetensors before pickles, one file before an index."""
    content = {"a": torch.ones(1)}
    for shards, kind in ((2, "bin"), (1, "bin"), (2, "safetensors"), (1, "safetensors")):
        tensors = {**content, f"{kind}{shards}": torch.ones(1)}
        write_checkpoint(tmp_path, tensors, shards=shards, weights=kind)
        assert f"{kind}{shards}" in open_checkpoint(tmp_path, "M").tensors
    paths, weight_map = find_weight_files(tmp_path, "M")
    assert (paths, weight_map) == ([tmp_path / "model.safetensors"], None)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.unlink(),
        lambda path: os.utime(path, ns=(1, 1)),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_files_that_change_are_noticed(tmp_path, kind, change):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, {"a": torch.ones(2)}, weights=kind), "M")
    checkpoint.check_unchanged()
    change(checkpoint.files[0].path)
    with pytest.raises(InputError, match=rf"M: {checkpoint.files[0].path.name}: the file changed"):
        checkpoint.check_unchanged()


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, {"a": torch.ones(100)}), "M")
    os.truncate(tmp_path / "model.safetensors", 200)
    with pytest.raises(InputError, match=r"M: model\.safetensors: a: the file ended while it was read"):
        checkpoint.read("a", 50, 100, buffer_for(50))


def open_descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def test_nothing_stays_open(tmp_path):
    write_checkpoint(tmp_path, {name: torch.ones(2) for name in "abc"}, shards=3)
    before = open_descriptors()
    checkpoint = open_checkpoint(tmp_path, "M")
    assert open_descriptors() == before + 3
    checkpoint.close()
    assert open_descriptors() == before
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"?")
    with pytest.raises(InputError):
        open_checkpoint(tmp_path, "M")
    assert open_descriptors() == before
    good = write_checkpoint(tmp_path / "good", {"a": torch.ones(2)})
    with pytest.raises(Refusals, match="2 problems"):
        open_models([ModelName(str(path)) for path in (good, tmp_path, good, tmp_path / "nowhere")])
    assert open_descriptors() == before


def test_same_values(tmp_path, monkeypatch):
    monkeypatch.setattr("checkpoints.reader.READ_ELEMENTS", 4)
    values = torch.randn(3, 5).to(BF16)
    late = values.clone()
    late[2, 4] += 1
    tensors = {"a": values, "wide": values.float(), "late": late, "flat": values.reshape(15).clone()}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors), "M")
    same = {name: same_values(TensorRef(checkpoint, "a"), TensorRef(checkpoint, name)) for name in tensors}
    assert same == {"a": True, "wide": True, "late": False, "flat": False}


# ---------------------------------------------------------------------------------------------------------- writing


def write_all(
    folder: Path, tensors: Mapping[str, torch.Tensor], max_shard_bytes: int, **options: Any
) -> dict[str, Any]:
    """Write tensors whole, in the order given."""
    checkpoint = CheckpointWriter(
        Folder.open(folder), plan_shards(info_of(tensors), max_shard_bytes), **({"digest": "sha256"} | options)
    )
    for name, tensor in tensors.items():
        if tensor.numel():
            checkpoint.write(name, 0, tensor.contiguous().reshape(-1))
    return checkpoint.close()


def test_natural_order():
    names = ["layers.10.a", "layers.2.b", "layers.2.a", "embed", "2", "10", "layers", "layers.2"]
    assert sorted(names, key=natural_key) == [
        "2",
        "10",
        "embed",
        "layers",
        "layers.2",
        "layers.2.a",
        "layers.2.b",
        "layers.10.a",
    ]


@given(tensors_strategy, st.integers(1, 200))
def test_shards(tensors, limit):
    infos = info_of(tensors)
    shards = plan_shards(infos, limit)
    assert sorted(name for shard in shards for name in shard.offsets) == sorted(tensors)
    order = [name for shard in shards for name in sorted(shard.offsets, key=natural_key)]
    assert order == sorted(tensors, key=natural_key)
    for number, shard in enumerate(shards, 1):
        sizes = [infos[name].nbytes for name in shard.offsets]
        assert sum(sizes) <= limit or sum(size > 0 for size in sizes) <= 1 or sum(sizes) == max(sizes)
        assert shard.size == len(shard.header) + sum(sizes)
        expected = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        assert shard.file_name == expected


def test_shards_are_full_before_the_next_begins():
    infos = {f"layers.{i}.weight": TensorInfo(F32, (10,)) for i in range(12)}
    shards = plan_shards(infos, 120)
    assert [list(shard.offsets) for shard in shards] == [
        [f"layers.{3 * i + j}.weight" for j in range(3)] for i in range(4)
    ]
    assert len(plan_shards(infos, 119)) == 6
    assert len(plan_shards(infos, 1)) == 12


def test_wider_dtypes_come_first():
    infos = {
        "a": TensorInfo(BF16, (3,)),
        "b": TensorInfo(F32, (2,)),
        "c": TensorInfo(torch.bool, (1,)),
        "d": TensorInfo(I64, (1,)),
    }
    (shard,) = plan_shards(infos, 1000)
    assert sorted(shard.offsets, key=shard.offsets.__getitem__) == ["d", "b", "a", "c"]


def test_any_order_of_writes_gives_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK_BYTES", 64)
    tensors = {name: torch.randn(50).to(BF16) for name in "abc"}
    expected = write_all(tmp_path, tensors, 10**6)
    content = (tmp_path / "model.safetensors").read_bytes()
    pieces = [(name, start, min(start + 7, 50)) for name in tensors for start in range(0, 50, 7)]
    for seed in range(5):
        folder = tmp_path / str(seed)
        folder.mkdir()
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist()
        checkpoint = CheckpointWriter(Folder.open(folder), plan_shards(info_of(tensors), 10**6), digest="sha256")
        with ThreadPoolExecutor(4) as pool:
            for index in order:
                name, start, stop = pieces[index]
                pool.submit(checkpoint.write, name, start, tensors[name][start:stop])
        assert checkpoint.close() == expected
        assert (folder / "model.safetensors").read_bytes() == content


def test_digests_are_those_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK_BYTES", 100)
    tensors = {name: torch.randn(45) for name in "abcde"}
    result = write_all(tmp_path, tensors, 400)
    assert list(result) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]
    for name, summary in result.items():
        content = (tmp_path / name).read_bytes()
        chunks = [hashlib.sha256(content[begin : begin + 100]).digest() for begin in range(0, len(content), 100)]
        assert summary == {"bytes": len(content), "sha256_64MiB": hashlib.sha256(b"".join(chunks)).hexdigest()}
        assert chunked_digest(tmp_path / name, "sha256") == summary["sha256_64MiB"]
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    assert write_all(tmp_path, tensors, 400, digest=None) == {name: {"bytes": x["bytes"]} for name, x in result.items()}


def test_digest_of_nothing(tmp_path):
    (tmp_path / "x").touch()
    assert chunked_digest(tmp_path / "x", "sha256") == hashlib.sha256().hexdigest()


def test_index_of_shards(tmp_path):
    tensors = {"b": torch.ones(2), "a": torch.ones(3)}
    write_all(tmp_path, tensors, 12)
    assert (tmp_path / "model.safetensors.index.json").read_text() == (
        '{\n  "metadata": {\n    "total_size": 20\n  },\n  "weight_map": {\n'
        '    "a": "model-00001-of-00002.safetensors",\n    "b": "model-00002-of-00002.safetensors"\n  }\n}\n'
    )
    assert open_checkpoint(tmp_path, "M").tensors.keys() == {"a", "b"}


def test_elements_that_were_never_written_are_our_own_mistake(tmp_path):
    checkpoint = CheckpointWriter(
        Folder.open(tmp_path), plan_shards({"a": TensorInfo(F32, (2,))}, 100), digest="sha256"
    )
    checkpoint.write("a", 0, torch.ones(1))
    with pytest.raises(AssertionError, match="4 bytes were never written"):
        checkpoint.close()
    checkpoint.release()
    checkpoint.release()


def test_writes_that_stop_half_way_are_continued(tmp_path, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: whole(fd, view[:5], offset))
    write_all(tmp_path, {"a": torch.arange(9.0)}, 100)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.arange(9.0))


@pytest.mark.parametrize("call", ["ftruncate", "pwrite", "fsync"])
def test_a_disk_that_fails(tmp_path, monkeypatch, call):
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(
        InputError, match=r"model\.safetensors: cannot be written: No space left on device\. Free space"
    ):
        write_all(tmp_path, {"a": torch.ones(9)}, 100)


def test_a_small_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError, match=r"file/x: cannot be written: (File exists|Not a directory)\. Choose another out"
    ):
        write_text(tmp_path / "file" / "x", "", name="out")


# ---------------------------------------------------------------------------------------------------------- staging


def tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def finish(out: Path, text: str, *, overwrite: bool = False) -> None:
    with staged(out, overwrite=overwrite) as stage:
        work = stage.folder
        (work / "merge_recipe.json").write_text(text)


def test_a_folder_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with staged(out, overwrite=False) as stage:
        work = stage.folder
        assert work == partial_folder(out) == tmp_path / "a" / "b" / "out.partial"
        (work / "x").write_text("1")
        assert not out.exists()
    assert tree(tmp_path) == {"a/b/out/x": "1"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_appears_when_anything_goes_wrong(tmp_path, error):
    (tmp_path / "a").mkdir()

    def fail() -> None:
        with staged(tmp_path / "a" / "b" / "c" / "out", overwrite=False) as stage:
            work = stage.folder
            (work / "folder").mkdir()
            (work / "folder" / "x").write_text("1")
            raise error

    with pytest.raises(error):
        fail()
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]


def test_what_a_killed_run_left_is_cleared(tmp_path):
    left = tmp_path / "out.partial"
    (left / "folder").mkdir(parents=True)
    (left / "folder" / "x").touch()
    (left / STATE).mkdir()
    (left / ("." + "partial-" + "0" * 32)).touch()
    with staged(tmp_path / "out", overwrite=False, files=["folder/x"]) as stage:
        assert [path.name for path in stage.folder.iterdir()] == [STATE]
    assert tree(tmp_path) == {}


def test_a_folder_that_no_run_left_is_not_touched(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("1")
    with (
        pytest.raises(InputError, match=r"out\.partial: holds files that no run of ours put there\. Move them"),
        staged(tmp_path / "out", overwrite=False),
    ):
        pytest.fail("the folder was taken")
    assert tree(tmp_path) == {"out.partial/thesis.txt": "1"}


def test_clear_follows_no_links(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "keep").write_text("1")
    (tmp_path / "a" / "file").symlink_to(tmp_path / "keep")
    (tmp_path / "a" / "dangling").symlink_to("nowhere")
    with Folder.open(tmp_path / "a") as folder:
        folder.clear()
    assert tree(tmp_path) == {"keep": "1"}
    assert (tmp_path / "a").is_dir()


def test_one_run_at_a_time(tmp_path):
    with staged(tmp_path / "out", overwrite=False) as stage:
        work = stage.folder
        (work / "x").write_text("1")
        with pytest.raises(InputError, match="another run is writing it"), staged(tmp_path / "out", overwrite=False):
            pytest.fail("two runs at once")
        (tmp_path / "link").symlink_to("out")
        with pytest.raises(InputError, match="another run is writing it"), staged(tmp_path / "link", overwrite=False):
            pytest.fail("two runs at once, by a link")
    assert tree(tmp_path / "out") == {"x": "1"}


def test_many_runs_at_once(tmp_path):
    """Whoever comes first wins; nobody's result is mixed with another's or lost."""
    out = tmp_path / "deep" / "out"
    results: list[str] = []

    def attempt(number: int) -> None:
        try:
            with staged(out, overwrite=False) as stage:
                work = stage.folder
                (work / f"{number}").write_text(f"{number}")
            results.append(f"{number}")
        except InputError:
            pass

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 1
    assert tree(tmp_path) == {f"deep/out/{results[0]}": results[0]}


def test_the_work_of_another_run_that_has_just_ended(tmp_path, monkeypatch):
    """It is renamed between our opening and locking it: the lock is then on a finished result, not on our work."""
    finish(tmp_path / "out", "theirs")
    opened = os.open
    work = tmp_path / "out.partial"

    def open_finished(path, flags, *more, **keywords):
        if Path(path) == work and work.exists():
            work.rmdir()
            return opened(tmp_path / "out", flags, *more, **keywords)
        return opened(path, flags, *more, **keywords)

    monkeypatch.setattr(os, "open", open_finished)
    with pytest.raises(InputError, match="another run is writing it"), staged(tmp_path / "out", overwrite=True):
        pytest.fail("took the other run's result for its own work")
    assert tree(tmp_path) == {"out/merge_recipe.json": "theirs"}


def test_an_earlier_result_is_replaced(tmp_path):
    out = tmp_path / "out"
    finish(out, "1")
    (out / "more").touch()
    with pytest.raises(ArgumentError, match="not empty"):
        finish(out, "2")
    finish(out, "3", overwrite=True)
    assert tree(tmp_path) == {"out/merge_recipe.json": "3"}


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_an_earlier_result_is_back_where_the_last_step_fails(tmp_path, monkeypatch, error):
    out = tmp_path / "out"
    finish(out, "1")
    rename = os.rename

    def fail(source, target, **keywords):
        if Path(target) == out and Path(source) == partial_folder(out):
            raise error
        rename(source, target, **keywords)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(type(error)):
        finish(out, "2", overwrite=True)
    assert tree(tmp_path) == {"out/merge_recipe.json": "1"}


def test_an_earlier_result_that_was_left_aside_stays(tmp_path):
    """A run that was cut off between its two renames."""
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "merge_recipe.json").write_text("1")
    (problem,) = check_save_path(tmp_path / "out", [], overwrite=True)
    assert "out.replaced holds an earlier result" in str(problem)
    with pytest.raises(ArgumentError, match="Move it back or remove it"):
        finish(tmp_path / "out", "2", overwrite=True)
    assert tree(tmp_path) == {"out.replaced/merge_recipe.json": "1"}


def test_output_through_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/real")
    finish(tmp_path / "out", "1")
    finish(tmp_path / "out", "2", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert tree(tmp_path / "disk") == {"real/merge_recipe.json": "2"}


def test_work_that_cannot_begin(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"out\.partial: cannot be created: Not a directory"):
        finish(tmp_path / "file" / "a" / "out", "1")
    (tmp_path / "out.partial").touch()
    with pytest.raises(InputError, match=r"out\.partial: cannot be created: File exists"):
        finish(tmp_path / "out", "1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out.partial"]


def test_space(tmp_path, monkeypatch):
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=1_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert check_space(tmp_path / "a" / "b", 1_000) == []
    (problem,) = check_space(tmp_path / "a" / "b", 1_001)
    assert "needs 1,001 bytes" in str(problem)
    assert asked == [tmp_path, tmp_path]


# -------------------------------------------------------------------------------------------------------- side files


def test_side_files(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    wanted = [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "spiece.model",
        "additional_chat_templates/a.jinja",
        "additional_chat_templates/a.txt",
        "helpers.py",
        "modules.json",
        "sub/config.json",
        "tekken.json",
    ]
    left_out = [
        "2_Dense/model.onnx",
        "checkpoint-5/config.json",
        "epoch1/config.json",
        "epoch1/model.safetensors",
        "optimizer.pt",
        "trainer_state.json",
    ]
    unlisted = [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "README.md",
        "merge_recipe.json",
        "2_Dense/model.safetensors",
        ".env",
        ".git/config",
    ]
    for name in [*wanted, *left_out, *unlisted]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"0123\xff\r\n")
    (source / "tokenizer").mkdir()
    assert [path.as_posix() for path in list_side_files(source)] == sorted(wanted)
    with Folder.open(target) as opened:
        assert SideFiles(source).write(opened) == sorted(wanted)
    assert {path.read_bytes() for path in target.rglob("*") if path.is_file()} == {b"0123\xff\r\n"}
    assert SideFiles(source).nbytes == len(wanted) * 7 + 2**20
    assert list_left_out(source) == left_out


def test_side_files_that_are_too_large_too_many_or_elsewhere_are_left_out(tmp_path):
    for name in ("config.json", "big.json", "one.txt"):
        (tmp_path / name).write_text("{}")
    with (tmp_path / "big.json").open("r+b") as file:
        file.truncate(LARGEST + 1)
    (tmp_path / "link.json").symlink_to("/etc/hostname")
    assert [path.name for path in list_side_files(tmp_path)] == ["config.json", "one.txt"]
    assert list_left_out(tmp_path) == ["big.json", "link.json"]
    for number in range(MOST_OTHERS):
        (tmp_path / f"row{number}.json").write_text("{}")
    assert [path.name for path in list_side_files(tmp_path)] == ["config.json"]
    assert len(list_left_out(tmp_path)) == MOST_OTHERS + 3


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"torch_dtype": "bfloat16"}', '{"torch_dtype": "float16"}'),
        ('{ "dtype" :\n\t"float32" ,"x":1e-05}', '{ "dtype" :\n\t"float16" ,"x":1e-05}'),
        ('{"dtype": "bfloat16", "text_config": {"torch_dtype": "float32"}}', '{"dtype": "float16", "text_config": {"torch_dtype": "float16"}}'),
        ('{"dtype": null}', '{"dtype": null}'),
        ('{"dtypes": "x", "my_dtype": "x", "bnb_4bit_compute_dtype": "x"}', None),
        ('{"note": "\\"dtype\\": \\"x\\""}', None),
        ('{"model_type": "ünï"}', None),
    ],
)  # fmt: skip
def test_dtype_of_a_config(before, after):
    assert config_with_dtype(before.encode(), "float16").decode() == (before if after is None else after)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\ntext", "mit"),
        ("---\ntags:\n- x\nlicense:   'cc-by-nc-4.0'  # of the data\n---\n", "cc-by-nc-4.0"),
        ("---\nlicense: other\nlicense_name: own\n---\n", None),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", None),
        ("---\nlicense_name: own\n---\n", None),
        ("---\ntags: []\n---\nlicense: mit\n", None),
        ("# A model\nlicense: mit\n", None),
        ("---\nlicense: mit\n", None),
        ("", None),
        (None, None),
    ],
)
def test_licence_of_a_card(tmp_path, card, licence):
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode())
    assert licence_of(tmp_path) == licence


def test_json_of_a_model(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1]}')
    assert read_json(tmp_path / "a.json", "M") == {"a": [1]}
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match=r"^M: expected a in .*, got no plain file"):
        read_json(tmp_path / "a", "M")


# ------------------------------------------------------------------------------------------------------------- tokens


def vocabulary(*tokens: str) -> Vocabulary:
    return Vocabulary({token: index for index, token in enumerate(tokens)})


def test_rows_by_token():
    """The model's b, c, [PAD], a for the output's a, b, c, d, with a row of padding each: 3, 0, 1, none, 4."""
    rows = match_rows(vocabulary("a", "b", "c", "d"), 5, vocabulary("b", "c", "[PAD]", "a"), 5)
    assert rows.tolist() == [3, 0, 1, MISSING, 4]


@pytest.mark.parametrize(
    ("out_rows", "rows", "expected"),
    [
        (3, 3, [0, 1, 2]),  # no padding
        (5, 3, [0, 1, 2, MISSING, MISSING]),  # padding that the model lacks
        (3, 5, [0, 1, 2]),  # padding that the output lacks
        (5, 4, [0, 1, 2, 3, MISSING]),
        (2, 3, [0, 1]),  # a table shorter than its tokenizer
        (3, 2, [0, 1, MISSING]),
        (3, 0, [MISSING, MISSING, MISSING]),
    ],
)
def test_rows_beyond_the_tokenizer(out_rows, rows, expected):
    tokens = vocabulary("a", "b", "c")
    assert match_rows(tokens, out_rows, tokens, rows).tolist() == expected


def test_no_token_in_common():
    assert match_rows(vocabulary("a"), 1, vocabulary("b"), 1).tolist() == [MISSING]
    assert match_rows(Vocabulary({}), 0, vocabulary("b"), 1).tolist() == []


class InMemory:
    """A source that counts its reads."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.label = "M"
        self.values = dict(tensors)
        self.tensors = info_of(tensors)
        self.reads = 0

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        self.reads += 1
        values = self.values[name].reshape(-1)[start:stop]
        out = buffer[: values.nbytes].view(values.dtype)
        return out.copy_(values)


@given(st.lists(st.integers(-1, 5), min_size=1, max_size=9), st.data())
def test_aligned_rows_against_indexing(row_of, data):
    width = 3
    inner = InMemory({"table": torch.arange(6.0 * width).view(6, width)})
    fallback = InMemory({"out": -1 - torch.arange(len(row_of) * float(width)).view(-1, width)})
    source = AlignedRows({"out": TensorRef(inner, "table")}, fallback, torch.tensor(row_of))
    expected = torch.stack(
        [inner.values["table"][row] if row != MISSING else fallback.values["out"][i] for i, row in enumerate(row_of)]
    )
    assert source.tensors == {"out": TensorInfo(F32, (len(row_of), width))}
    start = data.draw(st.integers(0, expected.numel() - 1))
    stop = data.draw(st.integers(start + 1, expected.numel()))
    assert torch.equal(source.read("out", start, stop, buffer_for(stop - start)), expected.reshape(-1)[start:stop])


def test_rows_that_lie_together_are_read_together():
    inner, fallback = InMemory({"t": torch.randn(100, 4)}), InMemory({"t": torch.randn(100, 4)})
    rows = torch.cat([torch.arange(50, 90), torch.full((20,), MISSING), torch.arange(40)])
    AlignedRows({"t": TensorRef(inner, "t")}, fallback, rows).read("t", 0, 400, buffer_for(400))
    assert (inner.reads, fallback.reads) == (2, 1)


def test_aligned_rows_round_nothing():
    """A float32 base row among bfloat16 rows keeps its bits."""
    inner, fallback = InMemory({"t": torch.ones(1, 1, dtype=BF16)}), InMemory({"t": torch.full((2, 1), 1.0000001)})
    source = AlignedRows({"t": TensorRef(inner, "t")}, fallback, torch.tensor([0, MISSING]))
    assert source.tensors["t"].dtype == F32
    assert source.read("t", 0, 2, buffer_for(2)).tolist() == [1.0, float(torch.tensor(1.0000001))]


def write_tokenizer(folder: Path, model: Any, added: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": model}, "added_tokens": added}))
    return folder


def test_tokens_of_a_tokenizer(tmp_path):
    assert read_vocabulary(tmp_path, "M") is None
    assert vocabulary_digest(tmp_path) is None
    added = [{"id": 1, "content": "b"}, {"id": 2, "content": "[PAD]"}]
    mapped = read_vocabulary(write_tokenizer(tmp_path, {"a": 0, "b": 1}, added), "M")
    listed = read_vocabulary(write_tokenizer(tmp_path, [["a", -1.5], ["b", -2]], added), "M")
    assert mapped == listed == Vocabulary({"a": 0, "b": 1, "[PAD]": 2})
    assert mapped.size == 3
    assert Vocabulary({}).size == 0


@pytest.mark.command
def test_tokens_of_another_kind_of_tokenizer(tmp_path):
    """No tokenizer.json: transformers is asked."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    found = read_vocabulary(tmp_path, "M")
    assert found is not None
    assert found.ids == {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(InputError, match=r"^M: the tokenizer cannot be read: .*\. Download it again\.$"):
        read_vocabulary(tmp_path, "M")


def test_digest_of_a_vocabulary(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        copy_tokenizer(tmp_path / name)
    same = vocabulary_digest(tmp_path / "one")
    (tmp_path / "two" / "tokenizer_config.json").write_text("{}")  # says nothing about tokens
    (tmp_path / "two" / "vocab.json").write_text("{}")  # not asked where there is a tokenizer.json
    assert vocabulary_digest(tmp_path / "two") == same
    (tmp_path / "two" / "tokenizer.json").write_text("{}")
    assert vocabulary_digest(tmp_path / "two") not in (None, same)


# --------------------------------------------------------------------------------------------------------- provenance


def model(folder: Path, name: str, licence: str | None = None, **location: Any) -> Model:
    write_checkpoint(folder, {"a": torch.ones(2), "b": torch.ones(1, dtype=BF16)}, shards=2)
    if licence:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    identifier, _, revision = name.partition("@")
    return Model(Location(ModelName(identifier, revision or None), folder, **location), open_checkpoint(folder, name))


def test_what_identifies_an_input(tmp_path):
    local = describe_input(model(tmp_path / "local", "./local"), "outputs")
    assert (local["model"], local["folder"]) == ("./local", str(tmp_path / "local"))
    assert list(local["files"]) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, entry in local["files"].items():
        status = (tmp_path / "local" / name).stat()
        assert entry.keys() == {"bytes", "tensors_sha256", "mtime_ns"}
        assert (entry["bytes"], entry["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
    sums = {"model-00001-of-00002.safetensors": "ab" * 32}
    hub = describe_input(model(tmp_path / "hub", "org/m@main", revision="f" * 40, hub_sha256=sums), "full")
    first, second = hub["files"].values()
    assert (hub["model"], hub["revision"]) == ("org/m@main", "f" * 40)
    assert first.keys() == {"bytes", "tensors_sha256", "sha256", "blake3_64MiB"}
    assert first["sha256"] == "ab" * 32
    assert second.keys() == {"bytes", "tensors_sha256", "mtime_ns", "blake3_64MiB"}
    assert first["tensors_sha256"] != second["tensors_sha256"]
    assert first["tensors_sha256"] == local["files"]["model-00001-of-00002.safetensors"]["tensors_sha256"]


def test_card_of_odd_names(tmp_path):
    names = ["org/base@v1", 'a "b": c', "ü/λ", "-", "true", "org/base@v2"]
    models = [model(tmp_path / str(i), name, "mit") for i, name in enumerate(names)]
    card = model_card(title="T", models=models, text="Text.\n", command=["python", "x y"])
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == ["org/base", 'a "b": c', "ü/λ", "-", "true"]
    assert front["license"] == "mit"
    assert "\n# T\n\nText.\n\nMade by\n\n```sh\npython 'x y'\n```\n" in card
    assert "```" not in model_card(title="T", models=models, text="", command=None)


def test_common_licence(tmp_path):
    licences: list[tuple[list[str | None], str | None]] = [
        (["mit", "mit"], "mit"),
        (["mit", None], None),
        (["mit", "gpl"], None),
    ]
    for index, (given_licences, expected) in enumerate(licences):
        models = [model(tmp_path / f"{index}{i}", "m", licence) for i, licence in enumerate(given_licences)]
        assert common_licence(models) == expected


def test_recipe_file(tmp_path):
    with Folder.open(tmp_path) as folder:
        write_recipe(folder, {"merge_method": "ties", "base_model": "ü"})
        text = (tmp_path / "merge_recipe.json").read_text("utf-8")
        assert text == '{\n  "schema": 1,\n  "merge_method": "ties",\n  "base_model": "ü",\n  "side_files": {}\n}\n'
    assert versions()["toolkit"] == VERSION


# ------------------------------------------------------------------------------------------------------------- errors


def test_several_problems_are_one_error():
    both = Refusals(["a.", ArgumentError("b.")])
    assert (str(both), both.exit_code) == ("2 problems:\n- a.\n- b.", 1)
    assert (str(Refusals([ArgumentError("b.")])), Refusals([ArgumentError("b.")]).exit_code) == ("b.", 2)


def test_unknown_names():
    assert (
        unknown("fruit", "Aple", ["pear", "apple"]) == "unknown fruit 'Aple'. Did you mean 'apple'? Known: apple, pear."
    )
    assert unknown("fruit", "xyz", ["pear"]) == "unknown fruit 'xyz'. Known: pear."
    assert (
        unknown("flag", "--lamda", ["--lambda"]) == "unknown flag '--lamda'. Did you mean '--lambda'? Known: --lambda."
    )
    assert (
        unknown("flag", "--protect", ["--texts"]) == "unknown flag '--protect'. Known: --texts."
    )  # dashes are not near


@pytest.mark.parametrize(
    ("text", "line"), [("a.\nb", "a"), ("", "ValueError"), ("\n \n a \n", "a"), ("x" * 999, "x" * 300)]
)
def test_first_line_of_an_error(text, line):
    assert first_line(ValueError(text)) == line


# ------------------------------------------------------------------------------------------------------- tensors' names


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.3.mlp.experts.7.weight", ("model.layers.", 3, ".mlp.experts.7.weight")),
        ("0.weight", ("", 0, ".weight")),
        ("lm_head.weight", None),
        ("model.layers.3", None),
        ("model.layers.\u0663.x.weight", None),
        ("9" * 5000 + ".weight", None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_layers_number_is_of_ascii_digits(name, parts):
    assert split_name(name) == parts
