"""Many runs of one model at once, each stopped at its next layer: so that a layer's weights are there once for all of them.

A run is the model's own forward, in a thread of its own, of which only one ever goes on at a time. Where it calls a layer, it
stops, and waits for what the layer makes of its arguments. So each layer gets what the model gives it (masks, rotary tables,
what earlier layers left), and nothing of the model has to be known but which modules its layers are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef


class _Cancelled(BaseException):
    """The run is not gone on with."""


class Run:
    """One forward pass, from layer to layer.

    Attributes:
        at: the index of the layer that it stands before; None when it is done.
        calls: how many layers it has come through.
        args, kwargs: that layer's arguments.
        tokens: `[blocks, tokens]`, what runs.
    """

    def __init__(
        self,
        model: Any,
        tokens: torch.Tensor,
        around: Callable[[], Sequence[AbstractContextManager[Any]]],
        skip: int = 0,
        form: int | None = None,
    ):
        self.tokens = tokens
        self.calls = 0
        self._skip, self._form = skip, form
        self.at: int | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self._model, self._around = model, around
        self._result: Any = None
        self._error: BaseException | None = None
        self._cancelled = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True, name="forward pass")

    def start(self) -> None:
        """Run to the first layer. Raises what the model raises."""
        self._thread.start()
        self._wait()

    def go_on(self, result: Any) -> None:
        """Run from a layer, which gave this result, to the next. Raises what the model raises."""
        self._result, self.at, self.args, self.kwargs = result, None, (), {}
        self.calls += 1
        del result
        self._go.release()
        self._wait()

    def cancel(self) -> None:
        """Leave the run where it is, for good."""
        if self._thread.is_alive():
            self._cancelled = True
            self._go.release()
            self._thread.join()

    def _wait(self) -> None:
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            torch.set_num_threads(
                1
            )  # of this thread: what lies between layers is little, and each thread would keep helpers
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                for context in self._around():
                    stack.enter_context(context)
                self._model(input_ids=self.tokens, use_cache=False)
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._stopped.release()

    def stop_at(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Wait for what a layer makes of its arguments; called in the run's own thread."""
        if self.calls < self._skip:
            self.calls += 1
            hidden = next(one for one in tensors_in((args, kwargs)) if one.is_floating_point())
            return hidden if self._form is None else (hidden, *[None] * (self._form - 1))
        self.at, self.args, self.kwargs = layer, args, kwargs
        del args, kwargs
        self._stopped.release()
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled
        result, self._result = self._result, None
        return result


class Steps:
    """The runs of one model; a context manager, in which the layers' forwards stop the runs.

    Args:
        model: its layers may be without weights.
        layers: of `forward.layers.find_layers`.
        around: what each run is to run in, such as a watch's `in_thread`.

    Attributes:
        runs: in the order in which they began.
        form: what layers give: None for a tensor, else the length of a tuple whose first element alone is one.
        can_go_on: whether a run that is begun anew can go on at a layer with that layer's arguments alone: not where the model
            keeps for itself what earlier layers made.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[nn.Module],
        around: Callable[[], Sequence[AbstractContextManager[Any]]] = lambda: (),
    ):
        self._model, self._layers, self._around = model, layers, around
        self._forwards: dict[int, Callable[..., Any]] = {}
        self.runs: list[Run] = []
        self.form: int | None = None
        self.can_go_on = True
        self._outputs: list[list[StorageWeakRef]] = []

    def __enter__(self) -> Steps:
        for index, layer in enumerate(self._layers):
            self._forwards[index] = layer.forward
        for index, layer in enumerate(self._layers):
            layer.forward = self._stub(index, self._forwards[index])
        return self

    def __exit__(self, *error: Any) -> None:
        for run in self.runs:
            run.cancel()
        for layer in {id(one): one for one in self._layers}.values():
            del layer.forward
        self.runs.clear()

    def _stub(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def stub(*args: Any, **kwargs: Any) -> Any:
            run = next((one for one in self.runs if one._thread is threading.current_thread()), None)
            return forward(*args, **kwargs) if run is None else run.stop_at(index, args, kwargs)

        return stub

    def start(self, tokens: torch.Tensor, *, skip: int = 0, arguments: Sequence[torch.Tensor] | None = None) -> Run:
        """Begin a run, up to its first layer.

        Args:
            skip: calls of layers to pass over, as their result makes no difference: `arguments` has all tensors that the layer
                behind them is called with, as `tensors_in` gave them.

        Raises: ValueError: these are not the arguments of that layer.
        """
        run = Run(self._model, tokens, self._around, skip, self.form)
        self.runs.append(run)
        run.start()
        if arguments is not None:
            there = tensors_in((run.args, run.kwargs))
            if [(tensor.shape, tensor.dtype) for tensor in there] != [
                (tensor.shape, tensor.dtype) for tensor in arguments
            ]:
                raise ValueError("the layer is called with something else")
            for old, new in zip(there, arguments, strict=True):
                old.set_(new.to(old.device))  # type: ignore[call-overload]
        return run

    def look(self, run: Run) -> None:
        """Call the layer that a run stands before, whose weights are there, with what it is called with; the run stays there."""
        assert run.at is not None
        self._forwards[run.at](*run.args, **run.kwargs)

    def step(self, run: Run) -> None:
        """Have a run go through the layer that it stands before, whose weights are there, to the next."""
        assert run.at is not None
        result = self._forwards[run.at](*run.args, **run.kwargs)
        if run is self.runs[0]:
            self._look_at(result)
        run.go_on(result)
        del result
        if run is self.runs[0] and len(self._outputs) > 1:
            here = {tensor.untyped_storage()._cdata for tensor in tensors_in((run.args, run.kwargs))}
            kept = [one for one in self._outputs.pop(0) if not one.expired() and one.cdata not in here]
            self.can_go_on = self.can_go_on and not kept

    def _look_at(self, result: Any) -> None:
        """Note the form of what a layer gives, and whether it is let go of later."""
        given = tensors_in(result)
        self._outputs.append([StorageWeakRef(tensor.untyped_storage()) for tensor in given])
        is_tuple = isinstance(result, tuple)
        simple = len(given) == 1 and (result is given[0] or (is_tuple and result[0] is given[0]))
        form = len(result) if is_tuple else None
        self.can_go_on = self.can_go_on and simple and (len(self._outputs) == 1 or form == self.form)
        self.form = form


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors inside arguments, in one order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [one for key in value for one in tensors_in(value[key])]
    if isinstance(value, list | tuple):
        return [one for part in value for one in tensors_in(part)]
    return []
