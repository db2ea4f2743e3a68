"""Second moments of the inputs of every model's weights, taken layer by layer while all models run in step on their own texts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from forward.skeleton import Weights, build_skeleton
from forward.watch import Watch
from merging.kept_hidden import KeptHidden
from merging.merged_source import MergedSource, merged_whole
from merging.methods.regmean import InputMoments, Prepared, RegMean
from merging.model_texts import ModelText
from merging.moments import Moments
from streaming.stream import Merger, PlannedTensor, StreamOptions

if TYPE_CHECKING:
    from streaming.processes import Processes

Made = dict[Any, tuple[Sequence[InputMoments], Merger]]
"""What merges weights of one input, by the ids of its moments, which are kept so that no others have them."""


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

    def prepared(self, moments: Sequence[InputMoments], method: RegMean) -> Prepared:
        """What merges it by complete moments. Raises InputError: see `RegMean.with_moments`."""
        base = moments[-1] if len(moments) > self.count else None
        return method.with_moments(moments[: self.count], self.input_dim, self.name, base)


@dataclass(frozen=True)
class _Running:
    """Models that run side by side.

    Attributes:
        layers: each model's pass.
        sinks: what is seen of each.
    """

    layers: Sequence[Layerwise]
    sinks: Sequence[Moments]

    def expect(self, *, is_wanted: bool) -> None:
        """Forget what was seen; what comes counts where it is wanted."""
        for sink in self.sinks:
            sink.clear()
            sink.is_open = is_wanted


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
        with self._opening() as stack:
            skeletons = [self._skeleton(model) for model in self._models]
            layer_of = self._layers_of(todo, skeletons[0])
            yield [tensor for tensor in todo if tensor.spec.name not in layer_of]
            if not layer_of:
                return
            if self._processes is not None and not self.is_merged:
                yield from self._parts_together(stack, todo, layer_of, skeletons, stage, self._processes)
                return
            merged = self._merged_sources() if self.is_merged else [None] * len(self._models)
            run = self._run(stack, skeletons, self._tensors if self.is_merged else todo, range(len(skeletons)), merged)
            wanted = set(layer_of.values())
            texts, kept = [text.documents_on(self._device) for text in self._texts], KeptHidden(stage)
            if not kept.restore(run.layers, texts, min(wanted)):
                for layers, text in zip(run.layers, texts, strict=True):
                    layers.start(text)
            steps = self._merged_steps(stack, run, skeletons, merged) if self.is_merged else in_step(run.layers)
            run.expect(is_wanted=self.is_merged or run.layers[0].at in wanted)
            for layer in steps:
                if layer in wanted:
                    here = [tensor for tensor in todo if layer_of.get(tensor.spec.name) == layer]
                    made: Made = {}
                    yield [self._prepared(tensor, run.sinks, made) for tensor in here]
                    wanted.discard(layer)
                if not wanted:
                    return
                if self.is_merged:
                    next(steps)
                run.expect(is_wanted=self.is_merged or run.layers[0].at in wanted)
                if run.layers[0].at is not None and self._processes is None:
                    kept.keep(run.layers[0].at, run.layers)

    @contextmanager
    def _opening(self) -> Iterator[ExitStack]:
        """What every pass runs within."""
        with ExitStack() as stack:
            stack.enter_context(quiet_transformers())
            stack.enter_context(out_of_memory("the layer-by-layer pass", "Give less text"))
            yield stack

    def _run(
        self,
        stack: ExitStack,
        skeletons: Sequence[Any],
        tensors: Sequence[PlannedTensor],
        models: Iterable[int],
        merged: Sequence[MergedSource | None] | None = None,
    ) -> _Running:
        """Some of the models, or the merge in the place of each, watched for the moments of tensors; closed with the stack."""
        diagonal = self._diagonal(tensors)
        sinks = {model: Moments(diagonal[model]) for model in models}
        layers = [
            stack.enter_context(
                self._layerwise(stack, self._models[model], skeletons[model], sink, merged[model] if merged else None)
            )
            for model, sink in sinks.items()
        ]
        return _Running(layers, list(sinks.values()))

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
        run = self._run(stack, skeletons, todo, together.own)
        wanted = set(layer_of.values())
        run.expect(is_wanted=0 in wanted)
        for model, layers in zip(together.own, run.layers, strict=True):
            layers.start(self._texts[model].documents_on(self._device))
        for layer in range(max(wanted) + 1):
            processes.check()
            for layers in run.layers:
                layers.advance()
            if layer in wanted:
                here = [tensor for tensor in todo if layer_of.get(tensor.spec.name) == layer]
                known = together.exchange(layer, dict(zip(together.own, self._all_seen(here, together.own, run), strict=True)))  # fmt: skip
                made: Made = {}
                yield [self._with_moments(tensor, [one[tensor.spec.name] for one in known], made) for tensor in here]
            run.expect(is_wanted=layer + 1 in wanted)

    def _all_seen(
        self, tensors: Sequence[PlannedTensor], models: Iterable[int], run: _Running
    ) -> list[dict[str, InputMoments | None]]:
        """Of each model that runs, the moments of each tensor's input."""
        return [
            {tensor.spec.name: self._seen(tensor, model, sink) for tensor in tensors}
            for model, sink in zip(models, run.sinks, strict=True)
        ]

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
        run: _Running,
        skeletons: Sequence[Any],
        merged: Sequence[MergedSource | None],
    ) -> Iterator[int]:
        """Have all models look at what comes behind the layers that are merged, layer after layer.

        Gives each layer's index twice: when its moments are there, and when the layer is merged and everything has gone through it.
        """
        layer_of = self._layers_of(self._tensors, skeletons[0])
        names = [name for name, _ in run.layers[0].layers]
        own = [Weights(model, skeleton, self._device) for model, skeleton in zip(self._models, skeletons, strict=True)]
        for weights in own:
            stack.callback(weights.close)
        while (at := run.layers[0].at) is not None:
            for layers, weights in zip(run.layers, own, strict=True):
                layers.look(weights)
            yield at
            made: Made = {}
            here = [tensor for tensor in self._tensors if self._is_in_layer(tensor, names[at])]
            whole = merged_whole(
                [
                    self._prepared(tensor, run.sinks, made) if layer_of.get(tensor.spec.name) == at else tensor
                    for tensor in here
                ],
                self._options,
            )
            run.expect(is_wanted=False)
            for layers, source in zip(run.layers, merged, strict=True):
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
            made[key] = (known, matrix.prepared(known, method))
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
        with self._opening() as stack:
            skeletons = [self._skeleton(model) for model in self._models]
            layer_of = self._layers_of(self._tensors, skeletons[0])
            models = range(len(self._models))
            run = self._run(stack, skeletons, self._tensors, models)
            run.expect(is_wanted=not is_there(0))
            for layers, text in zip(run.layers, self._texts, strict=True):
                layers.start(text.documents_on(self._device))
            for layer in in_step(run.layers):
                is_new = not is_there(layer)
                here = [tensor for tensor in self._tensors if is_new and layer_of.get(tensor.spec.name) == layer]
                yield layer, self._all_seen(here, models, run)
                run.expect(is_wanted=not is_there(layer + 1))

    @staticmethod
    def merged_by(method: Merger | None, tensor: PlannedTensor) -> PlannedTensor:
        """A tensor that `parts` gave, as a method merges it that differs in what no moments are needed for."""
        if isinstance(tensor.method, Prepared) and isinstance(method, RegMean):
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
