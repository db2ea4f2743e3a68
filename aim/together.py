"""Who runs which blocks of a calibration: one process all of them, or each of several its part, whose sums the first adds up, in the order
of the blocks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from aim.activations import Activations
from aim.enough import Enough
from aim.watcher import Watcher
from checkpoints.safetensors_format import pack_tensors, unpack_tensors

if TYPE_CHECKING:
    from aim.unfinished import UnfinishedCalibration
    from checkpoints.staging import Stage
    from streaming.processes import Processes

BLOCKS_AT_ONCE = 8
"""Of each process, at most, between two times that sums are added up: what is lost where one is killed."""


class Alone:
    """The part of the only process in a calibration: all of it.

    Attributes:
        is_first: whether this is the process that has the sums of all.
        keeps_layers: whether what it has within a pass that goes through the layers can be kept.
    """

    is_first, keeps_layers = True, True

    def told(self, key: str, find: Callable[[], Any]) -> Any:
        """What the first process finds out, as JSON: the others are told. `key`: names it."""
        return find()

    def begin(self, done: int) -> int:
        """How many blocks an earlier run had done, as the first process knows it."""
        return done

    def rounds(self, enough: Enough, begin: int, batch_size: int) -> Iterator[tuple[int, int]]:
        """Blocks from and to, after which all sums are in the first process, up to where is looked next."""
        return ((batch.start, batch.stop) for batch in enough.batches(begin, batch_size))

    def own(self, begin: int, end: int) -> tuple[int, int]:
        """This process's part of some blocks, which follow each other; that of the first is never empty."""
        return begin, end

    def add_up(self, watcher: Watcher, end: int, *, failed: bool = False) -> bool:
        """Give the first process the sums over one's part of the blocks before `end`, and forget them.

        Args:
            failed: whether nothing ran.

        Returns: whether anything ran in every process.
        """
        return not failed

    def check(self) -> None:
        """Raise InputError where another process has ended the run."""

    def finished(self, make: Callable[[], Activations], unfinished: UnfinishedCalibration | None) -> Activations:
        """The statistics, which the first process makes and keeps, and the others read. Raises InputError: as `make`."""
        activations = make()
        if unfinished:
            unfinished.finish(activations)
        return activations


class Together(Alone):
    """One process's part where several share a calibration.

    Args:
        processes: that share it.
        stage: whose state folder all of them see: sums go through it.
    """

    keeps_layers = False

    def __init__(self, processes: Processes, stage: Stage):
        self._processes, self._stage = processes, stage
        self.is_first = processes.is_first
        self._tries = 0

    def told(self, key: str, find: Callable[[], Any]) -> Any:
        """See `Alone`. Raises ProcessEnded: another process has ended the run."""
        key = f"calibration/{self._tries}/{key}"
        if self.is_first:
            self._processes.say(key, json.dumps(find()))
        return json.loads(self._processes.hear(key))

    def begin(self, done: int) -> int:
        """See `Alone`; each time that a pass begins, what is told is told anew."""
        self._tries += 1
        return int(self.told("begin", lambda: done))

    def rounds(self, enough: Enough, begin: int, batch_size: int) -> Iterator[tuple[int, int]]:
        """See `Alone`."""
        step = BLOCKS_AT_ONCE * self._processes.size
        return ((batch.start, batch.stop) for batch in enough.batches(begin, step))

    def own(self, begin: int, end: int) -> tuple[int, int]:
        """See `Alone`."""
        each, more = divmod(end - begin, self._processes.size)
        rank = self._processes.rank
        first = begin + each * rank + min(rank, more)
        return first, first + each + (rank < more)

    def add_up(self, watcher: Watcher, end: int, *, failed: bool = False) -> bool:
        """See `Alone`. Raises WriteError: the disk is full or fails."""
        key = f"calibration/{self._tries}/{end}"
        name = f"sums-{self._tries}-{end}-{self._processes.rank}.safetensors"
        if not self.is_first:
            self._stage.state.replace(name, pack_tensors(watcher.sums(), {}))
            watcher.forget()
        told = [json.loads(answer) for answer in self._processes.gather(key, json.dumps([name, failed]))]
        for file, _ in told[1:]:
            watcher.add(unpack_tensors(self._stage.state.read(file) or b"", file)[0])
            self._stage.state.remove(file)
        return not self.told(f"{end}/failed", lambda: any(one for _, one in told))

    def check(self) -> None:
        """See `Alone`."""
        self._processes.check()

    def finished(self, make: Callable[[], Activations], unfinished: UnfinishedCalibration | None) -> Activations:
        """See `Alone`; the others need what is kept."""
        assert unfinished is not None
        if not self.is_first:
            self._processes.hear("calibrated")
            return unfinished.of_first()
        activations = super().finished(make, unfinished)
        self._processes.say("calibrated")
        return activations
