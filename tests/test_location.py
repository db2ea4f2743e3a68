"""From a model's name to a folder: names, local folders, and the hub as tests/fake_hub.py plays it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints.errors import ArgumentError, InputError, printable
from checkpoints.hub_headers import RemoteHeader
from checkpoints.location import Location, ModelName, locate, parse_name, remote_headers
from checkpoints.safetensors_format import read_header
from tests.fake_hub import FakeHub

ROOT = Path(__file__).parent.parent
SIDE_FILES = {"config.json", "tokenizer.json", "tokenizer_config.json", "README.md", "LICENSE.txt", "merges.txt"}
JUNK = ("tf_model.h5", "flax_model.msgpack", "model.gguf", "consolidated.safetensors", "consolidated.00.pth")
JUNK_FOLDERS = ("onnx/model.onnx", "original/params.json", "original/tokenizer.model", "checkpoint-5/config.json")
MAX_DRY_RUN_BYTES = 130_000  # one range, the side files and the listings


def write_files(folder: Path, *names: str) -> None:
    """Small files, each with its own content."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"file": name}))


def write_shard(path: Path, *names: str, rows: int = 256) -> None:
    """A safetensors file of `[rows, 512]` float32 tensors, 512 KB each by default."""
    save_file({name: torch.full((rows, 512), len(name), dtype=torch.float32) for name in names}, path)


def write_model(folder: Path, *, shards: int = 1) -> Path:
    """A model's folder with its side files."""
    write_files(folder, *SIDE_FILES)
    if shards == 1:
        write_shard(folder / "model.safetensors", "a", "bb")
        return folder
    files = [f"model-{shard + 1:05}-of-{shards:05}.safetensors" for shard in range(shards)]
    for shard, file in enumerate(files):
        write_shard(folder / file, f"layer.{shard}")
    weight_map = {f"layer.{shard}": file for shard, file in enumerate(files)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def refusal(call: Callable[[], Any], kind: type[InputError] = InputError) -> str:
    """The message that a call refuses with: of exactly this kind, one line, ending with a sentence."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    assert message.endswith(".")
    return message


def find(text: str, **options: Any) -> Location:
    """What a command does with a name."""
    return locate(parse_name(text), quiet=True, **options)


def headers(text: str) -> dict[str, RemoteHeader]:
    """What a dry run does with the name of a hub model."""
    return remote_headers(parse_name(text))


def in_folder(location: Location) -> set[str]:
    """The files of a location."""
    return {path.relative_to(location.folder).as_posix() for path in location.folder.rglob("*") if path.is_file()}


def fetched(hub: FakeHub) -> set[str]:
    """The repo files of which any content was asked."""
    return {path.split("/", 5)[-1] for method, path in hub.requests if method == "GET" and "/resolve/" in path}


Serve = Callable[..., FakeHub]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Serve]:
    """`serve({"org/model": folder}, token=None, gated=..., ...)`: a running hub, the only one that this process knows."""
    hubs: list[FakeHub] = []

    def start(models: dict[str, Path], *, token: str | None = None, **options: Any) -> FakeHub:
        hub = FakeHub(models, **options)
        hubs.append(hub)
        hub.__enter__()
        hub.attach(monkeypatch, tmp_path / "cache", token=token)
        return hub

    yield start
    for hub in hubs:
        hub.close()


# Names


@pytest.mark.parametrize(
    ("text", "path_or_id", "revision"),
    [
        ("org/model", "org/model", None),
        ("gpt2", "gpt2", None),
        ("org/model@v1.0", "org/model", "v1.0"),
        ("org/model@refs/pr/3", "org/model", "refs/pr/3"),
        ("org/model@fix@2", "org/model", "fix@2"),
        ("org/model@45dc936eb1a1a179ad7409bcb4ef2c79368f8e76", "org/model", "45dc936eb1a1a179ad7409bcb4ef2c79368f8e76"),
        ("./not-there@v1", "./not-there@v1", None),
        ("~/not there/modèle", "~/not there/modèle", None),
        ("a/b/c@main", "a/b/c", "main"),
    ],
)
def test_a_name_is_split_at_its_revision_and_printed_as_typed(text: str, path_or_id: str, revision: str | None) -> None:
    assert parse_name(text) == ModelName(path_or_id, revision)
    assert str(parse_name(text)) == text


@pytest.mark.parametrize("name", ["merged@2", "a:0.5", "with space", "模型", "org@x:1/model@main", "@", "x@"])
def test_a_path_that_exists_wins(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in (name, f"./{name}", f"{tmp_path}/{name}/", f"~/{name}"):
        assert parse_name(text) == ModelName(text)
        assert find(text) == Location(ModelName(text), (tmp_path / name).resolve())


@pytest.mark.parametrize("text", ["", "  ", "org/model@", "org/model@ ", "@main", "@", "./x@", "a\0b"])
def test_a_malformed_name_is_an_argument_error(text: str) -> None:
    assert "Give the folder of a model, or a hub name" in refusal(partial(parse_name, text), ArgumentError)


@pytest.mark.parametrize("revision", ["a b", "../../x", "/x", "x/", "x:y", "x^", "a//b", "x.", "a\tb", "a@{1}"])
def test_a_revision_that_git_cannot_have_is_an_argument_error(revision: str) -> None:
    message = refusal(partial(parse_name, f"org/model@{revision}"), ArgumentError)
    assert message.startswith(printable(f"org/model@{revision}: '{revision}' is no revision."))


def test_a_local_folder_has_no_revisions(tmp_path: Path) -> None:
    message = refusal(partial(parse_name, f"{tmp_path}@main"), ArgumentError)
    assert message == f"{tmp_path}@main: {tmp_path} is a local folder, which has no revisions. Leave '@main' out."


# Local folders


def test_a_link_to_a_folder_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    location = find(str(tmp_path / "link"))
    assert location.folder == (tmp_path / "real").resolve()
    assert (location.revision, location.hub_sha256, location.weights_here) == (None, {}, True)


def test_a_folder_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(partial(find, "./x")).startswith("./x: no such folder. Give the folder of a model, or a hub name")
    (tmp_path / "merged_dare").mkdir()
    assert "Did you mean 'merged_dare'?" in refusal(partial(find, "./merged_dar"))
    (tmp_path / "file").touch()
    assert "no such folder" in refusal(partial(find, "./file/model"))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    expected = f"{path}: expected a folder, got a file. Give the folder it lies in: {tmp_path}."
    assert refusal(partial(find, str(path))) == expected


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "broken").symlink_to("not-there")
    assert "its symbolic links lead in a circle" in refusal(partial(find, str(tmp_path / "a")))
    assert "is a link to not-there, which does not exist" in refusal(partial(find, str(tmp_path / "broken")))
    assert "cannot be opened: File name too long" in refusal(partial(find, f"./{'x' * 300}"))


def test_a_folder_that_may_not_be_read() -> None:
    with tempfile.TemporaryDirectory() as name:
        closed = Path(name) / "closed"
        (closed / "model").mkdir(parents=True)
        Path(name).chmod(0o755)
        closed.chmod(0)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)  # permissions do not bind root
        try:
            for path in (closed, closed / "model"):
                assert refusal(partial(find, str(path))).startswith(f"{path}: permission denied.")
        finally:
            if root:
                os.seteuid(0)
            closed.chmod(0o755)


@pytest.mark.parametrize("text", ["a/b/c", "modèle/x", "org/a b", "org--x", "model.git", "a:0.5", "-x", "org\\model"])
def test_a_name_that_is_neither_folder_nor_hub_name(text: str) -> None:
    for call in (find, headers):
        message = refusal(partial(call, text))
        assert message.startswith(f"{text}: no such folder, and no name that the hub can have.")


def test_the_address_of_a_model_gets_its_name_as_a_hint() -> None:
    for prefix in ("https://huggingface.co/", "hf.co/", "hf://", "http://www.huggingface.co/models/"):
        assert "Did you mean 'org/model.1'?" in refusal(partial(find, f"{prefix}org/model.1"))


# The hub: which files come


def test_only_what_a_merge_needs_is_downloaded(serve: Serve, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    write_files(
        folder, *JUNK, *JUNK_FOLDERS, "pytorch_model.bin", "additional_chat_templates/rag.jinja", "modeling_x.py"
    )
    hub = serve({"org/model": folder})
    location = find("org/model")
    assert in_folder(location) == SIDE_FILES | {"model.safetensors", "additional_chat_templates/rag.jinja"}
    assert (location.folder / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert location.revision == hub.repos["models", "org/model"].branches["main"] == location.folder.name
    assert location.weights_here
    assert not location.note

    assert in_folder(find("org/model", trust_remote_code=True)) == in_folder(location) == in_folder(location)
    assert "modeling_x.py" in in_folder(location)


def test_shards_are_those_that_the_index_names(serve: Serve, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", shards=3)
    write_files(folder, "model.fp32-00001-of-00001.safetensors", "pytorch_model.bin.index.json", "pytorch_model-1.bin")
    serve({"org/model": folder})
    shards = {f"model-{shard:05}-of-00003.safetensors" for shard in (1, 2, 3)}
    indices = {"model.safetensors.index.json", "pytorch_model.bin.index.json"}
    assert in_folder(find("org/model")) == SIDE_FILES | shards | indices


@pytest.mark.parametrize("files", [["pytorch_model.bin"], ["adapter_model.safetensors", "adapter_config.json"]])
def test_pickles_and_adapters_come_where_there_is_nothing_better(
    serve: Serve, tmp_path: Path, files: list[str]
) -> None:
    write_files(tmp_path / "model", "config.json", *files)
    serve({"org/model": tmp_path / "model"})
    assert in_folder(find("org/model")) == {"config.json", *files}


def test_without_weights_only_side_files_come_and_the_index(serve: Serve, tmp_path: Path) -> None:
    hub = serve({"org/model": write_model(tmp_path / "model", shards=2)})
    location = find("org/model", weights=False)
    assert in_folder(location) == SIDE_FILES | {"model.safetensors.index.json"}
    assert not location.weights_here
    assert hub.bytes_sent < MAX_DRY_RUN_BYTES
    find("org/model")
    assert find("org/model", weights=False).weights_here


def test_a_second_call_downloads_nothing(serve: Serve, tmp_path: Path) -> None:
    hub = serve({"org/model": write_model(tmp_path / "model")})
    first = find("org/model")
    hub.requests.clear()
    assert find("org/model") == first
    assert [path for _, path in hub.requests if "/resolve/" in path] == []


def test_large_files_come_with_the_sha256_of_the_hub(serve: Serve, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", shards=2)
    write_files(folder, "tokenizer.model")
    hub = serve({"org/model": folder})
    commit = hub.repos["models", "org/model"].commits[find("org/model", weights=False).revision or ""]
    expected = {name: blob.sha256 for name, blob in commit.items() if blob.large}
    assert find("org/model", weights=False).hub_sha256 == {"tokenizer.model": expected["tokenizer.model"]}
    assert find("org/model").hub_sha256 == expected
    assert len(expected) == 3
    assert find("org/model", offline=True).hub_sha256 == expected


# The hub: revisions


def test_revisions_are_pinned(serve: Serve, tmp_path: Path) -> None:
    old, new = write_model(tmp_path / "old"), write_model(tmp_path / "new")
    (new / "config.json").write_text('{"new": true}')
    hub = serve({"org/model": old})
    commit = hub.repos["models", "org/model"].branches["main"]
    newer = hub.publish("org/model", new)
    hub.repos["models", "org/model"].branches |= {"v1": commit, "refs/pr/1": commit}
    assert find("org/model").revision == newer != commit
    for revision in ("v1", "refs/pr/1", commit, commit[:8]):
        location = find(f"org/model@{revision}")
        assert location.revision == commit
        assert (location.folder / "config.json").read_bytes() == (old / "config.json").read_bytes()
    hub.close()
    for revision in ("main", "v1", "refs/pr/1", commit):
        assert find(f"org/model@{revision}").revision == (newer if revision == "main" else commit)


def test_a_repo_that_changes_while_it_is_read(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from checkpoints import hub as hub_module

    hub = serve({"org/model": write_model(tmp_path / "old")})
    listing = hub_module.list_files("org/model", None)
    write_files(tmp_path / "new", "config.json")
    hub.publish("org/model", tmp_path / "new")
    monkeypatch.setattr(hub_module, "list_files", lambda *_: listing)
    assert refusal(partial(find, "org/model")) == (
        "org/model: changed on the hub while it was read. Run the command again."
    )


# The hub: without network


def test_a_cached_model_works_without_a_hub(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub = serve({"org/model": write_model(tmp_path / "model", shards=2)})
    online = find("org/model")
    hub.requests.clear()
    answers = [find("org/model", offline=True)]
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        answers.append(find("org/model", weights=False))
    assert hub.requests == []
    hub.status = 503
    answers.append(find("org/model"))
    hub.close()
    answers.append(find("org/model"))
    for location, reason in zip(
        answers, ("offline work", "HF_HUB_OFFLINE=1", "status 503", "ConnectError"), strict=True
    ):
        assert (location.folder, location.revision) == (online.folder, online.revision)
        assert (location.hub_sha256, location.weights_here) == (online.hub_sha256, True)
        assert reason in location.note
        assert f"commit {online.revision} from the cache is used" in location.note


def test_an_incomplete_copy_in_the_cache_is_refused(serve: Serve, tmp_path: Path) -> None:
    hub = serve({"org/model": write_model(tmp_path / "model", shards=2)})
    folder = find("org/model", weights=False).folder
    assert find("org/model", weights=False, offline=True).folder == folder
    message = refusal(partial(find, "org/model", offline=True))
    assert "lacks model-00001-of-00002.safetensors, model-00002-of-00002.safetensors." in message
    find("org/model")
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").unlink()  # programs that only load a model may leave this one out
    hub.close()
    for weights in (True, False):
        message = refusal(partial(find, "org/model", weights=weights))
        assert "the copy in the cache lacks tokenizer.json. Download it where there is a network" in message


def test_a_cache_filled_file_by_file(serve: Serve, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    serve({"org/model": write_model(tmp_path / "model")})
    hf_hub_download("org/model", "tokenizer.json")
    assert "lacks config.json." in refusal(partial(find, "org/model", weights=False, offline=True))
    hf_hub_download("org/model", "config.json")
    assert "has no usable weights." in refusal(partial(find, "org/model", offline=True))
    hf_hub_download("org/model", "model.safetensors")
    location = find("org/model", offline=True)
    assert in_folder(location) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert list(location.hub_sha256) == ["model.safetensors"]


def test_a_model_that_is_nowhere(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub = serve({})
    hub.close()
    message = refusal(partial(find, "org/model"))
    assert message.startswith("org/model: no such folder, the hub cannot be reached (ConnectError: ")
    assert "the cache holds no copy. Download it where there is a network (`hf download org/model`)" in message
    assert "the hub cannot be reached" in refusal(partial(headers, "org/model"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for call in (find, headers):
        assert "HF_HUB_OFFLINE=1 forbids to ask the hub" in refusal(partial(call, "org/model"))


def test_a_server_that_is_no_hub(serve: Serve) -> None:
    hub = serve({})
    hub.page = b"<html>Please log in</html>"
    message = refusal(partial(find, "org/model"))
    assert f"{hub.endpoint} does not answer as a hub does (a login page in between?)" in message


# The hub: refusals


def test_a_repo_or_revision_that_is_not_there(serve: Serve, tmp_path: Path) -> None:
    hub = serve({"org/model": write_model(tmp_path / "model")})
    for call in (find, headers):
        message = refusal(partial(call, "org/modle"))
        assert message.startswith("org/modle: no such folder, and no such model on the hub, or a private one. Check")
        message = refusal(partial(call, "org/model@v9"))
        assert message.startswith("org/model@v9: the hub has no revision 'v9' of org/model. Give a branch, a tag or a")
        assert f"{hub.endpoint}/org/model/commits" in message


def test_gated_and_private_repos_ask_to_log_in(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model")
    hub = serve({"org/gated": folder, "org/private": folder}, gated=["org/gated"], private=["org/private"])
    for call in (find, headers):
        message = refusal(partial(call, "org/gated"))
        assert "its authors want their terms accepted first. Accept them at " in message
        assert f"{hub.endpoint}/org/gated, log in with `hf auth login`" in message
        message = refusal(partial(call, "org/private"))
        assert "or a private one. Check the spelling; for a private model log in with `hf auth login`." in message
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert find("org/gated").weights_here
    assert list(headers("org/private")) == ["model.safetensors"]


def test_other_refusals_of_the_hub(serve: Serve, tmp_path: Path) -> None:
    hub = serve({"org/model": write_model(tmp_path / "model")})
    hub.status = 403
    expected = "org/model: the hub refuses with status 403: the hub is told to fail. If you have a token, check its"
    assert refusal(partial(find, "org/model")).startswith(expected)
    hub.status = 429
    assert "no such folder, the hub answers with status 429, and the cache" in refusal(partial(find, "org/model"))


def test_a_repo_without_usable_weights(serve: Serve, tmp_path: Path) -> None:
    write_files(tmp_path / "model", "config.json", "model.gguf")
    write_files(tmp_path / "torn", "config.json", "model.safetensors.index.json")
    write_model(tmp_path / "short", shards=2)
    (tmp_path / "short" / "model-00002-of-00002.safetensors").unlink()
    write_files(tmp_path / "junk", "model.gguf")
    serve({f"org/{name}": tmp_path / name for name in ("model", "torn", "short", "junk")})
    for call in (find, headers):
        messages = [refusal(partial(call, f"org/{name}")) for name in ("model", "torn", "short")]
        assert (
            "expected model.safetensors, pytorch_model.bin or an index of shards, got config.json, model.g"
            in messages[0]
        )
        assert "model.safetensors.index.json: expected a JSON object with a weight_map" in messages[1]
        assert (
            "names files that are not there: model-00002-of-00002.safetensors. Tell the model's author." in messages[2]
        )
    assert not find("org/model", weights=False).weights_here
    assert "expected config.json and a tokenizer, got model.gguf." in refusal(partial(find, "org/junk"))


def test_a_disk_that_is_too_small(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = serve({"org/model": write_model(tmp_path / "model")})
    with monkeypatch.context() as patch:
        patch.setattr("checkpoints.hub.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1_000_000}))
        message = refusal(partial(find, "org/model"))
        assert message.startswith("org/model: expected 0.0 GB of free space for the download in ")
        assert "set HF_HOME to a folder on a larger disk." in message
    assert "model.safetensors" not in fetched(hub)
    find("org/model")
    (tmp_path / "model" / "config.json").write_text('{"new": true}')
    hub.publish("org/model", tmp_path / "model")
    monkeypatch.setattr("checkpoints.hub.shutil.disk_usage", lambda _: type("Usage", (), {"free": 100_000}))
    assert find("org/model").weights_here  # the weights are those of the commit before


def test_a_cache_that_cannot_be_written(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    serve({"org/model": write_model(tmp_path / "model")})
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    message = refusal(partial(find, "org/model"))
    assert message.startswith(f"org/model: cannot be stored in {tmp_path}/file: Not a directory.")


# The hub: headers only


def test_headers_cost_kilobytes(serve: Serve, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    write_shard(folder / "model.safetensors", "a", "bb", rows=8192)  # 32 MB
    hub = serve({"org/model": folder})
    (found,) = headers("org/model").items()
    name, (header_bytes, header, file_bytes, tensors) = found
    raw = (folder / name).read_bytes()
    assert file_bytes == len(raw)
    assert header_bytes == int.from_bytes(raw[:8], "little")
    assert header == json.loads(raw[8 : 8 + header_bytes])
    assert tensors == read_header(folder / name, "org/model")
    assert fetched(hub) == {"model.safetensors"}
    assert hub.bytes_sent < MAX_DRY_RUN_BYTES


def test_headers_of_shards_at_a_pinned_commit(serve: Serve, tmp_path: Path) -> None:
    hub = serve({"org/model": write_model(tmp_path / "model", shards=5)})
    location = find("org/model", weights=False)
    write_files(tmp_path / "new", "config.json")
    hub.publish("org/model", tmp_path / "new")
    found = remote_headers(ModelName("org/model", location.revision))
    assert list(found) == [f"model-{shard:05}-of-00005.safetensors" for shard in range(1, 6)]
    assert [list(header.tensors) for header in found.values()] == [[f"layer.{shard}"] for shard in range(5)]
    assert hub.bytes_sent < 5 * MAX_DRY_RUN_BYTES


def test_a_header_longer_than_the_first_request(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_files(folder, "config.json")
    save_file({f"tensor.{'x' * 50}.{index}": torch.zeros(64) for index in range(2000)}, folder / "model.safetensors")
    hub = serve({"org/model": folder})
    local = read_header(folder / "model.safetensors", "org/model")
    (first,) = headers("org/model").values()
    assert first.tensors == local
    assert first.header_bytes > 2 * 100_000
    assert hub.bytes_sent < first.header_bytes + 2000
    hub.ignore_ranges = True
    assert headers("org/model") == {"model.safetensors": first}


def test_pickles_have_no_headers(serve: Serve, tmp_path: Path) -> None:
    write_files(tmp_path / "model", "config.json", "pytorch_model.bin")
    hub = serve({"org/model": tmp_path / "model"})
    assert headers("org/model") == {}
    assert fetched(hub) == set()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "got a file of 0 bytes whose header claims 0"),
        (b"short", "got a file of 5 bytes"),
        (b"\xff" * 64, "whose header claims 18446744073709551615"),
        ((200_000_000).to_bytes(8, "little") + b"{}", "whose header claims 200000000"),
        ((2).to_bytes(8, "little") + b"no", "expected a JSON header"),
        ((2).to_bytes(8, "little") + b"{}more", "expected 10 bytes, got 14"),
    ],
)
def test_a_damaged_header(serve: Serve, tmp_path: Path, content: bytes, expected: str) -> None:
    write_files(tmp_path / "model", "config.json")
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    serve({"org/model": tmp_path / "model"})
    message = refusal(partial(headers, "org/model"))
    assert message.startswith("org/model: model.safetensors: ")
    assert expected in message


# The process around it


def test_progress_bars_only_on_request(serve: Serve, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub.utils import enable_progress_bars

    enable_progress_bars()  # a test before this one may have turned them off for the whole process
    hub = serve({"org/a": write_model(tmp_path / "model"), "org/b": tmp_path / "model"})
    find("org/a")
    headers("org/a")
    assert capfd.readouterr() == ("", "")
    locate(parse_name("org/b"))
    out, err = capfd.readouterr()
    assert out == ""
    assert "Fetching 1 files" in err
    assert hub.requests


def run_python(code: str, environment: dict[str, str]) -> str:
    """Run Python code in a process of its own; returns what it prints, without surrounding blanks."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_import_is_light() -> None:
    code = "import sys, checkpoints.location as _; print({'torch', 'huggingface_hub'} & set(sys.modules))"
    assert run_python(code, dict(os.environ)) == "set()"


def test_a_process_with_the_hubs_environment(tmp_path: Path) -> None:
    code = "from checkpoints.location import *; print(locate(parse_name('org/model'), quiet=True).folder)"
    with FakeHub({"org/model": write_model(tmp_path / "model")}, private=["org/model"]) as hub:
        folder = run_python(code, hub.environment(tmp_path / "cache", token=hub.token))
        asked = len(hub.requests)
        assert run_python(code, hub.environment(tmp_path / "cache") | {"HF_HUB_OFFLINE": "1"}) == folder
    assert folder.startswith(str(tmp_path / "cache" / "hub"))
    assert asked == len(hub.requests) > 0


def test_the_fake_hub_serves_datasets(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(f'{{"text": "row {row}"}}\n' for row in range(9)))
    with FakeHub(datasets={"org/data": tmp_path / "data"}) as hub:
        commit = hub.repos["datasets", "org/data"].branches["main"]
        # With a commit, datasets does not ask its server of Parquet copies.
        code = f"import datasets; print(datasets.load_dataset('org/data', split='train', revision='{commit}')[3])"
        assert run_python(code, hub.environment(tmp_path / "cache")) == "{'text': 'row 3'}"


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub calls httpx2 so
def test_the_fake_hub_takes_uploads(serve: Serve, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    hub = serve({}, token="hf_fake")
    folder = write_model(tmp_path / "model", shards=2)
    HfApi().create_repo("tester/merge")
    HfApi().create_repo("tester/merge", exist_ok=True)
    HfApi().upload_folder(repo_id="tester/merge", folder_path=folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.files("tester/merge") == files | {".gitattributes": hub.files("tester/merge")[".gitattributes"]}
    assert ("PUT", f"/large/{find('tester/merge').hub_sha256['model-00001-of-00002.safetensors']}") in hub.requests
    HfApi().delete_file("README.md", "tester/merge")
    assert hub.files("tester/merge").keys() == (files.keys() | {".gitattributes"}) - {"README.md"}
