"""The paper's commands on docs/paper.md, word for word, on stand-ins of the models that they name (tests/stand_ins.py)."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file

import merge
import performAIM
from tests.aim_runs import write_texts
from tests.fake_hub import FakeHub
from tests.stand_ins import BASE, CONFIGS, MATH, ROWS, WIDTH, make_paper_models

PAGE = (Path(__file__).parent.parent / "docs/paper.md").read_text()


def command(start: str) -> list[str]:
    """The words of a command of the page behind its program, from how it begins."""
    found = re.search(re.escape(start) + r"(?:.*\\\n)*.*", PAGE)
    assert found is not None
    return shlex.split(found[0].replace("\\\n", " "))[2:]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    made = FakeHub(make_paper_models(tmp_path / "hub"))
    made.attach(monkeypatch, tmp_path / "cache")
    return made


def test_the_commands_of_the_paper(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    argv = command(f"python merge.py --method dare_ties --base_model {BASE}")
    assert set(",".join(argv).split(",")) >= CONFIGS.keys()
    with hub:
        assert merge.main(argv) == 0, capsys.readouterr().err
        said = capsys.readouterr().err
        assert [line for line in said.splitlines() if line.startswith("warning")] == []
        assert f"note: {MATH}: config.json has max_position_embeddings 2048 (4096 in {BASE})" in said
        assert f"note: the output's tokenizer is that of {BASE} and 1 added token: '[PAD]'." in said
        out = tmp_path / argv[argv.index("--save_path") + 1]
        _, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(report.values())
        assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("[PAD]") == ROWS
        assert load_file(out / "model.safetensors")["lm_head.weight"].shape == (ROWS + 1, WIDTH)
        assert merge.main(["--verify", str(out)]) == 0
        assert json.loads((out / "merge_recipe.json").read_text())["inputs"][0]["revision"]
        # And the command that relaxes it, on a text of our own.
        argv = command("python performAIM.py --merged_model ./DARE_TIES")
        texts = ["--calibration_data", str(write_texts(tmp_path)), "--n_samples=4", "--block_size=64"]
        assert performAIM.main([*argv, *texts]) == 0, capsys.readouterr().err
        assert merge.main(["--verify", argv[argv.index("--save_path") + 1]]) == 0
