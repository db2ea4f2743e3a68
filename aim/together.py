"""A calibration that several processes share: each runs its part of the blocks, and the first adds their sums up, in the order of the blocks."""

from __future__ import annotations

import json

from aim.enough import Enough
from aim.watcher import Watcher
from checkpoints.safetensors_format import pack_tensors, unpack_tensors
from checkpoints.staging import Stage
from streaming.processes import Processes

BLOCKS_AT_ONCE = 8
"""Of each process, at most, between two times that sums are added up: what is lost where one is killed."""


class Together:
    """One process's part in a calibration.

    Args:
        processes: that share it.
        stage: whose state folder all of them see: sums go through it.
    """

    def __init__(self, processes: Processes, stage: Stage):
        self.processes, self._stage = processes, stage
        self._tries = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that has the sums of all."""
        return self.processes.is_first

    def begin(self, done: int) -> int:
        """How many blocks an earlier run had done, as the first process knows it."""
        self._tries += 1
        if self.is_first:
            self.processes.say(f"calibration/begin/{self._tries}", str(done))
        return int(self.processes.hear(f"calibration/begin/{self._tries}"))

    def rounds(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Blocks from and to, after which sums are added up."""
        step = BLOCKS_AT_ONCE * self.processes.size
        return [(first, min(first + step, end)) for first in range(begin, end, step)]

    def own(self, begin: int, end: int) -> tuple[int, int]:
        """This process's part of some blocks, which follow each other; that of the first is never empty."""
        each, more = divmod(end - begin, self.processes.size)
        rank = self.processes.rank
        first = begin + each * rank + min(rank, more)
        return first, first + each + (rank < more)

    def add_up(self, watcher: Watcher, end: int, *, failed: bool = False) -> bool:
        """Give the first process the sums over one's part of the blocks before `end`, and forget them.

        Args:
            failed: whether nothing ran.

        Returns: whether anything ran in every process.
        """
        processes, key = self.processes, f"calibration/{self._tries}/{end}"
        name = f"sums-{self._tries}-{end}-{processes.rank}.safetensors"
        if not self.is_first:
            self._stage.state.replace(name, pack_tensors(watcher.sums(), {}))
            watcher.forget()
        answers = processes.gather(key, json.dumps([name, failed]))
        if self.is_first:
            told = [json.loads(answer) for answer in answers]
            failed = any(one for _, one in told)
            for file, _ in told[1:]:
                watcher.add(unpack_tensors(self._stage.state.read(file) or b"", file)[0])
                self._stage.state.remove(file)
            processes.say(f"{key}/failed", json.dumps(failed))
        return not json.loads(processes.hear(f"{key}/failed"))

    def is_enough(self, enough: Enough, end: int) -> bool:
        """Whether so many blocks are enough, as the first process sees it."""
        key = f"calibration/enough/{self._tries}/{end}"
        if self.is_first:
            self.processes.say(key, json.dumps(enough.at(end)))
        return bool(json.loads(self.processes.hear(key)))
