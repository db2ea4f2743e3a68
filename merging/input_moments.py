"""Second moments of the inputs of every model's weights, taken layer by layer while all models run in step on their own texts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from checkpoints.errors import InputError, first_line
from checkpoints.model import Model
from checkpoints.placements import Placement
from checkpoints.problems import Problems
from checkpoints.settings import setting
from checkpoints.staging import Stage
from forward.layers import find_layers
from forward.layerwise import Layerwise, in_step
from forward.loading import out_of_memory, quiet_transformers
from forward.parts import Use
from forward.skeleton import Weights, build_skeleton
from forward.watch import Watch
from merging.kept_hidden import KeptHidden
from merging.merged_source import MergedSource, merged_whole
from merging.methods.regmean import InputMoments, Projected, RegMean
from merging.model_texts import ModelText
from streaming.stream import Merger, PlannedTensor, StreamOptions

if TYPE_CHECKING:
    from streaming.processes import Processes

ROWS_AT_ONCE = 4096
"""Of an input that are kept before they are multiplied: one product of many rows costs far less than many of few."""


Made = dict[Any, tuple[Sequence[InputMoments], Merger]]
"""What merges weights of one input, by the ids of its moments, which are kept so that no others have them."""


@dataclass(frozen=True)
class _Rows:
    """An input that was seen, whichever weights share it.

    Attributes:
        x, version: as it came; holding it keeps its memory from being reused.
        rest, first: copies of its rows: all but those of the first token, and those.
    """

    x: torch.Tensor
    version: int
    rest: torch.Tensor
    first: torch.Tensor


@dataclass
class _Sum:
    """Sums over tokens of one use of a weight.

    Attributes:
        waiting: inputs that are not in the sums yet.
        rest, first: of x x^T, `[in, in]` float64, or of x^2, `[in]`, over tokens after the first of a document, and over first ones;
            never changed, so that uses of one input share them.
        tokens, firsts: how many are in them.
    """

    waiting: list[_Rows]
    rest: torch.Tensor
    first: torch.Tensor
    tokens: int = 0
    firsts: int = 0


class Moments:
    """Adds up x x^T of the inputs that a `forward.watch.Watch` sees.

    Args:
        diagonal: parameters of whose inputs x^2 is enough.

    Attributes:
        block: `(documents, tokens)` of what runs; see `forward.whole.Counts`.
        is_open: whether what is seen counts.
    """

    def __init__(self, diagonal: Collection[str] = ()):
        self.block: tuple[int, int] | None = None
        self.is_open = True
        self._diagonal = frozenset(diagonal)
        self._sums: dict[Use, _Sum] = {}
        self._last: _Rows | None = None
        self._multiplied: dict[tuple[bool, tuple[int, ...]], tuple[list[_Rows], torch.Tensor, torch.Tensor]] = {}
        self._means: dict[tuple[int, ...], tuple[list[torch.Tensor], InputMoments]] = {}

    def see(self, use: Use, x: torch.Tensor) -> None:
        """See `forward.watch.See`. An input that several weights share is multiplied once."""
        if not self.is_open:
            return
        if self._last is None or self._last.x is not x or self._last.version != x._version:
            rows = x.detach().reshape(-1, x.shape[-1])
            firsts = len(rows) // self.block[1] if self.block and x.ndim > 1 and self._is_in_order(x) else 0
            # One document at a time runs, so that the first token's rows come first.
            self._last = _Rows(x, x._version, rows[firsts:].clone(), rows[:firsts].clone())
        if use not in self._sums:
            width = x.shape[-1]
            zeros = torch.zeros(
                width if use.parameter in self._diagonal else (width, width), dtype=torch.float64, device=x.device
            )
            self._sums[use] = _Sum([], zeros, zeros)
        sums = self._sums[use]
        sums.waiting.append(self._last)
        if sum(len(one.rest) for one in sums.waiting) >= ROWS_AT_ONCE:
            self._add_up(use)

    def _add_up(self, use: Use) -> None:
        """Put what waits of a use into its sums."""
        sums = self._sums[use]
        if not sums.waiting:
            return
        key = (use.parameter in self._diagonal, tuple(map(id, sums.waiting)))
        if key not in self._multiplied:
            rest, first = (torch.cat(rows).double() for rows in zip(*((one.rest, one.first) for one in sums.waiting), strict=True))  # fmt: skip
            made = [rows.square().sum(dim=0) if key[0] else rows.T @ rows for rows in (rest, first)]
            self._multiplied = {
                key: (sums.waiting, made[0], made[1])
            }  # the last alone: uses of one input come together
        _, rest, first = self._multiplied[key]
        is_new = not sums.tokens and not sums.firsts
        sums.rest, sums.first = (rest, first) if is_new else (sums.rest + rest, sums.first + first)
        sums.tokens += sum(len(one.rest) for one in sums.waiting)
        sums.firsts += sum(len(one.first) for one in sums.waiting)
        sums.waiting = []

    def _is_in_order(self, x: torch.Tensor) -> bool:
        """Whether the rows of an input are those of the tokens, in their order."""
        assert self.block is not None
        documents, length = self.block
        return tuple(x.shape[:2]) == (documents, length) if x.ndim > 2 else len(x) == documents * length

    def clear(self) -> None:
        """Forget what was added up."""
        self._sums.clear()
        self._multiplied.clear()
        self._means.clear()
        self._last = None

    def of(self, placement: Placement, shape: Sequence[int]) -> InputMoments | None:
        """The moments of a stored tensor's input, the same object for weights of one input; None where none was seen that has all of
        its channels.

        Args:
            placement: of the tensor.
            shape: its own.
        """
        if placement.input_dim is None or placement.input_dim not in placement.axes:
            return None
        axis, width = placement.axes.index(placement.input_dim), shape[placement.input_dim]
        uses = [
            use
            for use in self._sums
            if use.parameter == placement.parameter and use.axis == axis and use.channels == (0, width)
        ]
        if not uses:
            return None
        for use in self._sums:  # in the order of the pass, where weights of one input stand together
            self._add_up(use)
        self._multiplied.clear()
        if placement.kind != "experts":
            return self._mean([self._sums[use] for use in uses])
        # A router's rows do not tell which of them are first tokens, whatever they were for one document.
        experts = [placement.expert] if placement.expert is not None else list(range(shape[0]))
        each = [
            self._joined([self._sums[use] for use in uses if _has(use, expert)], self._sums[uses[0]])
            for expert in experts
        ]
        return InputMoments(torch.stack(each), torch.zeros_like(torch.stack(each))) if placement.expert is None else (
            InputMoments(each[0], torch.zeros_like(each[0]))
        )  # fmt: skip

    def _mean(self, sums: Sequence[_Sum]) -> InputMoments:
        """Means of several sums together."""
        whole = [moments.rest for moments in sums]
        key = tuple(map(id, whole))
        if key not in self._means:
            tokens, firsts = sum(moments.tokens for moments in sums), sum(moments.firsts for moments in sums)
            rest = torch.stack(whole).sum(dim=0) / max(1, tokens)
            first = torch.stack([moments.first for moments in sums]).sum(dim=0) / max(1, firsts)
            self._means[key] = (whole, InputMoments(rest, first))  # as long as they are there, no other has their id
        return self._means[key][1]

    @staticmethod
    def _joined(sums: Sequence[_Sum], like: _Sum) -> torch.Tensor:
        """The mean over all tokens of several sums together; zeros, shaped like those of another, of none."""
        if not sums:
            return torch.zeros_like(like.rest)
        total = torch.stack([moments.rest + moments.first for moments in sums]).sum(dim=0)
        return total / max(1, sum(moments.tokens + moments.firsts for moments in sums))


def _has(use: Use, expert: int) -> bool:
    return use.ranges[0][0] <= expert < use.ranges[0][1]


@dataclass(frozen=True)
class Matrix:
    """A tensor that is merged by its inputs' moments.

    Attributes:
        name: of the tensor.
        input_dim: its dimension that runs over the input channels.
        is_stacked: whether it is several experts', with moments each.
        count: models merged; the moments of the base may stand behind theirs.
    """

    name: str
    input_dim: int
    is_stacked: bool
    count: int

    def complete(self, moments: Sequence[InputMoments | None], method: RegMean) -> list[InputMoments]:
        """Those of every model, zeros where it saw none, as the method wants them; empty where no model saw any."""
        if method.moments == "diagonal":  # of a part of a parameter, say, of which another part needs all
            moments = [one and one.diagonal(self.is_stacked) for one in moments]
        seen = next((one for one in moments[: self.count] if one is not None), None)
        if seen is None:
            return []
        empty = replace(seen, rest=torch.zeros_like(seen.rest), first=torch.zeros_like(seen.first))
        return [empty if one is None else one for one in moments]

    def projected(self, moments: Sequence[InputMoments], method: RegMean) -> Projected:
        """What merges it by complete moments. Raises InputError: see `RegMean.with_moments`."""
        base = moments[-1] if len(moments) > self.count else None
        return method.with_moments(moments[: self.count], self.input_dim, self.name, base)


class MomentsPass:
    """Runs all models layer by layer, and gives the tensors of each layer with their moments, ready to be merged.

    Args:
        models: fine-tuned ones, in the order of the tensors' inputs, and the base behind them where its inputs count.
        texts: of each,
            its own.
        options: of the stream: where models run, and layers are merged.
        tensors: the whole plan.
        has_base: whether the last model is the base.
        processes: that share the run; each runs some of the models, or all where a layer waits for the merge of the one before.
        is_merged: whether a layer's inputs are what the layers give that are merged already, not the model's own.

    Attributes:
        is_merged: as given.
    """

    def __init__(
        self,
        models: Sequence[Model],
        texts: Sequence[ModelText],
        options: StreamOptions,
        tensors: Sequence[PlannedTensor],
        *,
        has_base: bool = False,
        is_merged: bool = False,
        processes: Processes | None = None,
    ):
        self._processes = processes
        self._models, self._texts, self._options, self._tensors = models, texts, options, tensors
        self._device, self._has_base, self.is_merged = options.device, has_base, is_merged

    @property
    def models(self) -> int:
        """How many are run."""
        return len(self._models)

    @property
    def tensors(self) -> Sequence[PlannedTensor]:
        """The whole plan."""
        return self._tensors

    def check(self) -> int:
        """Raise Refusals: models that cannot be run layer by layer, or lack weights; text that is too short for a merge without a ridge.

        Returns: how many tensors get moments.
        """
        problems = Problems()
        counts: dict[str, int] = {}
        with problems.collect(), quiet_transformers():
            counts = self._layers_of(self._tensors, self._skeleton(self._models[0]))
        for model in self._models:
            if model.architecture.missing:
                problems.add(
                    f"{model.label}: expected a tensor for {model.architecture.missing[0]}, got none, so that it cannot be run. Use a complete model."
                )
        tokens = sum(text.tokens for text in self._texts[: len(self._texts) - self._has_base])
        for tensor in self._tensors:
            placements = self._placements(tensor)
            if tensor.spec.name not in counts or placements is None or placements[0].input_dim is None:
                continue
            method, width = tensor.method, tensor.spec.shape[placements[0].input_dim]
            assert isinstance(method, RegMean)
            if method.ridge == 0.0 and method.moments == "full" and method.gram_scale == 1.0 and tokens < width:
                problems.add(
                    f"{setting('ridge', 0)}: {tensor.spec.name}: the second moments of {tokens} tokens have a rank below its {width} input channels. "
                    f"Give more text ({setting('data_tokens')}), or a {setting('ridge')} above 0."
                )
                break
        problems.raise_if_any()
        return len(counts)

    def parts(self, todo: Sequence[PlannedTensor], stage: Stage) -> Generator[Sequence[PlannedTensor]]:
        """First what needs no moments, then layer after layer; see `streaming.work.Work.parts`.

        Raises: InputError: a model cannot be run; moments that are not finite.
        """
        with ExitStack() as stack:
            stack.enter_context(quiet_transformers())
            stack.enter_context(out_of_memory("the layer-by-layer pass", "Give less text"))
            skeletons = [self._skeleton(model) for model in self._models]
            layer_of = self._layers_of(todo, skeletons[0])
            yield [tensor for tensor in todo if tensor.spec.name not in layer_of]
            if not layer_of:
                return
            if self._processes is not None and not self.is_merged:
                yield from self._parts_together(stack, todo, layer_of, skeletons, stage, self._processes)
                return
            sinks = [Moments(diagonal) for diagonal in self._diagonal(self._tensors if self.is_merged else todo)]
            merged = self._merged_sources() if self.is_merged else [None] * len(self._models)
            running = [
                stack.enter_context(self._layerwise(stack, *parts))
                for parts in zip(self._models, skeletons, sinks, merged, strict=True)
            ]
            wanted = set(layer_of.values())
            texts, kept = [text.documents_on(self._device) for text in self._texts], KeptHidden(stage)
            if not kept.restore(running, texts, min(wanted)):
                for layers, text in zip(running, texts, strict=True):
                    layers.start(text)
            steps = self._merged_steps(stack, running, skeletons, sinks, merged) if self.is_merged else in_step(running)
            for sink in sinks:
                sink.is_open = self.is_merged or running[0].at in wanted
            for layer in steps:
                if layer in wanted:
                    here = [tensor for tensor in todo if layer_of.get(tensor.spec.name) == layer]
                    made: Made = {}
                    yield [self._prepared(tensor, sinks, made) for tensor in here]
                    wanted.discard(layer)
                if not wanted:
                    return
                if self.is_merged:
                    next(steps)
                for sink in sinks:
                    sink.clear()
                    sink.is_open = self.is_merged or running[0].at in wanted
                if running[0].at is not None and self._processes is None:
                    kept.keep(running[0].at, running)

    def _parts_together(
        self,
        stack: ExitStack,
        todo: Sequence[PlannedTensor],
        layer_of: Mapping[str, int],
        skeletons: Sequence[Any],
        stage: Stage,
        processes: Processes,
    ) -> Generator[Sequence[PlannedTensor]]:
        """The layers of `parts` where several processes share the run: each runs some of the models, from the first layer on."""
        from merging.moments_together import MomentsTogether

        together = MomentsTogether(processes, stage, [text.tokens for text in self._texts])
        diagonal = self._diagonal(todo)
        sinks = {model: Moments(diagonal[model]) for model in together.own}
        running = [
            stack.enter_context(self._layerwise(stack, self._models[model], skeletons[model], sink, None))
            for model, sink in sinks.items()
        ]
        wanted = set(layer_of.values())
        for model, layers in zip(sinks, running, strict=True):
            sinks[model].is_open = 0 in wanted
            layers.start(self._texts[model].documents_on(self._device))
        for layer in range(max(wanted) + 1):
            processes.check()
            for layers in running:
                layers.advance()
            if layer in wanted:
                here = [tensor for tensor in todo if layer_of.get(tensor.spec.name) == layer]
                own = {
                    model: {tensor.spec.name: self._seen(tensor, model, sinks[model]) for tensor in here}
                    for model in sinks
                }
                known = together.exchange(layer, own)
                made: Made = {}
                yield [self._with_moments(tensor, [one[tensor.spec.name] for one in known], made) for tensor in here]
            for sink in sinks.values():
                sink.clear()
                sink.is_open = layer + 1 in wanted

    def _seen(self, tensor: PlannedTensor, model: int, sink: Moments) -> InputMoments | None:
        """The moments of one model's input of a tensor."""
        placements = self._placements(tensor)
        assert placements is not None
        return sink.of(placements[model], tensor.spec.shape)

    def _merged_sources(self) -> list[MergedSource]:
        """The merge so far, as each model names its tensors."""
        return [
            MergedSource(model.weights, self._tensors, index, self._options) for index, model in enumerate(self._models)
        ]

    def _merged_steps(
        self,
        stack: ExitStack,
        running: Sequence[Layerwise],
        skeletons: Sequence[Any],
        sinks: Sequence[Moments],
        merged: Sequence[MergedSource | None],
    ) -> Iterator[int]:
        """Have all models look at what comes behind the layers that are merged, layer after layer.

        Gives each layer's index twice: when its moments are there, and when the layer is merged and everything has gone through it.
        """
        layer_of = self._layers_of(self._tensors, skeletons[0])
        names = [name for name, _ in running[0].layers]
        own = [Weights(model, skeleton, self._device) for model, skeleton in zip(self._models, skeletons, strict=True)]
        for weights in own:
            stack.callback(weights.close)
        while (at := running[0].at) is not None:
            for layers, weights in zip(running, own, strict=True):
                layers.look(weights)
            yield at
            made: Made = {}
            here = [tensor for tensor in self._tensors if self._is_in_layer(tensor, names[at])]
            whole = merged_whole(
                [
                    self._prepared(tensor, sinks, made) if layer_of.get(tensor.spec.name) == at else tensor
                    for tensor in here
                ],
                self._options,
            )
            for sink in sinks:
                sink.is_open = False
            for layers, source in zip(running, merged, strict=True):
                assert source is not None
                source.hold(whole)
                layers.advance()
            yield at

    def _is_in_layer(self, tensor: PlannedTensor, layer: str) -> bool:
        """Whether the first model's tensor belongs to a layer, by the name of its module."""
        model = self._models[0]
        ref = tensor.inputs[0] if tensor.inputs else tensor.base
        placement = model.architecture.placements.get(ref.name)
        return placement is not None and placement.parameter.startswith(f"{layer}.")

    def _skeleton(self, model: Model) -> Any:
        skeleton = build_skeleton(model, torch.float32)
        if any(placement.kind == "experts" for placement in model.architecture.placements.values()):
            skeleton.set_experts_implementation("eager")
        return skeleton

    def _layerwise(
        self, stack: ExitStack, model: Model, skeleton: Any, sink: Moments, merged: MergedSource | None
    ) -> Layerwise:
        """A model that is watched while it runs, or the merge in its place; closed with the stack."""
        parameters = {
            placement.parameter
            for placement in model.architecture.placements.values()
            if placement.input_dim is not None
        }
        watch = stack.enter_context(Watch(skeleton, sink.see, products=parameters))

        def fails(error: Exception) -> Exception:
            return InputError(
                f"{model.label}: a {model.architecture.model_class} cannot be run on its text: {type(error).__name__}: {first_line(error)}. Use another method."
            )

        runs = model if merged is None else replace(model, weights=cast(Any, merged))
        return Layerwise(
            runs, skeleton, self._device, watch=watch, counts=sink, fails=fails, reads_ahead=merged is None
        )

    def _layers_of(self, todo: Sequence[PlannedTensor], skeleton: Any) -> dict[str, int]:
        """Output tensor -> its layer, of those that get moments: matrices inside the layers, which every model stores as they are."""
        layers = find_layers(skeleton)
        if not layers:
            raise InputError(f"{self._models[0].label}: its layers cannot be told apart. Use another method.")
        found = {}
        for tensor in todo:
            placements = self._placements(tensor)
            if tensor.spec.is_vector or placements is None:
                continue
            inside = [index for index, (name, _) in enumerate(layers) if placements[0].parameter.startswith(f"{name}.")]
            if inside and all(placement.input_dim is not None for placement in placements):
                found[tensor.spec.name] = inside[0]
        return found

    def _placements(self, tensor: PlannedTensor) -> list[Placement] | None:
        """Where every model's tensor ends up in its model; None where one is not merged or not stored as the output has it."""
        if not isinstance(tensor.method, RegMean):
            return None
        placements = []
        refs = (*tensor.inputs, *([tensor.base] if self._has_base else []))
        for model, ref in zip(self._models, refs, strict=True):
            placement = model.architecture.placements.get(ref.name) if ref.source is model.weights else None
            if placement is None:
                return None
            placements.append(placement)
        return placements

    def _diagonal(self, todo: Sequence[PlannedTensor]) -> list[set[str]]:
        """The parameters of each model of whose inputs nothing but x^2 is asked for."""
        asked: list[dict[str, set[str]]] = [{} for _ in self._models]
        for tensor in todo:
            for found, placement in zip(asked, self._placements(tensor) or (), strict=False):
                assert isinstance(tensor.method, RegMean)
                found.setdefault(placement.parameter, set()).add(tensor.method.moments)
        return [{name for name, kinds in found.items() if kinds == {"diagonal"}} for found in asked]

    def _prepared(self, tensor: PlannedTensor, sinks: Sequence[Moments], made: Made) -> PlannedTensor:
        """A tensor with its moments; as it is where no model's pass has used it. `made`: what merges the weights of an input, once made."""
        return self._with_moments(tensor, [self._seen(tensor, at, sink) for at, sink in enumerate(sinks)], made)

    def _with_moments(self, tensor: PlannedTensor, moments: Sequence[InputMoments | None], made: Made) -> PlannedTensor:
        """See `_prepared`; `moments`: of every model."""
        matrix, method = self.matrix(tensor), tensor.method
        assert isinstance(method, RegMean)
        known = matrix.complete(moments, method)
        if not known:
            return tensor
        key = (*map(id, known), method, matrix.input_dim == len(tensor.spec.shape) - 1)
        if key not in made:
            made[key] = (known, matrix.projected(known, method))
        return replace(tensor, method=made[key][1])

    def matrix(self, tensor: PlannedTensor) -> Matrix:
        """What a tensor that gets moments is."""
        placements = self._placements(tensor)
        assert placements is not None
        assert placements[0].input_dim is not None
        is_stacked = placements[0].kind == "experts" and len(tensor.spec.shape) > 2
        return Matrix(tensor.spec.name, placements[0].input_dim, is_stacked, len(tensor.inputs))

    def take(self, is_there: Callable[[int], bool]) -> Generator[tuple[int, list[dict[str, InputMoments | None]]]]:
        """Run all models once, and give every layer's moments: of each model, those of each tensor's input; see `parts`.

        Args:
            is_there: whether a layer's are known, which are not taken then: it comes with nothing.

        Raises: InputError: a model cannot be run.
        """
        with ExitStack() as stack:
            stack.enter_context(quiet_transformers())
            stack.enter_context(out_of_memory("the layer-by-layer pass", "Give less text"))
            skeletons = [self._skeleton(model) for model in self._models]
            layer_of = self._layers_of(self._tensors, skeletons[0])
            sinks = [Moments(diagonal) for diagonal in self._diagonal(self._tensors)]
            running = [
                stack.enter_context(self._layerwise(stack, *parts, None))
                for parts in zip(self._models, skeletons, sinks, strict=True)
            ]
            for sink in sinks:
                sink.is_open = not is_there(0)
            for layers, text in zip(running, self._texts, strict=True):
                layers.start(text.documents_on(self._device))
            for layer in in_step(running):
                is_new = not is_there(layer)
                here = [tensor for tensor in self._tensors if is_new and layer_of.get(tensor.spec.name) == layer]
                by_model = [
                    {tensor.spec.name: self._seen(tensor, model, sink) for tensor in here}
                    for model, sink in enumerate(sinks)
                ]
                yield layer, by_model
                for sink in sinks:
                    sink.clear()
                    sink.is_open = not is_there(layer + 1)

    @staticmethod
    def merged_by(method: Merger | None, tensor: PlannedTensor) -> PlannedTensor:
        """A tensor that `parts` gave, as a method merges it that differs in what no moments are needed for."""
        if isinstance(tensor.method, Projected) and isinstance(method, RegMean):
            return replace(tensor, method=replace(tensor.method, lambda_=method.lambda_))
        return replace(tensor, method=method)

    def layer_of(self) -> dict[str, int]:
        """The tensors that get moments -> their layers. Raises InputError: layers that cannot be told apart."""
        with quiet_transformers():
            return self._layers_of(self._tensors, self._skeleton(self._models[0]))


def texts_as_json(models: Sequence[Model], texts: Sequence[ModelText]) -> list[dict[str, Any]]:
    """What the models were run on, for JSON."""
    return [
        {"model": model.label, "documents": len(text.documents), "tokens": text.tokens, "digest": text.digest()}
        for model, text in zip(models, texts, strict=True)
    ]
