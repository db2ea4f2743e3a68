"""What the rows of a table are called: as short as can be, and no two different things alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from reports.entries import Aim, Entry, Merge, ModelId


class Labels:
    """Names for the models, merges and relaxations of a table.

    Args:
        entries: everything that is in it.
    """

    def __init__(self, entries: Sequence[Entry]):
        self._models = [entry.model for entry in entries if entry.merge is None]
        self._models += [model for entry in entries if entry.merge for model in entry.merge.models]
        self._entries = entries
        self._known: dict[ModelId, str] = {}

    def model(self, model: ModelId) -> str:
        """The last part of a model's name; all of it, and its fingerprint, where other models share that."""
        if model not in self._known:
            self._known[model] = self._name(model)
        return self._known[model]

    def _name(self, model: ModelId) -> str:
        others = [other for other in self._models if not model.likeness(other)]
        if model.short not in (other.short for other in others):
            return model.short
        if model.name not in (other.name for other in others):
            return model.name
        return f"{model.name} {model.key[:8]}"

    def models(self, models: Iterable[ModelId]) -> str:
        """`code+math`."""
        return "+".join(map(self.model, models))

    def method(self, merge: Merge) -> str:
        """The method, with the settings in which merges of the same models by it differ: `ties (density 0.2)`."""
        alike = {
            entry.merge.key: entry.merge.settings
            for entry in self._entries
            if entry.merge is not None
            and (entry.merge.method, self.models(entry.merge.models)) == (merge.method, self.models(merge.models))
        }
        different = _told(merge.settings, list(alike.values()))
        return f"{merge.method} ({different})" if different else merge.method

    def aim(self, merge: Merge, aim: Aim) -> str:
        """The settings in which relaxations of a merge with the same omega differ; mostly nothing."""
        alike = [
            entry.aim.settings
            for entry in self._entries
            if entry.merge is not None
            and entry.aim is not None
            and (entry.merge.key, entry.aim.omega, entry.aim.control) == (merge.key, aim.omega, aim.control)
        ]
        return _told(aim.settings, alike)


def _told(settings: Mapping[str, str], alike: Sequence[Mapping[str, str]]) -> str:
    differing = [key for key in settings if len({other.get(key) for other in alike}) > 1]
    return ", ".join(f"{key} {settings[key]}".strip() for key in differing)
