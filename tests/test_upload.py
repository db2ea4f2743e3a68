"""Pushing to the hub: after everything is complete, to a repo that fits, and what is refused before anything is merged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import extract_lora
import merge
import performAIM
from checkpoints.errors import InputError, Interrupted
from checkpoints.upload import plan_upload
from tests.adapter_files import make_adapter
from tests.fake_hub import FakeHub
from tests.pico import Family, make_family
from tests.scene import Scene, call, names
from tests.token_models import make_model, relax

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub calls httpx2 so


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), "llama", n_models=2)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """One whose token this process has."""
    with FakeHub() as hub:
        hub.attach(monkeypatch, tmp_path / "cache", token=hub.token)
        yield hub


@pytest.fixture
def scene(family: Family, tmp_path: Path) -> Scene:
    """Merges of the family."""
    models = {"--base_model": family.base, "--models_to_merge": names(family.models)}
    (tmp_path / "scene").mkdir()
    return Scene(tmp_path / "scene", merge, {"--method": "ties", **models, "--report": "none", "--workers": 1})


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed(hub: FakeHub, repo: str) -> dict[str, bytes]:
    """Without what the hub itself puts there."""
    return {name: data for name, data in hub.files(repo).items() if name != ".gitattributes"}


# ------------------------------------------------------------------------------------------------------------ pushing


def test_an_adapter_is_pushed(family: Family, hub: FakeHub, tmp_path: Path):
    """Its config names a base that is a folder by the folder's name alone; a finished one is pushed as it is."""
    flags = ["--model", family.models[0], "--base_model", family.base, "--rank=2", "--save_path", tmp_path / "lora"]
    plan = json.loads(call(extract_lora, *flags, "--push_to_hub", "lora", "--dry_run", "--json").out)
    assert plan["push_to_hub"]["repos"] == ["tester/lora"]
    assert "would push to" in call(extract_lora, *flags, "--push_to_hub", "lora", "--dry_run").out
    assert not hub.repos
    call(extract_lora, *flags)
    out = call(extract_lora, *flags, "--push_to_hub", "lora").out
    assert "is complete already" in out
    commit = hub.repos["models", "tester/lora"].branches["main"]
    assert f"/tester/lora (private), commit {commit}" in out
    files = pushed(hub, "tester/lora")
    assert files == content(tmp_path / "lora")
    assert set(files) >= {"adapter_config.json", "adapter_model.safetensors", "README.md", "merge_recipe.json"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == family.base.name
    for name in ("adapter_config.json", "README.md", "merge_recipe.json"):
        assert str(tmp_path).encode() not in files[name], name
        assert str(family.base.parent).encode() not in files[name], name
    refused = call(extract_lora, *flags, "--public", code=2)
    assert "--public: nothing is pushed" in refused.err
    refused = call(extract_lora, *flags, "--push_to_hub", "tester/lora", code=1)
    assert "holds an earlier result" in refused.err


def test_a_merge_of_adapters_is_pushed_as_an_adapter(family: Family, hub: FakeHub, tmp_path: Path):
    adapters = [make_adapter(tmp_path / name, family.base, seed=seed, r=2, target_modules=["q_proj"]) for seed, name in enumerate(("one", "two"))]  # fmt: skip
    models = ",".join(f"{family.base}+{adapter}" for adapter in adapters)
    flags = ["--method=task_arithmetic", "--base_model", family.base, "--models_to_merge", models, "--as_lora"]
    out = call(merge, *flags, "--push_to_hub", "sum", "--public", "--save_path", tmp_path / "lora").out
    assert "/tester/sum (public), commit" in out
    files = pushed(hub, "tester/sum")
    assert files == content(tmp_path / "lora")
    assert str(tmp_path).encode() not in b"".join(data for name, data in files.items() if not name.endswith("safetensors"))  # fmt: skip


def test_the_finished_folder_is_pushed_to_a_private_repo(scene: Scene, hub: FakeHub, tmp_path: Path):
    out = scene.run("--push_to_hub", "merged", "--max_shard_size", "50KB", "--log_file", str(tmp_path / "log")).out
    commit = hub.repos["models", "tester/merged"].branches["main"]
    assert out.splitlines()[-1] == f"pushed to {hub.endpoint}/tester/merged (private), commit {commit}"
    assert pushed(hub, "tester/merged") == content(scene.out)
    assert hub.private == {"tester/merged"}
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [one["commit"] for one in events if one["event"] == "pushed"] == [commit]


def test_a_public_repo_of_an_organisation_made_elsewhere_and_empty(scene: Scene, hub: FakeHub):
    from huggingface_hub import HfApi

    HfApi().create_repo("org/merged", private=False)
    out = scene.run("--push_to_hub", "org/merged", "--public").out
    assert f"pushed to {hub.endpoint}/org/merged (public), commit " in out
    assert pushed(hub, "org/merged") == content(scene.out)
    assert not hub.private


def test_a_model_that_was_pushed_can_be_merged(scene: Scene, hub: FakeHub, family: Family, tmp_path: Path):
    """And the card names it, which the hub checks."""
    scene.run("--push_to_hub", "merged")
    again = ["--method", "linear", "--base_model", str(family.base), "--models_to_merge", "tester/merged"]
    call(merge, *again, "--save_path", str(tmp_path / "again"), "--push_to_hub", "again")
    assert b'base_model:\n- "tester/merged"\nlibrary_name' in hub.files("tester/again")["README.md"]


def test_each_checkpoint_of_a_sweep_has_a_repo_of_its_own(hub: FakeHub, tmp_path: Path):
    base, merged = make_model(tmp_path / "base", "bpe"), make_model(tmp_path / "merged", "bpe")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"hello world merging models {i}"}) + "\n" for i in range(200)))
    run = ["--merged_model", str(merged), "--pretrained_model_name", str(base), "--save_path", str(tmp_path / "out")]
    run += ["--calibration_data", str(texts), "--n_samples", "8", "--block_size", "16", "--push_to_hub", "swept"]
    call(performAIM, *run, "--omegas", "0,0.5")
    assert {repo for _, repo in hub.repos} == hub.private == {"tester/swept-omega_0", "tester/swept-omega_0.5"}
    for omega in ("omega_0", "omega_0.5"):
        assert pushed(hub, f"tester/swept-{omega}") == content(tmp_path / "out" / omega)


def test_each_merge_of_a_sweep_has_a_repo_of_its_own(scene: Scene, hub: FakeHub):
    out = scene.run("--lambdas=0.3,1", "--densities=0.5", "--push_to_hub", "swept").out
    folders = ("lambda_0.3_density_0.5", "lambda_1_density_0.5")
    assert {repo for _, repo in hub.repos} == hub.private == {f"tester/swept-{folder}" for folder in folders}
    for folder in folders:
        assert pushed(hub, f"tester/swept-{folder}") == content(scene.out / folder)
    assert out.count("pushed to") == 2


def test_a_folder_that_is_complete_already_is_pushed(scene: Scene, hub: FakeHub):
    scene.run()
    weights = [path for path in scene.out.iterdir() if path.name not in ("README.md", "merge_recipe.json")]
    there = {path: path.stat().st_mtime_ns for path in weights}
    out = scene.run("--push_to_hub", "merged").out
    assert "is complete already" in out
    assert "pushed to " in out
    assert {path: path.stat().st_mtime_ns for path in weights} == there
    assert pushed(hub, "tester/merged") == content(scene.out)
    assert pushed(hub, "tester/merged") == content(scene.out)


def test_an_earlier_result_is_replaced_on_request(scene: Scene, hub: FakeHub):
    scene.run("--push_to_hub", "merged", "--max_shard_size", "50KB")
    assert (
        "holds an earlier result. Choose another name, or add --overwrite."
        in scene.run("--push_to_hub", "merged", code=1).err
    )
    scene.run("--push_to_hub", "merged", "--overwrite", "--lambda", "0.5")
    assert pushed(hub, "tester/merged") == content(scene.out)  # without the shards of before
    assert ".gitattributes" in hub.files("tester/merged")


def test_a_dry_run_says_what_would_be_pushed(scene: Scene, hub: FakeHub):
    out = scene.run("--push_to_hub", "merged", "--dry_run").out
    assert f"would push to {hub.endpoint}/tester/merged (private). Nothing was pushed.\n  model.safetensors: " in out
    assert out.endswith("/model_1: model_1 (fingerprint ...)\n")
    plan = json.loads(scene.run("--push_to_hub", "merged", "--public", "--dry_run", "--json").out)
    files, names = (plan["push_to_hub"].pop(key) for key in ("files", "names"))
    assert plan["push_to_hub"] == {"repos": ["tester/merged"], "visibility": "public"}
    assert all(name.endswith(f"/{public.removesuffix(' (fingerprint ...)')}") for name, public in names.items())
    assert not hub.repos
    assert not scene.out.exists()
    assert "push_to_hub" not in json.loads(scene.run("--dry_run", "--json").out)
    scene.run()
    written = {path.name: path.stat().st_size for path in scene.out.iterdir()}
    assert files == {name: size for name, size in written.items() if name not in ("README.md", "merge_recipe.json")}


def test_a_dry_run_of_perform_aim(hub: FakeHub, tmp_path: Path):
    base, merged = make_model(tmp_path / "base", "bpe"), make_model(tmp_path / "merged", "bpe")
    relax(base, merged, tmp_path / "out", "--push_to_hub", "one", "--save_activations", str(tmp_path / "statistics"))
    run = ["--merged_model", str(merged), "--pretrained_model_name", str(base), "--save_path", str(tmp_path / "two")]
    run += [
        "--activations",
        str(tmp_path / "statistics"),
        "--push_to_hub",
        "two",
        "--omegas",
        "0,0.4",
        "--dry_run",
    ]
    printed = call(performAIM, *run).out
    expected = f"would push to {hub.endpoint}/tester/two-omega_0, {hub.endpoint}/tester/two-omega_0.4 (private)."
    assert expected in printed
    assert len(json.loads(call(performAIM, *run, "--json").out)["push_to_hub"]["repos"]) == 2
    assert {repo for _, repo in hub.repos} == {"tester/one"}


# ------------------------------------------------------------------------------------- refused before anything is merged


@pytest.mark.parametrize("name", ["./out", "a/b/c", "", "a b", "x" * 97, "org/a--b", "https://huggingface.co/org/a"])
def test_names_that_the_hub_cannot_have(scene: Scene, hub: FakeHub, name: str):
    assert (
        f"--push_to_hub: expected NAME or USER/NAME of letters, digits, '-', '_' and '.', got {name!r}"
        in scene.refuse("--push_to_hub", name, code=2)
    )
    assert not hub.requests


def test_public_alone(scene: Scene):
    assert scene.refuse("--public", code=2) == "--public: nothing is pushed. Add --push_to_hub NAME, or leave it out.\n"


def test_tokens_that_will_not_do(scene: Scene, hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    hub.role = "read"
    assert "merged: your token may read only. Make one that may write at " in scene.refuse(
        "--push_to_hub", "merged", code=1
    )
    hub.role = "fineGrained"
    assert "your token may read only" in scene.refuse("--push_to_hub", "merged", code=1)
    hub.scopes.append("repo.write")
    assert plan_upload("merged").repos == ("tester/merged",)
    assert "is that of tester, who is no member of other. Push to one of: tester, org." in scene.refuse(
        "--push_to_hub", "other/merged", code=1
    )
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "the hub does not know your token. Log in" in scene.refuse("--push_to_hub", "merged", code=1)
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token. Log in with `hf auth login`" in scene.refuse("--push_to_hub", "merged", code=1)
    assert not hub.repos


def test_repos_that_hold_something_else(scene: Scene, hub: FakeHub, family: Family):
    hub.publish("tester/model", family.base)
    hub.private.add("tester/model")
    message = scene.refuse("--push_to_hub", "model", "--overwrite", code=1)
    assert "--push_to_hub tester/model: holds config.json, generation_config.json, model.safetensors" in message
    assert "which is no earlier result. Choose another name." in message


def test_repos_of_another_visibility(scene: Scene, hub: FakeHub, family: Family):
    hub.publish("tester/model", family.base)
    assert "tester/model: is public on the hub. Add --public, change it at " in scene.refuse(
        "--push_to_hub", "model", code=1
    )
    hub.private.add("tester/model")
    message = scene.refuse("--push_to_hub", "model", "--public", code=1)
    assert "tester/model: is private on the hub. Leave --public out, change it at " in message


def test_a_hub_that_does_not_answer(scene: Scene, hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    hub.status = 503
    assert "--push_to_hub merged: the hub refuses with status 503" in scene.refuse("--push_to_hub", "merged", code=1)
    hub.close()
    message = scene.refuse("--push_to_hub", "merged", code=1)
    assert f"--push_to_hub merged: {hub.endpoint} cannot be reached (ConnectError: " in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE=1 forbids to ask the hub. Unset it." in scene.refuse(
        "--push_to_hub", "merged", "--dry_run", code=1
    )


def test_every_repo_of_a_sweep_is_looked_at(hub: FakeHub, family: Family):
    hub.publish("tester/a-omega_0.5", family.base)
    with pytest.raises(InputError, match=r"tester/a-omega_0\.5: is public"):
        plan_upload("a", ["omega_0", "omega_0.5"])


# ------------------------------------------------------------------------------------------------ pushing that fails


def test_a_push_that_fails_leaves_the_folder_and_says_how_to_push(scene: Scene, hub: FakeHub):
    hub.uploads_fail = True
    message = scene.run("--push_to_hub", "merged", "--quiet", code=1).err
    assert (
        "--push_to_hub tester/merged: the hub refuses with status 403: Private repository storage limit reached"
        in message
    )
    assert (
        f"{scene.out} is complete. Push it later with:\n  hf upload tester/merged {scene.out} . --private\n" in message
    )
    assert (scene.out / "merge_recipe.json").is_file()
    hub.uploads_fail = False
    scene.run("--push_to_hub", "merged")  # the repo is there, and empty
    assert pushed(hub, "tester/merged") == content(scene.out)


def test_the_command_for_later_works(scene: Scene, hub: FakeHub, tmp_path: Path):
    hub.uploads_fail = True
    message = scene.run("--push_to_hub", "merged", code=1).err
    hub.uploads_fail = False
    command = message.strip().splitlines()[-1].split()
    done = subprocess.run(
        [str(Path(sys.executable).with_name("hf")), *command[1:]],
        env=hub.environment(tmp_path / "cache", token=hub.token), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert pushed(hub, "tester/merged") == content(scene.out)


def test_an_interrupted_push(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import HfApi

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "upload_folder", interrupt)
    upload = plan_upload("a", ["omega_0", "omega_1"], public=True, overwrite=True)
    with pytest.raises(Interrupted) as caught:
        list(upload.push(tmp_path / "my out"))
    assert str(caught.value).splitlines() == [
        "interrupted while pushing.",
        f"{tmp_path / 'my out'} is complete. Push it later with:",
        f"  hf upload tester/a-omega_0 '{tmp_path / 'my out' / 'omega_0'}' . --delete '*'",
        f"  hf upload tester/a-omega_1 '{tmp_path / 'my out' / 'omega_1'}' . --delete '*'",
    ]


def test_a_repo_that_was_filled_meanwhile(hub: FakeHub, family: Family, tmp_path: Path):
    upload = plan_upload("a")
    hub.publish("tester/a", family.base)
    hub.private.add("tester/a")
    with pytest.raises(InputError, match="which is no earlier result"):
        list(upload.push(tmp_path))


def test_a_card_that_the_hub_does_not_take(hub: FakeHub, tmp_path: Path):
    (tmp_path / "README.md").write_text("---\nbase_model:\n- ./base\n---\n")
    with pytest.raises(InputError) as caught:
        list(plan_upload("a").push(tmp_path))
    said = 'the hub refuses: Invalid metadata in README.md. - "base_model" with value "./base" is not valid.\n'
    assert str(caught.value).startswith(f"push_to_hub tester/a: {said}{tmp_path} is complete.")


def test_nothing_that_is_pushed_names_a_folder_of_this_machine(scene: Scene, hub: FakeHub, family: Family):
    scene.run("--push_to_hub", "merged", "--public", f"--log_file={scene.out.parent / 'log'}")
    there = pushed(hub, "tester/merged")
    for name in ("README.md", "merge_recipe.json", "config.json"):
        for folder in (family.base.parent, scene.out.parent, Path.home()):
            assert str(folder) not in there[name].decode(), name
    recipe = json.loads(there["merge_recipe.json"])
    digits = recipe["inputs"][1]["fingerprint"][:12]
    assert recipe["models"][0]["model"] == f"{family.models[0].name} (fingerprint {digits})"
    assert f"`{family.models[0].name} (fingerprint {digits})`" in there["README.md"].decode()
    call(merge, "--verify", str(scene.out))
