"""How the base model is calibrated, and one calibration that is under way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import torch

from aim.activations import Activations
from aim.calibration_text import CalibrationData, TokenBlocks
from aim.enough import Enough
from aim.reference import ReferenceWatcher
from aim.targets import Selection
from aim.together import Alone
from aim.unfinished import UnfinishedCalibration
from aim.watcher import Watcher
from checkpoints.errors import ArgumentError, InputError, first_line, unknown
from checkpoints.model import Model
from checkpoints.provenance import fingerprint
from checkpoints.settings import setting
from checkpoints.source import FLOAT_DTYPES, dtype_name
from forward.layers import head_weight
from forward.loading import CannotRun
from forward.tuning import Choice, choose, is_worth_timing

Numerics = Literal["float32", "reference"]
Mode = Literal["auto", "whole", "layerwise"]
MODES = ("auto", "whole", "layerwise")
TOLERANCE = 0.02


@dataclass(frozen=True)
class CalibrationOptions:
    """How the base model is run.

    Attributes:
        device: where; None for the GPU or GPUs where there are any, spilling over to the CPU, else the CPU.
        dtype: of the forward pass: `auto` (the checkpoint's), float32, bfloat16 or float16; None for the faster of the
            checkpoint's and float32.
        batch_size: blocks of one forward pass; None for what is fastest.
        numerics: `reference` rounds as the published program does.
        tolerance: stop when s of the first and the second half of the text differ by less; 0 runs all of it; None for
            `TOLERANCE`, and 0 under `reference`.
        mode: `whole` has the model in memory, `layerwise` one layer of it at a time; `auto` takes what fits.
        max_memory: bytes of memory for weights and hidden states; None for what is free.
    """

    device: torch.device | None = None
    dtype: str | None = None
    batch_size: int | None = None
    numerics: Numerics = "float32"
    tolerance: float | None = None
    mode: Mode = "auto"
    max_memory: int | None = None

    def __post_init__(self) -> None:
        reference = self.numerics == "reference"
        if self.batch_size is not None and self.batch_size < 1:
            raise ArgumentError(f"{setting('batch_size')}: expected at least 1, got {self.batch_size}.")
        if self.dtype not in (None, "auto", *FLOAT_DTYPES):
            raise ArgumentError(
                f"{setting('calibration.dtype')}: expected auto, {', '.join(FLOAT_DTYPES)}, got {self.dtype!r}."
            )
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise ArgumentError(
                f"{setting('calibration.tolerance')}: expected a number from 0 to below 1, got {self.tolerance:g}. "
                f"0 runs all of the text; the default is {TOLERANCE}."
            )
        if self.mode not in MODES:
            raise ArgumentError(f"{setting('calibration.mode')}: {unknown('mode', self.mode, MODES)}")
        if self.max_memory is not None and self.max_memory < 1:
            raise ArgumentError(f"{setting('max_memory')}: expected at least 1 byte, got {self.max_memory}.")
        numerics = setting("numerics", "reference")
        if reference and self.batch_size not in (None, 1):
            raise ArgumentError(
                f"{setting('batch_size')}: {numerics} runs one block at a time, got {self.batch_size}. Leave it out."
            )
        if reference and self.dtype not in (None, "auto", "bfloat16"):
            raise ArgumentError(
                f"{setting('calibration.dtype')}: {numerics} runs in bfloat16, got {self.dtype}. Leave it out."
            )
        if reference and self.tolerance:
            raise ArgumentError(
                f"{setting('calibration.tolerance')}: {numerics} runs all of the text, got {self.tolerance:g}. Leave it out."
            )

    @property
    def stops_at(self) -> float:
        """The tolerance that holds."""
        return self.tolerance if self.tolerance is not None else 0.0 if self.numerics == "reference" else TOLERANCE

    def as_json(self) -> dict[str, Any]:
        """What of it decides the statistics, for JSON: not how the model is kept in memory."""
        if self.numerics == "reference":
            return {"dtype": "auto", "batch_size": 1}
        return {"dtype": self.dtype, "batch_size": self.batch_size, "tolerance": self.stops_at}


@dataclass(frozen=True)
class CalibrationRun:
    """What one calibration is of, and whom it tells of its progress; see `aim.calibrate.calibrate`."""

    base: Model
    selection: Selection
    options: CalibrationOptions
    data: CalibrationData
    blocks: TokenBlocks
    unfinished: UnfinishedCalibration | None
    progress: Callable[[int], object]
    note: Callable[[str], object]
    share: Alone

    @property
    def is_reference(self) -> bool:
        """Whether it rounds as the published program does."""
        return self.options.numerics == "reference"

    @property
    def has_experts(self) -> bool:
        """Whether the model has experts that transformers can run one by one, so that each one's input shows up."""
        return any(placement.kind == "experts" for placement in self.base.architecture.placements.values())

    def watcher(self, model: Any, *, with_head: bool = False) -> Watcher:
        """What sees the inputs of the weights that may be relaxed; the output head's product is not computed, unless `with_head`."""
        kind = ReferenceWatcher if self.is_reference else Watcher
        head = None if with_head else head_weight(model)
        return kind(model, self.selection.targets, head=head, compiled=self.compiles(model))

    def is_long(self, model: Any) -> bool:
        """Whether the work is worth some seconds of getting ready: timing settings, importing compiled loops."""
        return is_worth_timing(model, self.blocks.tokens.numel())

    def compiles(self, model: Any) -> bool:
        """Whether compiled loops are worth importing: for much work on a CPU."""
        on_gpu = self.options.device.type != "cpu" if self.options.device else torch.cuda.is_available()
        return self.is_long(model) and not on_gpu

    def enough(self, watcher: Watcher) -> Enough:
        """What says when the text is enough."""
        return Enough(watcher, self.options.stops_at, self.data.block_size, len(self.blocks.tokens))

    def advice(self, choice: Choice) -> str:
        """What to do where memory runs out."""
        lower = f"Lower {setting('batch_size')} (now {choice.batch_size}) or {setting('block_size')} (now {self.data.block_size})"
        return (
            f"{lower}, or use {setting('calibration.mode', 'layerwise')}" if self.options.mode != "layerwise" else lower
        )

    def fails(self, error: Exception) -> InputError:
        """What a forward pass that raises says to the user."""
        return CannotRun(
            f"{self.base.label}: a {self.base.architecture.model_class} cannot be run on plain text: {type(error).__name__}: {first_line(error)}. "
            "Merge without AIM, or use statistics that were taken elsewhere."
        )

    def choose(self, model: Any, tokens: torch.Tensor, *, in_float32: bool) -> Choice:
        """How to run the model; of several processes the first says it. See `_choose`."""
        choice = self.share.told("choice", lambda: self._choose(model, tokens, in_float32=in_float32).as_json())
        return Choice(**choice)

    def _choose(self, model: Any, tokens: torch.Tensor, *, in_float32: bool) -> Choice:
        """How to run the model: as an earlier run of the same calibration did, else as the options say, else what is fastest.

        Args:
            model: loaded, or a skeleton whose first layer is.
            tokens: on the device of the pass; in_float32: whether there is
                memory for that.
        """
        start = Choice(
            dtype_name(next(model.parameters()).dtype), torch.get_num_threads(), self.options.batch_size or 1
        )
        if self.is_reference:
            return start
        kept = self.unfinished.choice if self.unfinished else None
        if kept:
            return dataclasses.replace(Choice(**kept), threads=min(kept["threads"], start.threads))
        choice = start
        if self.is_long(model) and tokens.device.type != "meta":
            dtype = self.options.dtype is None and in_float32
            choice, rates = choose(model, tokens, start, dtype=dtype, batch=self.options.batch_size is None)
            if rates:
                times = rates[str(choice)] / max(rates[str(start)], 1e-9)
                than = f", {times:.1f} times as fast as {start}" if choice != start else ""
                self.note(f"runs in {choice}{than} (by its first layer)")
        if self.unfinished:
            self.unfinished.choose(choice.as_json())
        return choice

    def finish(
        self, watcher: Watcher, enough: Enough, choice: Choice, blocks: int, attention: str, more: Mapping[str, Any]
    ) -> Activations:
        """The statistics of so many blocks, kept where they are to be. Raises InputError: NaN in a statistic."""

        def make() -> Activations:
            statistics, dims, silent = watcher.results()
            described = {
                **self.data.as_json(),
                **self.blocks.as_json(),
                **enough.as_json(),
                "tokens": blocks * self.data.block_size,
                **choice.as_json(),
                "attention": attention,
                "numerics": self.options.numerics,
                "transformers": metadata.version("transformers"),
                "torch": metadata.version("torch"),
                **more,
            }
            return Activations(statistics, fingerprint(self.base.weights), described, silent, dims)

        return self.share.finished(make, self.unfinished)
