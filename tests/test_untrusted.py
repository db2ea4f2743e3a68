"""Checkpoints from strangers: what the fuzzer found, and what it cannot make: links, pipes, devices, code, odd paths."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save
from transformers import AutoTokenizer

import merge
from checkpoints.errors import InputError
from checkpoints.pickle_format import load_pickle
from checkpoints.safetensors_format import LENGTH_BYTES, parse_header
from checkpoints.sidecars import licence_of, list_side_files, read_config
from checkpoints.vocabulary import read_vocabulary
from checkpoints.writer import CheckpointWriter, natural_key
from tests.fuzz import models
from tests.fuzz.models import BIN, EMBEDDING, HEAD, INDEX, WEIGHTS, as_json, as_pickle
from tests.scene import Scene, names

NORM = "model.norm.weight"


def merging_scene(folder: Path) -> Scene:
    inputs = {"--base_model": folder / "base", "--models_to_merge": names([folder / "one", folder / "two"])}
    return Scene(folder, merge, {"--method": "linear", **inputs})


def lay(scene: Scene, layout: str) -> Scene:
    """Put the models of a layout there."""
    for name, files in models.family(layout).items():
        shutil.rmtree(scene.folder / name, ignore_errors=True)
        (scene.folder / name).mkdir(parents=True)
        for file, content in files.items():
            (scene.folder / name / file).write_bytes(content)
    return scene


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return lay(merging_scene(tmp_path / "models"), "plain")


def edit_json(path: Path, **entries: Any) -> None:
    path.write_bytes(as_json({**json.loads(path.read_bytes()), **entries}))


# ------------------------------------------------------------------------------------------- headers, names, shapes

ENTRY = '"dtype":"F32","shape":[1],"data_offsets":[0,4]'
ODD_HEADERS: dict[str, tuple[bytes, str]] = {
    "a field twice": (b'{"a":{"dtype":"F32",' + ENTRY.encode() + b"}}", "the name 'dtype' twice"),
    "metadata no JSON": (b'{"__metadata__":NaN,"a":{' + ENTRY.encode() + b"}}", "NaN, which is no JSON"),
    "metadata a number": (b'{"__metadata__":{"a":1},"a":{' + ENTRY.encode() + b"}}", "no text by name"),
    "metadata a text": (b'{"__metadata__":"x","a":{' + ENTRY.encode() + b"}}", "no text by name"),
    "metadata nothing": (b'{"__metadata__":0,"a":{' + ENTRY.encode() + b"}}", "no text by name"),
    "half a character": (b'{"\\ud800":{' + ENTRY.encode() + b"}}", "surrogates not allowed"),
    "byte order mark": (b"\xef\xbb\xbf{" + b'"a":{' + ENTRY.encode() + b"}}", "BOM"),
    "another encoding": (f'{{"a":{{{ENTRY}}}}}'.encode("utf-16-le"), "expected a JSON header"),
    "minus nought": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', "whole numbers"),
    "overflow": (b'{"a":{"dtype":"F32","shape":[4611686018427387903,4,0],"data_offsets":[0,0]}}', "whole numbers"),
    "a number without end": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', "JSON header"),
    "out of the file": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "expected 70 bytes, got 66"),
    "before the file": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}', "whole numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD_HEADERS)
def test_headers_that_the_formats_own_library_refuses(case):
    header, says = ODD_HEADERS[case]
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(content)
    with pytest.raises(InputError) as refused:
        parse_header(header, len(content), "M: x")
    assert says in str(refused.value)


def test_headers_that_could_be_read_in_two_ways():
    """One name twice, of which the format's library takes the last one; and more dimensions than anything has."""
    twice = f'{{"a":{{{ENTRY}}},"a":{{{ENTRY.replace("F32", "I32")}}}}}'.encode()
    with pytest.raises(InputError, match="the name 'a' twice"):
        parse_header(twice, LENGTH_BYTES + len(twice) + 4, "M: x")
    shape = json.dumps([1] * 65)
    deep = f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,4]}}}}'.encode()
    with pytest.raises(InputError, match="The header is damaged"):
        parse_header(deep, LENGTH_BYTES + len(deep) + 4, "M: x")


def test_names_with_any_digits_have_a_place():
    in_order = ["", "9" * 900, "a.2", "a.10", "a.²", "²"]
    assert sorted(sorted(in_order), key=natural_key) == in_order


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], file: str = WEIGHTS) -> None:
    content = load_file(folder / file)
    change(content)
    (folder / file).write_bytes(save({name: tensor.contiguous() for name, tensor in content.items()}))


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\nb", "\u202e", "9" * 5000, "a\0b"])
def test_names_that_are_none_are_refused_and_obeyed_by_no_terminal(scene, name):
    for folder in (scene.base, scene.one, scene.two):
        rewrite(folder, lambda t: t.update({name: torch.ones(2)}))
    message = scene.run(code=None).err
    assert "expected names of tensors" in message
    assert all(line.isprintable() for line in message.splitlines())


def test_names_that_transformers_fails_on(scene):
    """It takes a raised two for a digit, and makes a number of it."""
    rewrite(scene.one, lambda t: t.update({"model.²": torch.ones(2)}))
    scene.refuse(code=1, says=("one: its tensors are not those of a LlamaForCausalLM", "Use matching files"))


def test_a_table_of_another_shape_is_not_passed_over(scene):
    """With other tokens, so that rows are matched."""
    lay(scene, "vocabularies")
    for shape in ((22,), (), (22, 2, 2), (22, 3), (20, 4)):
        rewrite(scene.one, lambda t, shape=shape: t.update({HEAD: torch.ones(shape)}))
        scene.refuse(code=1, says=(HEAD, "[22, 4]", str(list(shape))))


def test_an_embedding_without_rows(scene):
    lay(scene, "vocabularies")
    rewrite(scene.two, lambda t: t.update({EMBEDDING: torch.ones(())}))
    code, _, message = scene.run(code=None)
    assert (code, f"{EMBEDDING}: expected floating-point numbers of shape [18, 4]" in message) == (1, True)
    lay(scene, "vocabularies")
    rewrite(scene.base, lambda t: t.update({EMBEDDING: torch.ones(())}))
    scene.run(code=1)


def test_other_tokens_and_no_table_to_match_them_in(scene):
    """A config that speaks of another model than the weights are."""
    lay(scene, "vocabularies")
    for folder in (scene.base, scene.one, scene.two):
        content = load_file(scene.base / WEIGHTS)
        (folder / WEIGHTS).write_bytes(save(content))
    edit_json(scene.base / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    code, _, message = scene.run(code=None)
    assert (code, message.count("base: expected transformer.wte.weight, in which to match the other tokens of")) == (
        1,
        1,
    )


@pytest.mark.parametrize("ids", [{"a": 1}, [{}, 2], [[1]], "</s>", True, 2.0, [None]])
def test_ends_of_text_that_are_no_ids(scene, ids):
    """Where the models' tokens differ, so that their ends are united."""
    lay(scene, "vocabularies")
    edit_json(scene.one / "generation_config.json", eos_token_id=ids)
    scene.run()


@pytest.mark.parametrize("inner", [[1], "x", 3, {}])
def test_a_text_config_that_is_none(scene, inner):
    """Where the number of rows is written into it, as it stands nowhere else."""
    lay(scene, "vocabularies")
    config = json.loads((scene.base / "config.json").read_bytes())
    del config["vocab_size"]
    (scene.base / "config.json").write_bytes(as_json({**config, "text_config": inner}))
    code, _, message = scene.run(code=None)
    assert (code in (0, 1), "Traceback" in message) == (True, False)


def test_old_tokenizers_keep_their_special_tokens_when_more_are_added(scene):
    """They stand in special_tokens_map.json, which transformers reads only where no added_tokens_decoder is."""
    lay(scene, "byte pairs")
    settings = json.loads((scene.base / "tokenizer_config.json").read_bytes())
    del settings["eos_token"]
    (scene.base / "tokenizer_config.json").write_bytes(as_json(settings))
    scene.run()
    before = AutoTokenizer.from_pretrained(scene.base)
    after = AutoTokenizer.from_pretrained(scene.out)
    assert (after.eos_token, after.bos_token, after.unk_token) == (before.eos_token, before.bos_token, before.unk_token)
    assert after.get_vocab() == {**before.get_vocab(), "z": len(before)}


def test_tokens_far_beyond_the_rows(scene):
    """Four billion rows for one token, which would fill the memory."""
    lay(scene, "vocabularies")
    for folder, index in ((scene.base, 4_000_000_000), (scene.one, 20)):
        content = json.loads((folder / "tokenizer.json").read_bytes())
        for word in ("more", "most"):
            content["model"]["vocab"].pop(word, None)
        content["model"]["vocab"]["far"] = index
        (folder / "tokenizer.json").write_bytes(as_json(content))
    assert "ids for 4,000,000,001" in scene.refuse(code=1, says=("expected at most",))


def test_an_index_may_not_name_what_no_folder_can_hold(scene):
    lay(scene, "sharded")
    index = json.loads((scene.one / INDEX).read_bytes())
    for name in ("9" * 300, "a\0b", "a\nb", "", "x/y"):
        index["weight_map"]["a"] = name
        (scene.one / INDEX).write_bytes(json.dumps(index).encode())
        scene.refuse(code=1, says=(INDEX, "expected plain names of files in its folder", "Do not trust"))


# ----------------------------------------------------------------------------------------------------------- pickles


def repack(path: Path, change: Callable[[str, bytes], tuple[str, bytes]], kind: int = zipfile.ZIP_STORED) -> None:
    """Write an archive anew."""
    with zipfile.ZipFile(path) as archive:
        content = [change(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in content:
            archive.writestr(name, data)


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    path = tmp_path / BIN
    path.write_bytes(as_pickle({"a": torch.arange(4.0), "b": torch.arange(4.0) + 10, "c": torch.zeros(0, 2)}))
    return path


def test_an_archive_written_by_another_program(pickled):
    """Its records lie elsewhere, and in another order."""
    content: list[tuple[str, bytes]] = []
    repack(pickled, lambda name, data: content.append((name, data)) or (name, data))
    with zipfile.ZipFile(pickled, "w") as archive:
        for name, data in sorted(content, reverse=True):
            archive.writestr(name, data)
    loaded = load_pickle(pickled, "M")
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {
        "a": [0, 1, 2, 3],
        "b": [10, 11, 12, 13],
        "c": [],
    }


SPOILT_ARCHIVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "compressed": (lambda p: repack(p, lambda n, d: (n, d), zipfile.ZIP_DEFLATED), "a compressed zip archive"),
    "a record too short": (lambda p: repack(p, lambda n, d: (n, d[:9] if n.endswith("/1") else d)), "a record of 9 bytes"),
    "a record too long": (lambda p: repack(p, lambda n, d: (n, d * 2 if n.endswith("/1") else d)), "a record of 32 bytes"),
    "a record under another name": (lambda p: repack(p, lambda n, d: (n.replace("data/1", "data/9"), d)), "data/1"),
    "no pickle": (lambda p: repack(p, lambda n, d: (n.replace(".pkl", ".txt"), d)), "without a data.pkl"),
    "another byte order": (lambda p: repack(p, lambda n, d: (n, b"big" if n.endswith("byteorder") else d)), "byte order"),
    "a file twice": (lambda p: repack(p, lambda n, d: ("archive/x" if n.endswith("version") else n, d)), "two files of one name"),
    "a header that is none": (
        lambda p: p.write_bytes(p.read_bytes().replace(b"PK\3\4", b"PK\3\5", 6)), "cannot be read as a torch checkpoint",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT_ARCHIVES)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_whose_records_are_not_what_the_pickle_says(pickled, case):
    spoil, says = SPOILT_ARCHIVES[case]
    spoil(pickled)
    with pytest.raises(InputError) as refused:
        load_pickle(pickled, "M: x")
    assert says in str(refused.value)


ODD_TENSORS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "of no numbers": (lambda: torch.ones(3, device="meta"), "strided, float32, meta"),
    "one number for many": (lambda: torch.ones(1).expand(2**40), "fewer, each of which stands for many"),
    "rows that overlap": (lambda: torch.ones(9).as_strided((6, 4), (1, 1)), "fewer, each of which stands for many"),
    "negated when it is read": (lambda: torch._neg_view(torch.ones(3)), "expected a dense tensor of numbers"),
}


@pytest.mark.parametrize("case", ODD_TENSORS)
@pytest.mark.parametrize("archive", [True, False])
def test_tensors_whose_numbers_are_not_all_there(tmp_path, case, archive):
    make, says = ODD_TENSORS[case]
    (tmp_path / BIN).write_bytes(as_pickle({"a": make()}, _use_new_zipfile_serialization=archive))
    with pytest.raises(InputError) as refused:
        load_pickle(tmp_path / BIN, "M: x")
    assert says in str(refused.value)


# ------------------------------------------------------------------------------------------- configs, tokenizers, code


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 10**5), ("num_hidden_layers", 10**9), ("num_hidden_layers", 10**18), ("vocab_size", 10**18)],
)
def test_a_config_that_asks_for_more_than_there_is(scene, key, value):
    edit_json(scene.base / "config.json", **{key: value})
    scene.refuse("--method=widen", code=1, says=("base: config.json", "Mend it"))


def test_a_config_in_another_encoding(scene):
    """transformers would not read it, so the merge would be of no use."""
    for encoding in ("utf-16", "utf-8-sig"):
        text = (scene.base / "config.json").read_text("utf-8-sig" if encoding == "utf-16" else "utf-16")
        (scene.base / "config.json").write_text(text, encoding)
        scene.refuse(code=1, says=("config.json: expected JSON",))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("names", [["../one/config.1.0.0.json"], ["/dev/zero"], "config.json", [3], {"a": 1}])
def test_configs_may_not_send_transformers_elsewhere(scene, file, names):
    key = "configuration_files" if file == "config.json" else "fast_tokenizer_files"
    edit_json(scene.one / file, **{key: ["tokenizer.4.0.json"]})
    assert read_config(scene.one, "M")
    edit_json(scene.one / file, **{key: names})
    scene.refuse(code=1, says=(file, "expected plain names of files in its folder", "Do not trust"))


def test_paths_in_a_tokenizer_config_are_not_followed(tmp_path, scene):
    """Real ones hold such paths, of their authors' machines, so they are no reason to refuse."""
    lay(scene, "byte pairs")
    (tmp_path / "elsewhere.json").write_bytes(as_json({"secret": 0, "<s>": 1, "</s>": 2}))
    before = read_vocabulary(scene.one, "M")
    keys = ("vocab_file", "tokenizer_file", "merges_file", "added_tokens_file", "special_tokens_map_file")
    edit_json(scene.one / "tokenizer_config.json", **dict.fromkeys(keys, str(tmp_path / "elsewhere.json")))
    assert read_vocabulary(scene.one, "M") == before


def test_added_tokens_whose_ids_are_not_those_they_get(scene):
    content = json.loads((scene.one / "tokenizer.json").read_bytes())
    content["added_tokens"].append({**content["added_tokens"][0], "content": "[PAD]", "id": 500})
    (scene.one / "tokenizer.json").write_bytes(as_json(content))
    scene.refuse(
        code=1, says=("the added token '[PAD]' has the id 500, and 20 where tokenizers are run", "Mend the ids")
    )
    content["added_tokens"][-1] = {**content["added_tokens"][0], "content": "a", "id": 7}
    (scene.one / "tokenizer.json").write_bytes(as_json(content))
    scene.refuse(code=1, says=("the added token 'a' has the id 7, and 3",))


@pytest.mark.parametrize("change", [{"content": None}, {"content": 0.0}, {"id": True}, {"id": None}, {"id": "1"}])
def test_added_tokens_that_are_none(scene, change):
    content = json.loads((scene.one / "tokenizer.json").read_bytes())
    content["added_tokens"][1].update(change)
    (scene.one / "tokenizer.json").write_bytes(as_json(content))
    scene.refuse(code=1, says=("tokenizer.json", "id"))


def test_a_table_of_characters_that_is_shorter_than_it_says(scene):
    """The tokenizers library would allocate as much, and end the process where that fails."""
    from sentencepiece import sentencepiece_model_pb2

    lay(scene, "pieces")
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((scene.one / "tokenizer.model").read_bytes())
    model.normalizer_spec.precompiled_charsmap = b"\xff\xff\xff\xff" + bytes(40)
    (scene.one / "tokenizer.model").write_bytes(model.SerializeToString())
    scene.refuse(code=1, says=("one: the tokenizer cannot be read", "shorter than it says"))


CODE = """
import pathlib
pathlib.Path(__file__).parent.joinpath("executed").touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): model_type = "own_kind"
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.mark.parametrize("model_type", ["llama", "own_kind"])
def test_code_beside_the_weights_is_not_run_unasked(scene, model_type):
    """Nor is it imported, from here or from the cache that transformers copies trusted code into."""
    lay(scene, "byte pairs")
    for folder in (scene.base, scene.one):
        (folder / "modeling_own.py").write_text(CODE)
        auto_map = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
        edit_json(folder / "config.json", model_type=model_type, auto_map=auto_map)
        tokenizer = {"AutoTokenizer": ["modeling_own.Tokenizer", "modeling_own.Tokenizer"]}
        edit_json(folder / "tokenizer_config.json", auto_map=tokenizer, tokenizer_class="Tokenizer")
    code, _, message = scene.run("--method=widen", code=None)
    assert not list(scene.folder.rglob("executed"))
    if model_type == "own_kind":
        assert (code, "Pass --trust_remote_code" in message) == (1, True)


def test_templates_run_in_the_sandbox_only(scene):
    """A merge copies a chat template. What renders it is transformers, which lets it touch nothing."""
    from jinja2.exceptions import TemplateError
    from transformers import AutoTokenizer

    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.mkdir('executed') }}"
    edit_json(scene.base / "tokenizer_config.json", chat_template=escape)
    scene.run()
    assert json.loads((scene.out / "tokenizer_config.json").read_bytes())["chat_template"] == escape
    tokenizer = AutoTokenizer.from_pretrained(scene.out)
    with pytest.raises(TemplateError, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert not Path("executed").exists()


def test_a_card_whose_front_never_ends(tmp_path):
    """A pattern that tried every way to split the lines would be at it for hours."""
    (tmp_path / "README.md").write_text("---\n" + "\n" * 500_000)
    assert licence_of(tmp_path) is None


# ---------------------------------------------------------------------------------- links, pipes, devices, descriptors


def test_links_out_of_the_folder_are_copied_under_their_own_names_only(scene, tmp_path):
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    (scene.base / "LICENSE").symlink_to(secret)
    scene.refuse(code=1, says=("LICENSE: expected a file, got a link out of the folder, to", "id_rsa", "Do not trust"))
    (scene.base / "LICENSE").unlink()
    for name in ("LICENSE", "a" * 64):  # another copy of the model, or the hub's cache
        (tmp_path / name).write_text("free")
        (scene.base / "LICENSE").symlink_to(tmp_path / name)
        assert Path("LICENSE") in list_side_files(scene.base)
        (scene.base / "LICENSE").unlink()
    (scene.base / "terms").write_text("free")
    (scene.base / "LICENSE").symlink_to("terms")
    scene.run()
    assert not (scene.out / "LICENSE").is_symlink()


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json", "generation_config.json"])
def test_links_that_lead_in_a_circle(scene, name):
    (scene.one / name).unlink()
    (scene.one / name).symlink_to(name)
    code, _, message = scene.run(code=None)
    assert code == (0 if name in ("tokenizer.json", "generation_config.json") else 1)
    assert "Traceback" not in message


def make_socket(path: Path) -> None:
    home = Path.cwd()
    os.chdir(path.parent)  # as a socket's path may have some hundred characters only
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(home)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a socket": make_socket,
    "a folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize(
    ("layout", "name", "code"),
    [
        ("plain", "config.json", 1),
        ("plain", WEIGHTS, 1),
        ("plain", "tokenizer.json", 0),
        ("plain", "generation_config.json", 0),
        ("plain", "README.md", 0),
        ("plain", "LICENSE", 0),
        ("sharded", INDEX, 1),
        ("sharded", "model-00002-of-00003.safetensors", 1),
        ("pickled", BIN, 1),
        ("byte pairs", "vocab.json", 1),
    ],
)
def test_what_is_no_file_is_not_waited_for(scene, kind, layout, name, code):
    lay(scene, layout)
    for folder in (scene.base, scene.one):
        (folder / name).unlink(missing_ok=True)
        SPECIAL[kind](folder / name)
    assert "Traceback" not in scene.run(code=code).err


def test_too_few_descriptors(scene):
    lay(scene, "sharded")
    scene.run()  # imports what opens files
    shutil.rmtree(scene.out)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 5, before[1]))  # nine weight files
        message = scene.run(code=1).err
        assert "Too many open files. Allow this process more of them (ulimit -n)." in message
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    scene.run()


# --------------------------------------------------------------------------------------------------- places and paths


@pytest.mark.parametrize("name", ["a b", "a\nb", "über 模型", "-x", "a'b\"c`d$e", "\t", "*?[", b"no text \xff\xfe"])
def test_paths_of_all_kinds(scene, name):
    name = os.fsdecode(name) if isinstance(name, bytes) else name
    try:
        home = scene.folder / name
        home.mkdir()
    except OSError:
        pytest.skip("the file system takes no such name")
    for folder in (scene.base, scene.one, scene.two):
        folder.rename(home / folder.name)
    moved = merging_scene(home)
    assert moved.run().err == ""
    recipe = json.loads((moved.out / "merge_recipe.json").read_bytes())
    assert recipe["base_model"] == str(moved.base)
    assert safetensors.torch.load((moved.out / WEIGHTS).read_bytes()).keys() == models.shapes(1).keys()
    (moved.one / WEIGHTS).write_bytes(b"")
    shutil.rmtree(moved.out)
    moved.refuse(code=1, says=("one: model.safetensors: expected a safetensors header",))


def test_an_output_on_another_file_system(scene):
    elsewhere = Path("/dev/shm")
    if not os.access(elsewhere, os.W_OK) or elsewhere.stat().st_dev == scene.folder.stat().st_dev:
        pytest.skip("no other file system to write to")
    assert scene.run().err == ""
    expected = (scene.out / WEIGHTS).read_bytes()
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        scene.out = Path(folder) / "out"
        assert scene.run().err == ""
        assert (scene.out / WEIGHTS).read_bytes() == expected


def test_read_only_inputs(scene):
    for path in (scene.base, scene.one, scene.two, *scene.base.iterdir(), *scene.one.iterdir()):
        path.chmod(0o555 if path.is_dir() else 0o444)
    scene.run()
    for path in (scene.base, scene.one, scene.two):
        path.chmod(0o755)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_side_file_that_goes_away(scene, monkeypatch, name):
    """Between the plan and the end: the result has it as it was, and is complete."""
    content = (scene.base / name).read_bytes()
    close = CheckpointWriter.close

    def remove_and_close(writer: CheckpointWriter) -> Any:
        (scene.base / name).unlink()
        return close(writer)

    monkeypatch.setattr(CheckpointWriter, "close", remove_and_close)
    assert scene.run().err == ""
    assert (scene.out / name).read_bytes() == content
