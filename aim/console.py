"""What both commands do and say about AIM: calibrate or load, keep, summarise, draw."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from aim.calibrate import calibrate, check_causal, read_blocks, select
from aim.flags import read_calibration, read_relaxing
from aim.relaxing import Relaxations, group_kept, make_relaxations
from aim.statistics import Activations, load_activations
from aim.summary import format_summaries, kind_of
from checkpoints.model import Model

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


@dataclass(frozen=True)
class Console:
    """How to speak to the user.

    say: prints a line of the result; note: prints a remark beside it; bar: makes a progress bar from a title and a number of tokens.
    """

    say: Callable[[str], object]
    note: Callable[[str], object]
    bar: Bar


class AimRequest:
    """AIM as the flags ask for it.

    Args:
        arguments: with the flags of `add_aim_flags` and `--seed`.
        device: of the blocks, and of calibration where `--device` named one.

    Raises: ArgumentError: flags that are wrong or exclude each other.
    """

    def __init__(self, arguments: argparse.Namespace, device: torch.device):
        self.how = read_relaxing(arguments)
        self.data, self.calibration = read_calibration(arguments, None if arguments.device == "auto" else device)
        self._device = device
        self._file = arguments.activations
        self._keep = arguments.save_activations
        self._figures = arguments.figures

    def check(self, base: Model) -> dict[str, object]:
        """What would be done, known without running the base. Raises InputError where the base cannot be calibrated."""
        selection, _ = select(base, self.how.numerics)
        if self._file is None:
            check_causal(base)
        kinds: dict[str, int] = {}
        for name in selection.targets:
            kinds[kind_of(name)] = kinds.get(kind_of(name), 0) + 1
        kept = [
            {"tensors": kind, "count": count, "why": why}
            for (kind, why), count in group_kept(selection.skipped).items()
        ]
        return {
            "omegas": [str(omega) for omega in self.how.omegas],
            "statistics": self._file or self.data.source,
            "relaxes": kinds,
            "keeps": kept,
        }

    def relaxations(self, base: Model, console: Console) -> Relaxations:
        """Statistics and transforms, with a summary for the user. Raises InputError: see `calibrate` and `make_relaxations`."""
        activations = self._activations(base, console)
        if self._keep:
            activations.save(Path(self._keep))
            console.say(f"{self._keep}: statistics of {len(activations.statistics)} tensors")
        source = f"--activations {self._file}" if self._file else "the statistics"
        found = make_relaxations(base, activations, self.how, device=self._device, source=source)
        for warning in found.warnings:
            console.note(f"warning: {warning}")
        console.say(format_summaries(found.summaries))
        if self._figures:
            from aim.figures import draw_importance

            for path in draw_importance(found.importance, Path(self._figures)):
                console.say(f"{path}: written")
        return found

    def _activations(self, base: Model, console: Console) -> Activations:
        if self._file:
            return load_activations(Path(self._file))
        check_causal(base)
        blocks = read_blocks(base, self.data)
        console.say(blocks.summary(self.data))
        with console.bar("calibrating", blocks.tokens.numel()) as advance:
            return calibrate(base, self.data, self.calibration, blocks=blocks, progress=advance)


def format_check(checked: dict[str, object]) -> str:
    """What `AimRequest.check` found, for people."""
    relaxes = checked["relaxes"]
    keeps = checked["keeps"]
    assert isinstance(relaxes, dict)
    assert isinstance(keeps, list)
    omegas = checked["omegas"]
    assert isinstance(omegas, list)
    lines = [f"AIM: omega {' and '.join(omegas)}, statistics from {checked['statistics']}"]
    lines += [f"  {count:5d} x {kind}: relax" for kind, count in relaxes.items()]
    lines += [f"  {entry['count']:5d} x {entry['tensors']}: stays as merged ({entry['why']})" for entry in keeps]
    return "\n".join(lines)
