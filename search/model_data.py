"""Texts of each model's own task for methods that run the models: the texts searched with, or rows of files, never what is held out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from checkpoints.errors import InputError, WriteError
from checkpoints.model import Model
from checkpoints.problems import Problems
from checkpoints.settings import setting
from checkpoints.text_files import read_rows
from merging.methods import get_method
from merging.model_texts import ModelText, text_of_rows, tokenizer_of
from search.space import METHOD
from search.texts import Document, Texts, key_of

FOLDER = "model_data"


def with_data(tree: Mapping[str, Any], study: Path) -> dict[str, Any]:
    """A recipe as it is read and written: each model with its file in the study where the method runs models, without one where not."""
    needs = get_method(str(tree[METHOD])).needs_data
    models, position = [], 0
    for entry in tree.get("models") or ():
        changed = {key: value for key, value in entry.items() if key != "data"}
        if entry.get("model") != tree.get("base_model"):
            position += 1
            if needs:
                changed["data"] = str(file_of(study, position))
        models.append(changed)
    return {**tree, "models": models} if "models" in tree else dict(tree)


def file_of(study: Path, position: int) -> Path:
    """Where the rows of a model are kept; 1 is the first model."""
    return study / FOLDER / f"model_{position}.jsonl"


@dataclass(frozen=True)
class ModelData:
    """The rows that each model is run on.

    Attributes:
        rows: file in the study -> its rows.
        says: for each model, where they are from.
    """

    rows: Mapping[Path, Sequence[Any]]
    says: Sequence[str]

    def read(self, model: Model, source: str, tokens: int) -> ModelText:
        """As `merging.model_texts.read_model_text` reads the file, which may not be written yet."""
        return text_of_rows(self.rows[Path(source)], model, setting("model_data"), tokens)

    def write(self, study: Path) -> None:
        """Write the files, from which merge.py makes what a candidate was, into a study's folder. Raises WriteError."""
        for path, rows in self.rows.items():
            path = study / FOLDER / path.name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
            except OSError as error:
                raise WriteError(path, error) from error


def choose_rows(tree: Mapping[str, Any], models: Sequence[Model], texts: Texts, study: Path) -> ModelData:
    """Each model's rows: of the file that the recipe names for it, without those whose text or prompt is held out; else the texts searched
    with of the task of its name, or, where no model is called as a task, of the task in its place.

    Args:
        tree: the recipe.
        models: opened, without the base.

    Raises: Refusals: no rows, a file that cannot be read, models that no task is the task of.
    """
    problems = Problems()
    entries = [entry for entry in tree.get("models") or () if entry.get("model") != tree.get("base_model")]
    tasks = {task: [one for one in part if isinstance(one, Document)] for task, part in texts.searched.items()}
    tasks = {task: documents for task, documents in tasks.items() if documents}
    chosen = _tasks_of([str(entry.get("model")) for entry in entries], list(tasks))
    rows: dict[Path, list[Any]] = {}
    says: list[str] = []
    for position, (entry, model, task) in enumerate(zip(entries, models, chosen, strict=True), 1):
        source, found, left_out = entry.get("data"), [], 0
        with problems.collect():
            if source is not None:
                whole = _read(str(source))
                found = [row for row in whole if key_of(row, setting("model_data", source)) not in texts.held_out_keys]
                left_out = len(whole) - len(found)
            elif task is not None:
                has_template = isinstance(tokenizer_of(model).chat_template, str)
                found = [_row_of(one.row, has_template) for one in tasks[task]]
            else:
                raise InputError(
                    f"{setting('model_data')}: {model.label}: its own task is not told by the names of {setting('texts')}, and there are "
                    f"{len(tasks)} for {len(entries)} models. Give a file for each model."
                )
            if not found:
                raise InputError(
                    f"{setting('model_data', source)}: expected rows for {model.label} that are not held out, got none. Give others."
                )
        rows[file_of(study, position)] = found
        whose = f"the texts searched with of {task}" if source is None else f"{source}"
        held = f", without {left_out} rows that are held out" if left_out else ""
        says.append(f"{model.label}: its own task is {whose}{held}.")
    problems.raise_if_any()
    return ModelData(rows, says)


def _read(source: str) -> list[Any]:
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(
            f"{setting('model_data', source)}: no such file. Give a file of texts of the model's own task."
        )
    return list(read_rows(path))


def _row_of(row: Any, has_template: bool) -> Any:
    """A row as a model reads it: prompt and answer as one text where it has no chat template."""
    if has_template or not isinstance(row, dict) or isinstance(row.get("text"), str):
        return row
    return {"text": row["prompt"] + row["answer"]}


def _tasks_of(names: Sequence[str], tasks: Sequence[str]) -> list[str | None]:
    """The task of each model: the one that it is called by, in whole words; where no model is called by any, the one in its place if there
    are as many; None where that does not tell."""
    by_words = {task.lower(): task for task in tasks}
    called: list[str | None] = []
    for name in names:
        words = {PurePath(name).name.lower(), *re.split(r"[^a-z0-9]+", PurePath(name).name.lower())}
        fitting = [by_words[word] for word in sorted(words) if word in by_words]
        called.append(fitting[0] if len(fitting) == 1 else None)
    if any(called):
        return called
    return list(tasks) if len(tasks) == len(names) else [None] * len(names)
