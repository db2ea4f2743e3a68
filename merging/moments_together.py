"""The layer-by-layer pass of several processes: each runs some of the models, and all get every model's moments, layer after layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from checkpoints.errors import WriteError
from checkpoints.safetensors_format import pack_tensors, unpack_tensors
from checkpoints.staging import Stage
from merging.methods.regmean import InputMoments
from streaming.processes import Processes

ByTensor = Mapping[str, InputMoments | None]
"""Output tensor -> the moments of one model's input of it; None where none was seen."""


class MomentsTogether:
    """One process's part.

    Args:
        processes: that share the pass.
        stage: whose state folder all of them see: moments go through it.
        tokens: of each model's text, by which models are shared out.

    Attributes:
        owners: of each model, which process runs it.
    """

    def __init__(self, processes: Processes, stage: Stage, tokens: Sequence[int]):
        self._processes, self._stage = processes, stage
        loads, self.owners = [0] * processes.size, [0] * len(tokens)
        for model in sorted(range(len(tokens)), key=lambda at: (-tokens[at], at)):
            owner = loads.index(min(loads))
            self.owners[model] = owner
            loads[owner] += tokens[model]
        self._written = ""

    @property
    def own(self) -> list[int]:
        """Positions of the models that this process runs."""
        return [model for model, owner in enumerate(self.owners) if owner == self._processes.rank]

    def exchange(self, layer: int, own: Mapping[int, ByTensor]) -> list[ByTensor]:
        """Every model's moments of a layer; weights that share an input share an object.

        Args:
            own: of the models that this process runs.

        Raises: ProcessEnded: another process has ended the run; WriteError: the disk is full or fails.
        """
        processes = self._processes
        name = f"moments-{layer}-{processes.rank}.safetensors"
        self._stage.state.replace(name, _pack(own))
        processes.say(f"moments/{layer}/{processes.rank}")
        known: dict[int, ByTensor] = {}
        for rank in range(processes.size):
            processes.hear(f"moments/{layer}/{rank}")
            if rank in self.owners:
                known |= dict(own) if rank == processes.rank else self._read(layer, rank)
        if self._written:  # all have gone on to this layer, and read that of the one before
            self._stage.state.remove(self._written)
        self._written = name
        return [known[model] for model in range(len(self.owners))]

    def _read(self, layer: int, rank: int) -> dict[int, ByTensor]:
        name = f"moments-{layer}-{rank}.safetensors"
        content = self._stage.state.read(name)
        if content is None:
            raise WriteError(
                self._stage.state / name, FileNotFoundError(2, "another process has written it, and it is not there")
            )
        return _unpack(content, name)


def _pack(own: Mapping[int, ByTensor]) -> list[bytes | memoryview]:
    """Each object once, and which tensors of which model have it."""
    numbers: dict[int, int] = {}
    tensors: dict[str, torch.Tensor] = {}
    said: dict[str, str] = {}
    for model, by_tensor in own.items():
        said[str(model)] = ""
        for name, moments in by_tensor.items():
            if moments is None:
                said[f"{model} {name}"] = ""
                continue
            if id(moments) not in numbers:
                number = numbers[id(moments)] = len(numbers)
                tensors |= {f"{number}.rest": moments.rest.cpu(), f"{number}.first": moments.first.cpu()}
            said[f"{model} {name}"] = str(numbers[id(moments)])
    return pack_tensors(tensors, said)


def _unpack(content: bytes, where: str) -> dict[int, ByTensor]:
    tensors, said = unpack_tensors(content, where)
    made = {key.partition(".")[0] for key in tensors}
    moments = {number: InputMoments(tensors[f"{number}.rest"], tensors[f"{number}.first"]) for number in made}
    known: dict[int, dict[str, InputMoments | None]] = {int(key): {} for key in said if " " not in key}
    for key, number in said.items():
        model, has_name, name = key.partition(" ")
        if has_name:
            known[int(model)][name] = moments[number] if number else None
    return dict(known)
