"""What methods that run models find out of them, once for all candidates of a search: the moments of every model's inputs."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.errors import ArgumentError, InputError
from checkpoints.model import Model
from checkpoints.save_path import existing_ancestor
from checkpoints.settings import Remark, setting
from merging.kept_moments import DONE, Keep, KeptMoments
from merging.merge_work import prepare_moments
from merging.methods import get_method
from merging.plan import make_plan
from search.candidates import of_base, read_candidate
from search.model_data import ModelData, choose_rows, with_data
from search.space import Space
from search.texts import Texts
from streaming.console import Console
from streaming.output import DEFAULT_SHARD_BYTES, RunOptions
from streaming.stream import PlannedTensor, StreamOptions

FOLDER = "moments"


@dataclass(frozen=True)
class Beforehand:
    """For every method that runs models: what on, and what is kept of it.

    Attributes:
        kept: method -> the moments of all models' inputs, not taken yet.
        data: the rows that models are run on; None where no method runs any.
        texts: of each model, for JSON.
        lines: what to say of it.
    """

    kept: Mapping[str, KeptMoments] = dataclasses.field(default_factory=dict)
    data: ModelData | None = None
    texts: Sequence[Mapping[str, Any]] = ()
    lines: Sequence[str] = ()

    @property
    def nbytes(self) -> int:
        """What it takes on the disk at most."""
        return sum(kept.nbytes for kept in self.kept.values())

    def as_json(self) -> dict[str, Any]:
        """What decides it, for JSON: nothing where no method runs models."""
        return {"model_data": list(self.texts)} if self.kept else {}

    def check_space(self, study: Path) -> None:
        """Raise InputError where the disk of the study has too little room."""
        if all((study / FOLDER / method / DONE).is_file() for method in self.kept):
            return
        disk = study if study.is_dir() else existing_ancestor(study)
        free = shutil.disk_usage(disk).free
        if self.nbytes > free:
            raise InputError(
                f"{setting('study', study)}: the moments of the models' inputs ({', '.join(self.kept)}) need up to {self.nbytes:,} bytes, {disk} has "
                f"{free:,} free. Free space, choose another disk, write moments: diagonal into the recipe, or leave the method out."
            )

    def take(self, study: Path, console: Console) -> None:
        """Run the models, unless a run before has. Raises InputError: a model cannot be run, the disk is full or fails."""
        if self.data is not None:
            self.data.write(study)
        for method, kept in self.kept.items():
            with console.bar(f"moments for {method}", kept.layers, " layers") as advance:
                kept.take(study / FOLDER / method, advance)

    @contextmanager
    def taken_for_now(self, study: Path, console: Console) -> Iterator[None]:
        """Have it as long as a block runs, beside where the study would be."""
        if not self.kept:
            yield
            return
        with tempfile.TemporaryDirectory(dir=existing_ancestor(study)) as folder:
            self.take(Path(folder), console)
            yield

    def prepare(self, tensors: Sequence[PlannedTensor], keep: Keep) -> Sequence[PlannedTensor]:
        """The tensors of a candidate with what its method wants of the models; see `KeptMoments.prepare`."""
        for kept in self.kept.values():
            tensors = kept.prepare(tensors, keep)
        return tensors


def look_ahead(
    space: Space, opened: Sequence[Model], texts: Texts, study: Path, device: torch.device, workers: int | None
) -> Beforehand:
    """Plan what has to be found out beforehand; nothing is written.

    Args:
        space: what is searched.
        opened: the inputs, the base first.
        texts: of which those that are searched with are a model's own, unless the recipe names a file for it.
        study: where the files will be.
        device, workers: where models run.

    Raises: Refusals: texts that do not fit, models that cannot be run, too little room on the disk.
    """
    methods = [method for method in space.methods if get_method(method).needs_data]
    if not methods:
        return Beforehand()
    data = choose_rows(space.tree, opened[1:], texts, study)
    options = RunOptions(stream=StreamOptions(device, workers))
    kept: dict[str, KeptMoments] = {}
    lines: list[Any] = list(data.says)
    said: list[dict[str, Any]] = []
    for method in methods:
        tree = space.widest(method, get_method(method).prepared_for)
        recipe = read_candidate(with_data(tree, study), space.where).recipe
        inputs = recipe.parameters.get("inputs")
        if inputs is not None and any(value == "merged" for _, values in inputs.entries for value in values):
            raise ArgumentError(
                f"{space.where}: {setting('inputs', 'merged')}: runs every model behind each candidate's own layers, which a search cannot. Leave it out."
            )
        plan = make_plan(of_base(recipe), opened, max_shard_bytes=DEFAULT_SHARD_BYTES)
        moments, said, notes = prepare_moments(plan, opened, options, data.read)
        kept[method] = KeptMoments(moments)
        lines += notes
    beforehand = Beforehand(kept, data, said, lines)
    lines.append(
        Remark(f"{', '.join(kept)}: the moments of the models' inputs are taken once, and take at most {beforehand.nbytes:,} bytes in {study / FOLDER}.")
    )  # fmt: skip
    beforehand.check_space(study)
    return beforehand
