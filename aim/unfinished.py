"""Keep a calibration's sums in the stage, so that a run that was cut off does not run the base on the same text again."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from aim.activations import Activations, unpack_activations
from aim.enough import Enough
from checkpoints.errors import InputError
from checkpoints.safetensors_format import pack_tensors, unpack_tensors
from checkpoints.staging import Stage
from forward.tuning import is_choice
from streaming import commits
from streaming.kept import content_of, keep

KEEP_EVERY = 5
"""In units of the time between commits of tensors: each time all sums are written, not only new ones."""
KEEP_SHARE = 20
"""Times what keeping took that pass before the next time."""
WHOLE = "activations.safetensors"
FILE = re.compile(r"(calibration|layer)-\d+\.safetensors")
HIDDEN = "hidden."
LABEL = "the unfinished calibration"


class UnfinishedCalibration:
    """The sums so far, and at the end the statistics, beside the output.

    The journal says how many blocks are in them, in which file they are, and its checksum. The file of the last record that fits
    is gone on with; where none does, the calibration begins again.

    Args:
        stage: of a run whose identity holds the calibration's flags.

    Attributes:
        blocks: how many blocks are in the sums that are there.
        lost: whether the journal speaks of sums or statistics, and no file has them.
    """

    def __init__(self, stage: Stage):
        self._stage = stage
        self._kept, self._wait_s = time.monotonic(), KEEP_EVERY * commits.COMMIT_S
        self._activations = self._find_statistics()
        self._file, self.blocks, self._sums = self._find_sums()
        noted = any(record.keys() & {"blocks", "layer", "calibrated"} for record in stage.journal.records)
        self.lost = noted and self._activations is None and not self._sums

    def finished(self) -> Activations | None:
        """The statistics of a calibration that came to its end."""
        return self._activations

    @property
    def choice(self) -> dict[str, Any] | None:
        """How the model is run, as `choose` was told; None where nothing was, or it is not as this version writes it."""
        for record in self._stage.journal.records:
            choice = record.get("choice")
            if isinstance(choice, dict) and is_choice(choice):
                return choice
        return None

    def choose(self, choice: dict[str, Any]) -> None:
        """Keep how the model is run: a run that goes on does the same. Raises WriteError: the disk is full or fails."""
        self._stage.journal.append({"choice": choice})

    def restore(self, enough: Enough) -> int:
        """Put the sums back. Returns: the blocks that are in them, in those of all layers."""
        enough.restore({name: tensor for name, tensor in self._sums.items() if not name.startswith(HIDDEN)})
        return self.blocks

    @property
    def hidden(self) -> dict[str, torch.Tensor]:
        """What the layer is called with that a pass had come to; empty where it stood between two passes."""
        return {name[len(HIDDEN) :]: tensor for name, tensor in self._sums.items() if name.startswith(HIDDEN)}

    def forget(self) -> None:
        """Begin again, as what is there cannot be gone on with."""
        self._sums, self.blocks = {}, 0

    def keep_layer(self, enough: Enough, hidden: Callable[[], dict[str, torch.Tensor]], blocks: int) -> None:
        """Keep the sums within a pass that goes through the layers, now and then. Raises WriteError: the disk is full or fails.

        Args:
            hidden: gives what the next layer is called with.
            blocks: in the sums of all layers, from earlier passes.
        """
        started = time.monotonic()
        if started - self._kept < self._wait_s:
            return
        tensors = enough.sums() | {HIDDEN + name: tensor for name, tensor in hidden().items()}
        earlier, self._file = self._file, f"layer-{len(self._stage.journal.records)}.safetensors"
        keep(self._stage, self._file, pack_tensors(tensors, {"blocks": str(blocks)}), {"layer": blocks})
        if earlier:
            self._stage.state.remove(earlier)
        self._kept = time.monotonic()
        self._wait_s = max(self._wait_s, KEEP_SHARE * (self._kept - started))  # hidden states can be gigabytes

    def keep(self, enough: Enough, blocks: int) -> None:
        """Keep the sums over the first `blocks` blocks, now and then. Raises WriteError: the disk is full or fails."""
        if time.monotonic() - self._kept >= KEEP_EVERY * commits.COMMIT_S:
            earlier, self._file = self._file, f"calibration-{blocks}.safetensors"
            keep(self._stage, self._file, pack_tensors(enough.sums(), {"blocks": str(blocks)}), {"blocks": blocks})
            if earlier and earlier != self._file:  # until now the journal may have spoken of it alone
                self._stage.state.remove(earlier)
            self._kept = time.monotonic()

    def finish(self, activations: Activations) -> None:
        """Keep the statistics. Raises WriteError: the disk is full or fails."""
        keep(self._stage, WHOLE, activations.pack(), {"calibrated": True})

    def of_first(self) -> Activations:
        """The statistics that the first of several processes has just kept. Raises InputError: they are not there."""
        return unpack_activations(self._stage.state.read(WHOLE) or b"", LABEL)

    def _find_statistics(self) -> Activations | None:
        for record in reversed(self._stage.journal.records):
            content = content_of(self._stage.state, record, WHOLE) if "calibrated" in record else None
            if content is not None:
                try:
                    return unpack_activations(content, LABEL)
                except InputError:
                    continue
        return None

    def _find_sums(self) -> tuple[str, int, dict[str, torch.Tensor]]:
        """File, blocks and sums of the last record that fits."""
        for blocks, record in self._with_blocks():
            name = str(record.get("file"))
            content = content_of(self._stage.state, record, name) if FILE.fullmatch(name) else None
            if content is None:
                continue
            try:
                sums, metadata = unpack_tensors(content, LABEL)
                Enough.check_sums({name: tensor for name, tensor in sums.items() if not name.startswith(HIDDEN)})
            except (InputError, ValueError):
                continue
            if metadata.get("blocks") == str(blocks):
                return name, blocks, sums
        return "", 0, {}

    def _with_blocks(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Records of sums, the last first."""
        for record in reversed(self._stage.journal.records):
            blocks = record.get("blocks", record.get("layer"))
            if type(blocks) is int and 0 <= blocks < 1 << 62:
                yield blocks, record
