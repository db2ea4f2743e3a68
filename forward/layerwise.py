"""Run a model layer by layer: of its weights never more than one layer is in memory, and the next one on its way.

    with Layerwise(base, model, device, watch=watch, counts=watcher) as layers:
        layers.start(batches)
        while layers.at is not None:
            layers.advance()          # all batches go through the layer `at`

Several models in step are several of these, of which each is advanced in turn (`in_step`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from checkpoints.errors import InputError
from checkpoints.model import Model
from checkpoints.settings import setting
from forward.layers import find_layers
from forward.shelf import Shelf
from forward.skeleton import RowReader, Weights
from forward.steps import Steps, tensors_in
from forward.watch import Watch
from forward.whole import Counts


class Layerwise:
    """A model that is run layer by layer; a context manager.

    Args:
        base: the checkpoint.
        model: its skeleton, of `build_skeleton`.
        device: where it runs.
        watch: what sees the inputs, of `model`; it is entered and left by the caller.
        counts: is told the shape of what runs.
        shelf: of hidden states that wait; None keeps all in memory.
        reads_ahead: whether a layer's weights are there before the one before it is done.
        fails: makes of what the model's own code raises the error to raise.

    Attributes:
        weights: reads them.
        layers: names and modules.
    """

    def __init__(
        self,
        base: Model,
        model: Any,
        device: torch.device,
        *,
        watch: Watch | None = None,
        counts: Counts | None = None,
        shelf: Shelf | None = None,
        reads_ahead: bool = True,
        fails: Callable[[Exception], Exception] = lambda error: error,
    ):
        self.layers = find_layers(model)
        self.weights = Weights(base, model, device)
        self._base = base
        self._model, self._device, self._watch, self._counts, self._shelf = model, device, watch, counts, shelf
        self._fails, self._reads_ahead = fails, reads_ahead
        self._steps = Steps(model, [layer for _, layer in self.layers], self._around)
        self._handles: list[Any] = []
        self._undo: list[Callable[[], None]] = []
        self._threads = torch.get_num_threads()

    def _around(self) -> Sequence[AbstractContextManager[Any]]:
        return [RowReader(self.weights), *([self._watch.in_thread()] if self._watch else [])]

    def __enter__(self) -> Layerwise:
        inside = {id(module) for _, layer in self.layers for module in layer.modules()}
        for module in self._model.modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if own and id(module) not in inside and not isinstance(module, nn.Embedding):
                self._handles.append(module.register_forward_pre_hook(self._load_once()))
        self._steps.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._steps.__exit__(*error)
        for handle in self._handles:
            handle.remove()
        for undo in self._undo:
            undo()
        self._handles.clear()
        self._undo.clear()
        self.weights.close()
        torch.set_num_threads(
            self._threads
        )  # the threads of runs have a number of their own, which new ones would take over

    def _load_once(self) -> Any:
        """A hook that loads what a module outside of the layers holds when it first runs; an output head's product is not computed."""
        loaded: list[bool] = []

        def hook(module: nn.Module, args: Any) -> None:
            if not loaded and not (self._watch and self._watch.leaves_out(getattr(module, "weight", None))):
                loaded.append(True)
                self._undo.append(self.weights.load(module, recurse=False))

        return hook

    @property
    def at(self) -> int | None:
        """Index of the layer that all batches stand before; None when they are done."""
        return self._steps.runs[0].at if self._steps.runs else None

    @property
    def calls(self) -> int:
        """How many calls of layers the batches have come through."""
        return self._steps.runs[0].calls if self._steps.runs else 0

    def run(self, batches: Sequence[torch.Tensor], through: Callable[[int], object] = lambda layers: None) -> None:
        """Run batches through all layers; `through` is called with how many layers are done."""
        self.start(batches)
        self.go_on(through)

    def go_on(self, through: Callable[[int], object] = lambda layers: None) -> None:
        """Run what stands before a layer through the rest; see `run`."""
        while self.at is not None:
            self.advance()
            through(self.calls)

    def start(self, batches: Sequence[torch.Tensor]) -> None:
        """Run batches `[blocks, tokens]` up to the first layer. Raises InputError: no room for what they leave there."""
        self._steps.runs.clear()
        for batch in batches:
            with self._counting(batch):
                run = self._steps.start(batch)
            if self._shelf:
                if len(self._steps.runs) == 1:
                    self._shelf.check_room(run, len(batches))
                self._shelf.put(run)
        self._check_place()

    def advance(self, progress: Callable[[int], object] = lambda tokens: None) -> None:
        """Have all batches go through the layer that they stand before, with its weights from the checkpoint."""
        at = self.at
        assert at is not None
        _, layer = self.layers[at]
        with self.weights.loaded(layer):
            if self._reads_ahead and at + 1 < len(self.layers):
                self.weights.read_ahead(self.layers[at + 1][1])
            if self._watch:
                self._watch.find_again(layer)
            torch.set_num_threads(self._threads)
            for run in self._steps.runs:
                if self._shelf:
                    self._shelf.take(run)
                with self._counting(run.tokens), torch.no_grad():
                    self._steps.step(run)
                if self._shelf and run.at is not None:
                    self._shelf.put(run)
                progress(run.tokens.numel())
        self._check_place()

    def look(self, weights: Weights) -> None:
        """Run all batches through the layer that they stand before with other weights of it, for what sees its inputs; they stay where they are.

        Args:
            weights: of the same skeleton.
        """
        at = self.at
        assert at is not None
        _, layer = self.layers[at]
        with weights.loaded(layer):
            if self._watch:
                self._watch.find_again(layer)
            torch.set_num_threads(self._threads)
            for run in self._steps.runs:
                with self._counting(run.tokens), torch.no_grad():
                    self._steps.look(run)

    def _check_place(self) -> None:
        if len({run.at for run in self._steps.runs}) > 1:
            raise InputError(
                f"{self._base.label}: expected its layers to be called in the same order for every text, got another for each, "
                f"so that it cannot be run layer by layer. Use {setting('calibration.mode', 'whole')}."
            )

    def _counting(self, tokens: torch.Tensor) -> AbstractContextManager[None]:
        return _Counting(self._counts, tokens, self._fails)

    @property
    def can_be_kept(self) -> bool:
        """Whether `state` is all that is needed to go on at this layer; see `Steps.can_go_on`."""
        return self._steps.can_go_on and (self._shelf is None or self._shelf.is_in_memory)

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors that the batches stand before their layer with, under names that `restore` knows."""
        tensors = {"calls": torch.tensor(self.calls), "form": torch.tensor(self._steps.form or 0)}
        for position, run in enumerate(self._steps.runs):
            if self._shelf:
                self._shelf.take(run)
            for number, tensor in enumerate(tensors_in((run.args, run.kwargs))):
                tensors[f"{position}.{number}"] = tensor.detach().cpu()
            if self._shelf:
                self._shelf.put(run)
        return tensors

    def restore(self, batches: Sequence[torch.Tensor], tensors: dict[str, torch.Tensor]) -> bool:
        """Have batches stand where `state` was taken. Returns: whether that could be done; else nothing has been begun."""
        try:
            self._steps.runs.clear()
            self._steps.form = int(tensors["form"]) or None
            for position, batch in enumerate(batches):
                count = sum(name.startswith(f"{position}.") for name in tensors)
                arguments = [tensors[f"{position}.{number}"] for number in range(count)]
                with self._counting(batch):
                    run = self._steps.start(batch, skip=int(tensors["calls"]), arguments=arguments)
                if self._shelf:
                    self._shelf.put(run)
        except (ValueError, KeyError, InputError):
            for run in self._steps.runs:
                run.cancel()
            self._steps.runs.clear()
            return False
        return True


class _Counting(AbstractContextManager[None]):
    """Tells whoever counts what runs, and turns what a model's code raises into an error for the user."""

    def __init__(self, counts: Counts | None, tokens: torch.Tensor, fails: Callable[[Exception], Exception]):
        self._counts, self._tokens, self._fails = counts, tokens, fails

    def __enter__(self) -> None:
        if self._counts:
            self._counts.block = (self._tokens.shape[0], self._tokens.shape[1])

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from forward.loading import is_out_of_memory

        if self._counts:
            self._counts.block = None
        if isinstance(error, Exception) and not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise self._fails(error) from error


def in_step(models: Sequence[Layerwise]) -> Iterator[int]:
    """Have several models go through their layers together; gives each layer's index when all of them are through it."""
    while models[0].at is not None:
        at = models[0].at
        for run in models:
            run.advance()
        yield at
