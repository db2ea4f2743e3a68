"""What of a calibration is kept in a stage, so that a run that was cut off does not run the base on the same text again."""

from __future__ import annotations

import time
from typing import Any

from aim.enough import Enough
from aim.statistics import Activations, load_activations
from checkpoints.safetensors_format import load_tensors, save_tensors
from checkpoints.staging import Stage
from streaming import commits

KEEP_EVERY = 5
"""In units of the time between commits of tensors: each time all sums are written, not only new ones."""


class UnfinishedCalibration:
    """The sums so far, and at the end the statistics, beside the output; the journal says how many blocks are in them.

    Args:
        stage: of a run whose identity holds the calibration's flags.
    """

    def __init__(self, stage: Stage):
        self._stage = stage
        self._sums = stage.state / "calibration.safetensors"
        self._whole = stage.state / "activations.safetensors"
        self._kept = time.monotonic()

    def finished(self) -> Activations | None:
        """The statistics of a calibration that came to its end."""
        done = any("calibrated" in record for record in self._stage.journal.records)
        return load_activations(self._whole) if done else None

    @property
    def choice(self) -> dict[str, Any] | None:
        """How the model is run, as `choose` was told."""
        return next((record["choice"] for record in self._stage.journal.records if "choice" in record), None)

    def choose(self, choice: dict[str, Any]) -> None:
        """Keep how the model is run: a run that goes on does the same. Raises WriteError: the disk is full or fails."""
        self._stage.journal.append({"choice": choice})

    @property
    def blocks(self) -> int:
        """How many blocks are in the sums."""
        return max((record.get("blocks", 0) for record in self._stage.journal.records), default=0)

    def restore(self, enough: Enough) -> int:
        """Put the sums back. Returns: the blocks that are in them; never fewer than `blocks`."""
        if not self.blocks:
            return 0
        tensors, metadata = load_tensors(self._sums, "the unfinished calibration")
        enough.restore(tensors)
        return int(metadata["blocks"])

    def keep(self, enough: Enough, blocks: int) -> None:
        """Keep the sums over the first `blocks` blocks, now and then. Raises WriteError: the disk is full or fails."""
        if time.monotonic() - self._kept >= KEEP_EVERY * commits.COMMIT_S:
            save_tensors(self._sums, enough.sums(), {"blocks": str(blocks)})
            self._stage.journal.append({"blocks": blocks})
            self._kept = time.monotonic()

    def finish(self, activations: Activations) -> None:
        """Keep the statistics. Raises WriteError: the disk is full or fails."""
        activations.save(self._whole)
        self._stage.journal.append({"calibrated": True})
