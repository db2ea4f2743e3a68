"""The pass of a calibration over its text: with the whole model in memory, or layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from aim.activations import Activations
from aim.calibration_run import CalibrationOptions, CalibrationRun
from aim.enough import Enough
from checkpoints.model import Model
from checkpoints.process import give_back_freed_memory
from checkpoints.source import FLOAT_DTYPES
from forward.layers import device_of_tokens, find_layers
from forward.layerwise import Layerwise
from forward.loading import CannotRun, auto_dtype, load, out_of_memory
from forward.memory import available_bytes
from forward.shelf import Shelf
from forward.skeleton import RowReader, build_skeleton
from forward.tuning import BATCHES, Choice, apply, threads
from forward.whole import run_batches
from streaming.twins import compiling

FIRST_TOKENS_AT_ONCE = 512
SHARE = 0.9
"""Of the memory that is free which weights may take."""
HIDDEN_SHARE = 0.5
"""And which hidden states may take beside a layer."""


def fits(base: Model, options: CalibrationOptions) -> bool:
    """Whether the base is run as a whole: as the options say, or as it fits into memory."""
    if options.mode != "auto":
        return options.mode == "whole"
    dtype = FLOAT_DTYPES.get(options.dtype or "", auto_dtype(base))
    needed = sum(info.numel for info in base.weights.tensors.values()) * dtype.itemsize
    return needed <= (options.max_memory or SHARE * _room_bytes(options))


def _room_bytes(options: CalibrationOptions) -> int:
    """Free memory where weights go."""
    device = options.device
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device is None and torch.cuda.is_available():
        return sum(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
    return available_bytes()


def whole(this: CalibrationRun, offload: Path | None = None) -> Activations:
    """Calibrate with all weights in memory; `offload`: a folder for those that do not fit."""
    options, tokens = this.options, this.blocks.tokens
    model = _load(this, "bfloat16" if this.is_reference else options.dtype or "auto", offload)
    device = device_of_tokens(model)
    tokens = tokens if device.type == "meta" else tokens.to(device)  # meta: accelerate moves both
    wide = 1.1 * 4 * sum(parameter.numel() for parameter in model.parameters())
    choice = this.choose(model, tokens, in_float32=offload is None and available_bytes() > wide)
    if FLOAT_DTYPES[choice.dtype] != model.dtype:
        del model
        model = _load(this, choice.dtype, offload)
    apply(model, choice)
    try:
        return _run_whole(this, model, tokens, choice)
    except _NothingRan:  # a class that writes into its logits needs them
        return _run_whole(this, model, tokens, choice, with_head=True)


class _NothingRan(Exception):
    """The very first batch failed, with the output head's product left out."""


def _run_whole(
    this: CalibrationRun, model: Any, tokens: torch.Tensor, choice: Choice, *, with_head: bool = False
) -> Activations:
    """The pass of `whole`. Raises _NothingRan: see there; not `with_head`, which computes the head's product."""
    watcher = this.watcher(model, with_head=with_head)
    enough = this.enough(watcher)
    this.progress(0)  # loaded
    done = this.unfinished.restore(enough) if this.unfinished else 0
    done = this.share.begin(done)
    this.progress(tokens[:done].numel())
    has_run = False
    with ExitStack() as stack:
        stack.enter_context(_running(this, model, choice))
        stack.enter_context(watcher.watching())
        for begin, end in this.share.rounds(enough, done, choice.batch_size):
            first, last = this.share.own(begin, end)
            batches = [slice(at, min(at + choice.batch_size, last)) for at in range(first, last, choice.batch_size)]
            failure: CannotRun | None = None
            try:
                for batch in run_batches(model, tokens, batches, watcher, this.fails):
                    has_run = True
                    this.progress(batch.numel())
                    this.share.check()
            except CannotRun as error:
                if has_run or not watcher.leaves_head_out:
                    raise
                failure = error
            if begin == 0:
                watcher.check_finite()  # what overflows mostly does so at once
            if not this.share.add_up(watcher, end, failed=failure is not None):
                raise _NothingRan from failure
            this.progress(tokens[begin:first].numel() + tokens[last:end].numel())
            done = end
            if _is_enough(this, enough, done):
                break
        if this.share.is_first and not watcher.knows_first_tokens:
            with watcher.first_tokens():
                for _ in run_batches(model, tokens, _first_tokens(tokens, done), watcher, this.fails):
                    pass
    return this.finish(watcher, enough, choice, done, model.config._attn_implementation, {"mode": "whole"})


@contextmanager
def _running(this: CalibrationRun, model: Any, choice: Choice) -> Iterator[None]:
    """How a model is run in a pass, whole or layer by layer. Raises InputError: out of memory, with what to do."""
    with (
        compiling() if this.compiles(model) else nullcontext(),
        threads(choice.threads),
        out_of_memory("calibration", this.advice(choice)),
    ):
        yield


def _is_enough(this: CalibrationRun, enough: Enough, done: int) -> bool:
    """Whether so many blocks are enough, as the first process sees it; where not, it keeps their sums now and then."""
    if this.share.told(f"{done}/enough", functools.partial(enough.at, done)):
        return True
    if this.unfinished and this.share.is_first:
        this.unfinished.keep(enough, done)
    return False


def _load(this: CalibrationRun, dtype: str, offload: Path | None) -> Any:
    options = this.options
    model = load(
        this.base,
        dtype=dtype,
        device=options.device,
        exact_caps=not this.is_reference,
        offload=offload,
        max_memory=options.max_memory,
    )
    if this.has_experts:
        model.set_experts_implementation("eager")
    return model


def _first_tokens(tokens: torch.Tensor, blocks: int) -> tuple[torch.Tensor, ...]:
    batches: tuple[torch.Tensor, ...] = tokens[:blocks, :1].split(FIRST_TOKENS_AT_ONCE)
    return batches


class _Through:
    """What is done after each layer of a pass: tell of its tokens, a part of them each time, and keep the sums now and then."""

    def __init__(self, this: CalibrationRun, layers: Layerwise, enough: Enough, begin: int, tokens: int):
        self._this, self._layers, self._enough, self._begin = this, layers, enough, begin
        self._tokens, self._told = tokens, 0

    def __call__(self, done: int) -> None:
        count = len(self._layers.layers)
        now = self._tokens * min(done, count) // count
        self._this.progress(now - self._told)
        self._told = now
        self._this.share.check()
        if (
            self._this.share.keeps_layers
            and self._this.unfinished
            and self._layers.at is not None
            and self._layers.can_be_kept
        ):
            self._this.unfinished.keep_layer(self._enough, self._layers.state, self._begin)


def layerwise(this: CalibrationRun) -> Activations:
    """Calibrate layer by layer, from where an earlier run stopped where that can be done. See `_layerwise`."""
    try:
        return _layerwise(this)
    except _BeginAgain:
        assert this.unfinished is not None
        this.unfinished.forget()
        return _layerwise(this)


class _BeginAgain(Exception):
    """What is kept of a pass cannot be gone on with."""


def _layerwise(this: CalibrationRun) -> Activations:
    """Calibrate with one layer's weights in memory at a time; all of the text that is run before it is looked at goes through
    a layer before the next is read."""
    # A model without weights; where its layers cannot be told apart, the library's own way with the disk.
    options = this.options
    dtype = "bfloat16" if this.is_reference else options.dtype or "auto"
    model = _skeleton(this, auto_dtype(this.base) if dtype == "auto" else FLOAT_DTYPES[dtype])
    stack_of_layers = find_layers(model)
    if not stack_of_layers:
        this.note("its layers cannot be told apart: weights that do not fit into memory wait on disk, which is slow")
        with TemporaryDirectory(prefix="calibration_") as folder:
            return whole(this, Path(folder))
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = this.blocks.tokens.to(device)
    # The settings, by timing its first layer.
    give_back_freed_memory(above=_activation_bytes(model, this.data.block_size * (options.batch_size or max(BATCHES))))
    with (
        Layerwise(this.base, model, device, fails=this.fails) as trial,
        trial.weights.loaded(stack_of_layers[0][1]),
        RowReader(trial.weights),
    ):
        choice = this.choose(model, tokens, in_float32=True)
    if FLOAT_DTYPES[choice.dtype] != model.dtype:
        model = _skeleton(this, FLOAT_DTYPES[choice.dtype])
    apply(model, choice)
    give_back_freed_memory(above=_activation_bytes(model, this.data.block_size * choice.batch_size))
    # Pass after pass, each on as much text as is looked at next, from the layer where an earlier run stopped.
    watcher = this.watcher(model)
    enough = this.enough(watcher)
    with ExitStack() as stack:
        stack.enter_context(_running(this, model, choice))
        waiting = Path(stack.enter_context(TemporaryDirectory(prefix="calibration_")))
        shelf = Shelf(int(options.max_memory or HIDDEN_SHARE * available_bytes()), waiting)
        stack.enter_context(watcher.watching())
        layers = stack.enter_context(
            Layerwise(this.base, model, device, watch=watcher.watch, counts=watcher, shelf=shelf, fails=this.fails)
        )
        this.progress(0)
        done = this.unfinished.restore(enough) if this.unfinished else 0
        hidden = this.unfinished.hidden if this.unfinished and this.share.keeps_layers else {}
        done = this.share.begin(done)
        this.progress(tokens[:done].numel())
        passes = 0
        for begin, end in enough.passes(done):
            part = tokens[slice(*this.share.own(begin, end))]
            through = _Through(this, layers, enough, begin, part.numel())
            batches = part.split(choice.batch_size)
            if hidden and layers.restore(batches, hidden):
                this.note(f"going on at layer {(layers.at or 0) + 1} of {len(layers.layers)}")
                layers.go_on(through)
            elif hidden:
                this.note("what an earlier run kept cannot be gone on with at its layer: begun again")
                raise _BeginAgain
            elif len(part):
                layers.run(batches, through)
            passes, done, hidden = passes + 1, end, {}
            watcher.check_finite()
            this.share.add_up(watcher, end)
            this.progress(tokens[begin:end].numel() - part.numel())
            if _is_enough(this, enough, done):
                break
        if this.share.is_first and not watcher.knows_first_tokens:
            with watcher.first_tokens():
                layers.run(_first_tokens(tokens, done))
    attention = model.config._attn_implementation
    return this.finish(watcher, enough, choice, done, attention, {"mode": "layerwise", "passes": passes})


def _activation_bytes(model: Any, tokens: int) -> int:
    """Bytes that so many tokens take in float32, in which norms and rotations are computed, where a layer is widest."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    inside = [one for _, layer in find_layers(model) for one in layer.parameters() if id(one) not in tables]
    return 4 * tokens * max((max(weight.shape[-2:]) for weight in inside if weight.ndim), default=0)


def _skeleton(this: CalibrationRun, dtype: torch.dtype) -> Any:
    model = build_skeleton(this.base, dtype, exact_caps=not this.is_reference)
    if this.has_experts:
        model.set_experts_implementation("eager")
    return model
