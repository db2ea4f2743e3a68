"""A search from request to report: prepare, try candidates, compare the best with what they have to beat, write."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aim.activations import Activations, load_activations
from aim.calibrate import CalibrationOptions, calibrate, check_runs_on_text, read_blocks
from aim.choices import Calibration
from aim.passes import fits
from checkpoints.errors import AlreadyComplete, InputError, Interrupted
from checkpoints.escaping import markdown_code
from checkpoints.model import Model, close_all, open_and_plan
from checkpoints.problems import Problems
from checkpoints.provenance import describe_input, versions
from checkpoints.save_path import check_save_path
from checkpoints.settings import setting, shown
from checkpoints.source import FLOAT_DTYPES, dtype_name
from forward.loading import auto_dtype, load, quiet_transformers
from forward.tuning import Choice, apply, choose, is_choice, is_worth_timing
from merging.merge_work import prepare as prepare_merge
from merging.plan import make_plan
from merging.recipe import source_key
from search.beforehand import Beforehand, look_ahead
from search.candidates import Candidate, Candidates, Place, Seconds
from search.goals import Losses
from search.held_out import Rival, Row, as_text, compare, names_of, rivals_of, verdict
from search.kept import keep_computed
from search.layer_by_layer import LayerByLayer
from search.memory import LoadedModel
from search.model_data import with_data
from search.report import draw, goals_as_json, importances, write_recipe, write_report, write_trials
from search.request import SearchRequest
from search.space import Space, Suggest
from search.study import LOSSES, RECIPE, RUNGS, Evaluation, Study, import_optuna
from search.texts import Document, Part, Texts, read_texts
from streaming.console import Console
from streaming.output import DEFAULT_SHARD_BYTES, RunOptions
from streaming.stream import StreamOptions

if TYPE_CHECKING:
    from search.benchmarks import Benchmarks

ACTIVATIONS = "activations.safetensors"
INPUTS, HELD_OUT, CHOICE = "inputs", "held_out", "choice"
CANDIDATES_COMPARED = 3
"""The best so many of a search for one goal are scored on the held-out texts; of a front, so many more."""
FRONT_COMPARED = 8


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        folder: of the study.
        recipe: of the best candidate, as a file has it.
        rows: of the comparison on the held-out texts, the best candidate first.
        lines: what may be said of it.
        seconds: where this run's time went.
    """

    folder: Path
    recipe: Mapping[str, Any]
    rows: Sequence[Row]
    lines: Sequence[str]
    seconds: Seconds = field(default_factory=Seconds)


@dataclass
class Prepared:
    """A search that can be run.

    Attributes:
        opened: the inputs, the base first; keys: how recipes name them.
        texts: documents and items of all tasks.
        benchmarks: what items are asked and graded with; None without any.
        probes: of each method its untuned recipe, read.
        beforehand: what methods that run models find out once.
    """

    request: SearchRequest
    space: Space
    opened: list[Model]
    keys: list[Any]
    texts: Texts
    probes: Mapping[str, Candidate]
    beforehand: Beforehand
    benchmarks: Benchmarks | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides what a candidate scores."""
        return {
            "space": self.space.as_json(),
            "goals": [goal.name for goal in self.request.goals],
            "texts": self.texts.digest(),
            "inputs": [describe_input(model, "outputs")["fingerprint"] for model in self.opened],
            **self.beforehand.as_json(),
            **({"benchmarks": dataclasses.asdict(self.request.evaluation)} if self.benchmarks is not None else {}),
            "stops_early": self.request.stops_early and len(self.request.goals) == 1,
            "device": self.request.device.type,
            "versions": {**versions(), "optuna": import_optuna().__version__},
        }

    def as_json(self) -> dict[str, Any]:
        """The plan for programs."""
        return {
            "refusals": [],
            "searches": [{"entry": free.name, "values": free.as_text()} for free in self.space.free],
            "goals": goals_as_json(self.request.goals),
            "texts": self.texts.as_json(),
            **self.beforehand.as_json(),
            "bytes_of_moments": self.beforehand.nbytes,
            "budget": {"trials": self.request.budget.trials, "minutes": self.request.budget.minutes},
        }

    def as_text(self) -> str:
        """The plan for people."""
        lines = [f"searches, for {', '.join(goal.text for goal in self.request.goals)}:", *self.space.as_text()]
        for part, tasks in self.texts.as_json().items():
            counts = [f"{task} {one['documents']} ({one['tokens']:,} tokens)" for task, one in tasks.items()]
            lines.append(f"texts to {'search with' if part == 'search' else 'score the best on'}: {', '.join(counts)}")
        if self.benchmarks is not None:
            lines += [f"note: {note}" for note in self.benchmarks.graders.notes]
        lines += map(str, self.beforehand.lines)
        if self.texts.twice:
            lines.append(f"note: {self.texts.twice} texts came more than once, and count once.")
        lines.append(f"ends after {self.request.budget.as_text()}")
        return "\n".join(lines)

    def close(self) -> None:
        """Close the inputs, and what grades."""
        if self.benchmarks is not None:
            self.benchmarks.resources.close()
        close_all(self.opened)


def prepare(request: SearchRequest) -> Prepared:
    """Open the models, read the texts, and plan the untuned recipe of every method; nothing is written.

    Raises: Refusals: everything that does not fit.
    """
    problems = Problems()
    space: Space | None = None
    probes: dict[str, Candidate] = {}
    with problems.collect():
        import_optuna()
    with problems.collect():
        space = Space(request.tree, request.where)
    for method in space.methods if space else ():
        assert space is not None
        values = space.defaults(method)
        with problems.collect():
            probes[method] = request.read(space.choose(_given(values)))
            request.read(space.untuned(method))
            if probes[method].recipe.base_model is None or probes[method].recipe.is_sliced:
                raise InputError(
                    f"{request.where}: expected a base_model and whole models, got others. A search needs them."
                )
    if request.stops_early and len(request.goals) > 1:
        problems.notes.append("several goals: no candidate is given up early, as there is no one number to tell by.")
    problems.raise_if_any()
    assert space is not None
    found = space
    first = next(iter(probes.values()))

    def plan(opened: list[Model]) -> Prepared:
        texts: list[Texts] = []
        inner = Problems()
        for candidate in probes.values():
            with inner.collect():
                _check_shapes(candidate, opened)
        with inner.collect(), quiet_transformers():
            check_runs_on_text(opened[0])
            texts.append(read_texts(opened[0], request.texts, share=request.held_out, documents=request.documents))
        benchmarks: list[Benchmarks] = []
        if request.benchmarks:
            with inner.collect(), quiet_transformers():
                benchmarks.append(_read_benchmarks(opened[0], request))
        if request.save_path is not None:
            folders = [folder for model in opened for folder in model.folders]
            inner.extend(check_save_path(request.save_path, folders, overwrite=False))
        if inner:
            for one in benchmarks:
                one.resources.close()
        inner.raise_if_any()
        keys = [source_key(name) for name in first.recipe.inputs]
        joined = functools.reduce(Texts.joined, (one.texts for one in benchmarks), texts[0])
        try:
            with quiet_transformers():
                beforehand = look_ahead(found, opened, joined, request.folder, request.device, request.workers)
        except BaseException:
            for one in benchmarks:
                one.resources.close()
            raise
        return Prepared(request, found, opened, keys, joined, probes, beforehand, *benchmarks)

    return open_and_plan(first.recipe.inputs, plan, quiet=request.quiet, trust_remote_code=request.trust_remote_code)


def _read_benchmarks(base: Model, request: SearchRequest) -> Benchmarks:
    """The benchmarks of a request. Raises Refusals as `read_benchmarks`, and where the model has to be whole to answer, and is not."""
    from search.benchmarks import read_benchmarks

    asks = "accuracies" in request.measures
    if asks and not _is_whole(base, request):
        raise InputError(
            f"{setting('goal')}: answering benchmarks needs the model in memory, and {base.label} is run layer by layer. Search for loss, or use {setting('mode', 'whole')}."
        )
    return read_benchmarks(
        base, request.benchmarks, request.data_dir, request.evaluation,
        scores="losses" in request.measures, asks=asks, share=request.held_out, documents=request.documents,
    )  # fmt: skip


def _is_whole(base: Model, request: SearchRequest) -> bool:
    """Whether the base is run in memory, by the request or by what fits."""
    return fits(base, CalibrationOptions(device=request.device, dtype="auto", mode=request.mode))


def _given(values: Mapping[str, Any]) -> Suggest:
    return lambda name, free: values[name]


def _check_shapes(candidate: Candidate, opened: Sequence[Model]) -> None:
    """Raise InputError where a candidate cannot be planned."""
    make_plan(candidate.recipe, opened, max_shard_bytes=DEFAULT_SHARD_BYTES)


def tune(request: SearchRequest, console: Console | None = None) -> Outcome:
    """Search, compare and write.

    Args:
        request: what for, where and how long.
        console: how to speak to the user.

    Returns: the best recipe and the comparison on the held-out texts.

    Raises:
        Refusals: something does not fit; nothing was begun.
        InputError: a model cannot be run, the disk fails, Ctrl-C (the same call goes on).
    """
    return run(prepare(request), console)


def run(prepared: Prepared, console: Console | None = None) -> Outcome:
    """Carry out what was prepared; see `tune`."""
    console = console or Console()
    folder = prepared.request.folder
    with closing(prepared):
        try:
            return _Search(prepared, console).run()
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted. Run the same command again to go on; {folder} holds what is done."
            ) from None


def time_one(prepared: Prepared, console: Console) -> str:
    """How long a candidate takes, found by making and scoring the untuned one twice: a line for people."""
    request, first = prepared.request, next(iter(prepared.probes.values()))
    documents = [one for part in prepared.texts.searched.values() for one in part]
    with closing(prepared), ExitStack() as stack:
        if first.recipe.method_class.needs_data:
            stack.enter_context(prepared.beforehand.taken_for_now(request.folder, console))
        search = _Search(prepared, console, is_dry=True)
        for _ in range(2):  # the first also measures what is kept
            search.candidates.seconds = Seconds()
            search.candidates.make(first)
            search.candidates.score(documents)
        seconds = search.candidates.seconds
        whole = seconds.planning + seconds.weights + seconds.forward
        trials = request.budget.trials
        total = f"; {trials} trials take {trials * whole / 60:.1f} minutes at most" if trials else ""
        return f"{seconds.as_text()}{total}. Nothing was written."


class _Search:
    """A search under way."""

    def __init__(self, prepared: Prepared, console: Console, *, is_dry: bool = False):
        self.prepared, self.request, self.console = prepared, prepared.request, console
        self.space, self.goals = prepared.space, prepared.request.goals
        self.study: Study | None = None
        if not is_dry:
            self.study = Study(
                self.request.folder, self.space, self.goals, prepared.identity,
                seed=self.request.seed, stops_early=self.request.stops_early,
            )  # fmt: skip
            with self.study.locked():
                prepared.beforehand.take(self.request.folder, console)
        base, device = prepared.opened[0], self.request.device
        activations = self._activations(keep=not is_dry)
        options = StreamOptions(device, self.request.workers, compiled=device.type == "cpu")
        opened = keep_computed(prepared.opened)
        place = self._place(base, device)
        self.candidates = Candidates(
            opened, prepared.keys, place, options, activations, self._examiner(place), prepared.beforehand.prepare
        )

    def run(self) -> Outcome:
        study = self.study
        assert study is not None
        inputs = self._inputs(study)
        total = self.request.budget.trials or 0
        with self.console.bar("searching", total, " trials") as advance:
            study.run(functools.partial(self._evaluate, inputs), self.request.budget, advance)
        if not study.complete:
            raise InputError(
                f"{self.request.folder}: expected finished trials, got none in {self.request.budget.as_text()}. Give more {setting('trials')} or {setting('minutes')}."
            )
        with study.locked():
            return self._finish(study, inputs)

    # -------------------------------------------------------------------------------------------------- candidates

    def _place(self, base: Model, device: torch.device) -> Place:
        """The base in memory, or layer by layer where it does not fit."""
        with quiet_transformers():
            if not _is_whole(base, self.request):
                self.console.note(f"{base.label}: is run layer by layer, each merged when its turn comes")
                return LayerByLayer(base, auto_dtype(base), device)
            self.console.note(f"loading {base.label}")
            model = load(base, dtype="auto", device=device)
            choice = self._choose(model)
            model = model.to(FLOAT_DTYPES[choice.dtype])
            apply(model, choice)
        return LoadedModel(base, model, device, choice.threads)

    def _examiner(self, place: Place) -> Callable[[Sequence[Any]], Sequence[float]]:
        """What has the model in memory answer items of benchmarks."""
        benchmarks = self.prepared.benchmarks
        if benchmarks is None or not benchmarks.asks:
            return lambda items: ()
        from search.benchmarks import Examiner

        with quiet_transformers():
            return Examiner(self.prepared.opened[0], place.model, benchmarks, torch.get_num_threads()).score

    def _choose(self, model: Any) -> Choice:
        """How the model is run: what is fastest here, as calibration finds it; the same for every process and later run."""
        known = self.study.noted(CHOICE) if self.study is not None else None
        if isinstance(known, dict) and is_choice(known):
            return Choice(**known)
        choice = Choice(dtype_name(model.dtype), torch.get_num_threads())
        documents = [one for part in self.prepared.texts.searched.values() for one in part if isinstance(one, Document)]
        if documents and is_worth_timing(model, sum(map(len, documents))):
            length = min(sorted(map(len, documents))[-2:])
            tokens = torch.tensor([one.ids[:length] for one in documents if len(one) >= length][:2])
            fastest, _ = choose(model, tokens.to(self.request.device), choice, dtype=True, batch=False)
            choice = replace(fastest, threads=choice.threads)  # one process's busy moment is not every one's
        if self.study is not None:
            self.study.note(CHOICE, choice.as_json())
        return choice

    def _activations(self, *, keep: bool) -> Activations | None:
        """The base's statistics, where a recipe asks for AIM: from a file, an earlier run, or taken now."""
        asked = next((probe.aim for probe in self.prepared.probes.values() if probe.aim is not None), None)
        if asked is None:
            return None
        if isinstance(asked.statistics, Path):
            return load_activations(asked.statistics)
        path = self.request.folder / ACTIVATIONS
        if path.is_file():
            return load_activations(path)
        assert isinstance(asked.statistics, Calibration)
        base, data = self.prepared.opened[0], asked.statistics.data
        blocks = read_blocks(base, data, quiet=self.request.quiet)
        self.console.note(blocks.summary(data))
        with self.console.bar("calibrating", blocks.tokens.numel(), " tokens") as advance:
            activations = calibrate(base, data, asked.statistics.options, blocks=blocks, progress=advance)
        if keep:
            activations.save(path)
        return activations

    def _inputs(self, study: Study) -> list[Losses]:
        """Losses of the base and of every model on the texts searched with, found once."""
        with study.locked():
            known = study.noted(INPUTS)
            if known is None:
                known = [self._of_input(position, "searched") for position in range(len(self.prepared.opened))]
                study.note(INPUTS, known)
        return [dict(one) for one in known]

    def _of_input(self, position: int, part: str) -> dict[str, list[float]]:
        self.candidates.make_input(position)
        return self._losses(getattr(self.prepared.texts, part))

    def _losses(self, part: Mapping[str, Sequence[Part]]) -> dict[str, list[float]]:
        """Of what is in memory."""
        scores = iter(self.candidates.score([one for documents in part.values() for one in documents]))
        return {task: [next(scores) for _ in documents] for task, documents in part.items()}

    def _evaluate(self, inputs: Sequence[Losses], tree: Mapping[str, Any], stops: Any) -> Evaluation | None:
        """Make a candidate and score it: on a part of the documents first, the same for all, where it may be given up."""
        self.candidates.make(self.request.read(tree))
        texts = self.prepared.texts.searched
        losses: dict[str, list[float]] = {task: [] for task in texts}
        in_parts = self.candidates.place.can_score_in_parts
        rungs = RUNGS if in_parts and self.request.stops_early and len(self.goals) == 1 else RUNGS[-1:]
        for step, share in rungs:
            until = {task: max(1, round(share * len(documents))) for task, documents in texts.items()}
            more = {task: documents[len(losses[task]) : until[task]] for task, documents in texts.items()}
            for task, found in self._losses(more).items():
                losses[task] += found
            so_far = [{task: values[: len(losses[task])] for task, values in one.items()} for one in inputs]
            values = [goal.value(losses, so_far) for goal in self.goals]
            if step != RUNGS[-1][0] and stops(step, values[0]):
                return None
        return Evaluation(values, losses)

    # -------------------------------------------------------------------------------------------------- the report

    def _finish(self, study: Study, inputs: Sequence[Losses]) -> Outcome:
        """Compare on the held-out texts, write everything, and say it."""
        front = len(self.goals) > 1
        best = study.best(FRONT_COMPARED if front else CANDIDATES_COMPARED)
        candidates = [
            Rival(
                "best found" if at == 0 else f"{'front' if front else 'found'}, number {at + 1}",
                dict(trial.user_attrs[RECIPE]),
                searched=trial.user_attrs[LOSSES],
                is_candidate=True,
            )
            for at, trial in enumerate(best)
        ]
        labels = [model.label for model in self.prepared.opened]
        rivals = rivals_of(self.space, candidates, inputs, labels, self.goals)
        scored, there = self._score_once(study, rivals)
        rows = compare(rivals, scored, there, self.goals)
        lines = verdict(rows, self.goals)
        winner = self._recipe_of(candidates[0].tree or {})
        write_trials(study)
        comment = f"The best of {len(study.finished)} trials for {', '.join(goal.name for goal in self.goals)}: {names_of(winner)}"
        write_recipe(study.folder, winner, comment)
        text = self._text(study, rows, lines, winner)
        content = {
            "recipe": winner,
            "goals": goals_as_json(self.goals),
            "trials": {"finished": len(study.finished), "complete": len(study.complete)},
            "texts": self.prepared.texts.as_json(),
            "importance": importances(study),
            "rows": [row.as_json() for row in rows],
            "verdict": lines,
            "identity": study.noted("identity"),
        }
        write_report(study.folder, content, text)
        draw(study)
        self.console.say(as_text(rows, self.goals))
        for line in lines:
            self.console.say(line)
        self.console.note(self.candidates.seconds.as_text())
        if self.request.save_path is not None:
            self._write_checkpoint(winner, text)
        return Outcome(study.folder, winner, rows, lines, self.candidates.seconds)

    def _score_once(self, study: Study, rivals: Sequence[Rival]) -> tuple[list[Losses], list[Losses]]:
        """Losses of the rivals, and of all inputs, on the held-out texts; what an earlier run scored is not scored again."""
        known: dict[str, dict[str, list[float]]] = dict(study.noted(HELD_OUT) or {})

        def key_of(rival: Rival) -> str:
            return json.dumps(rival.tree if rival.tree is not None else rival.position, sort_keys=True)

        inputs = [Rival("", None, position) for position in range(len(self.prepared.opened))]
        todo = list({key_of(rival): rival for rival in (*rivals, *inputs) if key_of(rival) not in known}.values())
        with self.console.bar("held-out texts", len(todo), " models") as advance:
            for rival in todo:
                if rival.tree is None:
                    self.candidates.make_input(rival.position)
                else:
                    self.candidates.make(self.request.read(rival.tree))
                known[key_of(rival)] = self._losses(self.prepared.texts.held_out)
                study.note(HELD_OUT, known)
                advance(1)
        return [known[key_of(rival)] for rival in rivals], [known[key_of(one)] for one in inputs]

    def _recipe_of(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe as merge.py reads it: with the statistics that were used, and without an AIM that does nothing."""
        recipe = with_data(tree, self.request.folder)
        aim = recipe.get("aim")
        if isinstance(aim, dict):
            if aim.get("omega") in (1, 1.0):
                del recipe["aim"]
            elif (self.request.folder / ACTIVATIONS).is_file():
                kept = {key: value for key, value in aim.items() if key != "calibration"}
                recipe["aim"] = {**kept, "statistics": str(self.request.folder / ACTIVATIONS)}
        return recipe

    def _text(self, study: Study, rows: Sequence[Row], lines: Sequence[str], winner: Mapping[str, Any]) -> str:
        """The section of a card that says how the recipe was found, Markdown."""
        texts = self.prepared.texts.as_json()
        counts = [
            f"{task} ({texts['search'][task]['documents']} searched with, {texts['held_out'][task]['documents']} held out)"
            for task in self.prepared.texts.searched
        ]
        return "\n".join(
            [
                f"The best of {len(study.finished)} trials for {', '.join(goal.text for goal in self.goals)}: {markdown_code(names_of(winner))}. "
                f"Texts, split by content: {', '.join(counts)}. On the held-out texts, scored once:",
                "",
                "```text",
                as_text(rows, self.goals),
                "```",
                "",
                *lines,
            ]
        )

    def _write_checkpoint(self, tree: Mapping[str, Any], card: str) -> None:
        """Merge the best candidate into its folder, as merge.py does from its recipe."""
        assert self.request.save_path is not None
        candidate = self.request.read(tree)
        options = RunOptions(
            stream=StreamOptions(self.request.device, self.request.workers),
            trust_remote_code=self.request.trust_remote_code,
            quiet=self.request.quiet,
            command=self.request.command,
        )
        step = candidate.aim.step(self.request.save_path, options) if candidate.aim is not None else None
        try:
            job = prepare_merge(candidate.recipe, self.request.save_path, options, step=step)
        except AlreadyComplete as done:
            self.console.say(str(done))
            return
        job.work.card += f"\n\n## How it was found\n\n{card}"
        result = job.run(self.console)
        for warning in result.warnings:
            self.console.warn(str(shown(warning, self.console.show)))
        self.console.say(result.message or f"{self.request.save_path}: written")
