"""Pieces that a recipe file has in several places, models and values; and what is wrong with each, with its place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from checkpoints.errors import ArgumentError, InputError, unknown
from checkpoints.location import ModelName, parse_model
from checkpoints.problems import Problems
from checkpoints.settings import Remark
from merging.methods import get_method, parameters_by_key
from merging.recipe_documents import Documents
from streaming.values import Value, describe, parse_value

NOT_SUPPORTED = {
    "residual_weight": "mergekit reads it and does nothing with it. Leave it out",
}
INT8_MASK = "int8_mask has no effect: it says how masks are stored, and changes no number."


class Pieces:
    """Reads pieces of one file, collecting what is wrong with them.

    Args:
        where: the file, for messages.
        trust_remote_code: import a method that the file names as `package.module:Class`.
        documents: the merges that can be used as models.

    Attributes:
        method: its name, once it has been read.
        is_unread: whether nobody knows its parameters, as it was not imported.
        pinned: name on the hub -> the commit that it stands for.
        problems, notes: so far.
    """

    def __init__(self, where: str, *, trust_remote_code: bool = False, documents: Documents | None = None):
        self.where = where
        self.documents = documents
        self.trust_remote_code = trust_remote_code
        self.is_unread = False  # a method whose parameters nobody knows, as it was not imported
        self.problems = Problems()
        self.notes: list[str] = []
        self.pinned: dict[str, str] = {}
        self.method = ""

    def refuse(self, place: str, problem: str) -> None:
        """Note a problem at a place in the file (`models[1].parameters.density`)."""
        self.problems.add(ArgumentError(f"{self.where}: {place}: {problem}" if place else f"{self.where}: {problem}"))

    def note(self, text: str) -> None:
        """Note something once."""
        if Remark(text) not in self.notes:
            self.notes.append(Remark(text))

    def check_keys(self, place: str, content: Mapping[Any, Any], known: Iterable[str]) -> None:
        """Refuse keys that mean nothing, naming the nearest that does."""
        for key in content:
            if key in known:
                continue
            if key in NOT_SUPPORTED:
                self.refuse(_join(place, key), f"is not supported: {NOT_SUPPORTED[key]}.")
            else:
                self.refuse(place, unknown("key", str(key), known))

    def entries(self, place: str, content: Any) -> list[tuple[str, Any]]:
        """A list's entries with their places."""
        if not isinstance(content, list) or not content:
            self.refuse(place, f"expected a list with at least one entry, got {describe(content)}.")
            return []
        return [(f"{place}[{index}]", entry) for index, entry in enumerate(content)]

    def read_text(self, key: str, content: Any) -> str | None:
        if content is None or isinstance(content, str):
            return content
        self.refuse(key, f"expected text, got {describe(content)}.")
        return None

    def read_model(self, place: str, content: Any) -> ModelName | None:
        """A model by name, or as mergekit spells one out: `{model: {path: ..., revision: ...}, lora: ...}`."""
        text = _model_text(content)
        if text is not None and self.documents is not None and text in self.documents:
            return self.documents.model(text)
        if text is None:
            self.refuse(place, f"expected a folder or the name of a model, got {describe(content)}.")
            return None
        try:
            name = parse_model(text)
        except InputError as error:
            self.refuse(place, error.marked)
            return None
        if name.base is not None and self.documents is not None and str(name.base) in self.documents:
            self.refuse(
                place, f"{name}: an adapter cannot be put on {name.base}, a merge of this recipe. Write that one first."
            )
            return None
        if name.revision is None and not name.is_local and text in self.pinned:
            return replace(name, revision=self.pinned[text])
        return name

    def with_revision(self, place: str, name: ModelName, revision: Any) -> ModelName | None:
        """A hub model at the revision that stands beside it; of an adapter on a base, the base is what is meant to have one."""
        if not isinstance(revision, str):
            self.refuse(place, f"expected a branch, a tag or a commit, got {describe(revision)}.")
        elif name.merged is not None or name.is_local:
            what = "a merge of this recipe" if name.merged is not None else "a local folder"
            self.refuse(place, f"{name} is {what}, which has no revisions. Leave it out.")
        elif name.base is not None:
            self.refuse(place, f"{name} is two models. Write NAME@REVISION for each of them.")
        elif name.revision not in (None, revision) and name.path_or_id not in self.pinned:
            self.refuse(place, f"{name} has a revision already. Leave one of the two out.")
        else:
            return self.read_model(place, f"{name.path_or_id}@{revision}")
        return None

    def read_values(self, place: str, content: Any, *, shared: bool) -> dict[str, Value]:
        """The parameters at one place that the method uses; what it does not use is noted, what nobody knows refused."""
        if content is None:
            return {}
        if not isinstance(content, dict):
            self.refuse(place, f"expected parameters such as weight, got {describe(content)}.")
            return {}
        used = get_method(self.method).parameters() if self.method else {}
        known = {*parameters_by_key(), *used, "int8_mask"}
        values: dict[str, Value] = {}
        for key, content_of_key in content.items():
            if key == "int8_mask":
                self.note(INT8_MASK)
            elif self.is_unread:
                continue
            elif key not in known:
                self.refuse(place, unknown("parameter", str(key), sorted(known)))
            elif content_of_key is None or not self.method:
                continue
            elif key not in used:
                self.note(f"{place}.{key} has no effect: {self.method} does not use it.")
            elif not shared and not used[key][0].per_model:
                self.note(f"{place}.{key} has no effect: it holds for all models. Write it under parameters.")
            else:
                try:
                    values[key] = parse_value(content_of_key, used[key][0])
                except ArgumentError as error:
                    self.refuse(f"{place}.{key}", error.marked)
        return values


def _model_text(content: Any) -> str | None:
    """`NAME@REVISION+LORA` of a model, however it is spelt."""
    if isinstance(content, str):
        return content
    if not isinstance(content, dict):
        return None
    if "path" in content and set(content) <= {"path", "revision"} and isinstance(content["path"], str):
        return content["path"] if content.get("revision") is None else f"{content['path']}@{content['revision']}"
    if "model" in content and set(content) <= {"model", "lora"}:
        model, lora = _model_text(content["model"]), content.get("lora")
        adapter = None if lora is None else _model_text(lora)
        return model if lora is None or model is None or adapter is None else f"{model}+{adapter}"
    return None


def _join(place: str, key: Any) -> str:
    return f"{place}.{key}" if place else str(key)
