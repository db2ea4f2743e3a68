"""A sample of `make architectures`: one class of each kind of product, and the measurement itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.architectures.measured import Measured
from tests.architectures.one_class import look_at
from tests.architectures.sweep import page
from tests.architectures.tiny import Tiny, make_unique, tiny_models

pytestmark = pytest.mark.command
SAMPLE = {
    "Zamba2ForCausalLM": "modules that share parameters, bare matrices",
    "XLNetLMHeadModel": "weights of three dimensions, whose input channels are the first or the last two",
    "DbrxForCausalLM": "experts below each other in one matrix",
    "MambaForCausalLM": "a weight that is multiplied without its module",
    "MiniMaxM2ForCausalLM": "a router with a second argument",
    "CpmAntForCausalLM": "rows beside those of the tokens, in a model that does not read from left to right",
    "ChameleonForConditionalGeneration": "logits that the class writes into",
}


MORE = {"DbrxForCausalLM", "MiniMaxM2ForCausalLM", "CpmAntForCausalLM", "ChameleonForConditionalGeneration"}
"""Of the sample, what make test-all looks at."""


def tiny_of(name: str) -> Tiny:
    return next(tiny for tiny in tiny_models() if tiny.name == name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in MORE else ()) for name in SAMPLE]
)
def test_every_multiplied_weight_is_relaxed_by_what_it_is_multiplied_with(name: str, tmp_path: Path) -> None:
    outcome = look_at(tiny_of(name), tmp_path)
    assert (outcome.merged, outcome.runs, outcome.refusal, outcome.wrong, outcome.left) == ("", "yes", "", [], [])
    assert outcome.relaxed > 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "BlipForConditionalGeneration",
            "a BlipForConditionalGeneration cannot be run on plain text: TypeError: BlipForConditionalGeneration.forward() missing 1 "
            "required positional argument: 'pixel_values'. Merge without AIM, or use statistics that were taken elsewhere.",
        ),
        (
            "MusicgenForCausalLM",
            "a MusicgenForCausalLM cannot be run on plain text: RuntimeError: shape '[-1, 4, 32]' is invalid for input of size 32. "
            "Merge without AIM, or use statistics that were taken elsewhere.",
        ),
        (
            "BertForMaskedLM",
            "expected a causal language model, got BertForMaskedLM, which AIM cannot calibrate. Merge without AIM, or have "
            "config.json name a causal class under architectures.",
        ),
    ],
)
def test_what_cannot_be_run_on_text_is_merged_and_refused_in_one_message(
    name: str, message: str, tmp_path: Path
) -> None:
    outcome = look_at(tiny_of(name), tmp_path)
    assert outcome.right
    assert outcome.refusal == f"{tmp_path / 'base'}: {message}"


class Two(nn.Module):
    """A matrix that is used twice, and one of which a slice is."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.part = nn.Linear(6, 6, bias=False), nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twice(self.twice(x)) @ self.part[1].mT


def test_the_measurement_finds_parts_and_repeated_uses() -> None:
    torch.manual_seed(0)
    model = Two()
    make_unique(model, 0)
    x = torch.randn(5, 6)
    with torch.no_grad():
        once = model.twice(x)
        again = model.twice(once)
    measured = Measured(model)
    with torch.no_grad(), measured:
        model(x)
    both = torch.cat([x, once]).double().abs().mean(dim=0)
    found = measured.means(model.twice.weight.detach(), [1], by_matrix=False)
    assert found is not None
    torch.testing.assert_close(found, both)
    slices = measured.means(model.part.detach(), [2], by_matrix=True)
    assert slices is not None
    torch.testing.assert_close(slices[1], again.double().abs().mean(dim=0))
    assert not slices[0].any()
    assert not slices[2].any()


def test_every_class_has_one_config_and_the_page_counts_them() -> None:
    names = [(tiny.kind, tiny.model_type, tiny.name) for tiny in tiny_models()]
    assert len(names) == len(set(names)) > 340
    text = Path("docs/architectures.md").read_text(encoding="utf-8")
    missing = [name for _, _, name in names if name not in text]
    assert not missing
    assert "Not right:" not in text
    assert text.startswith(page([]).partition("| classes")[0])
