"""Names of tensors: the layer that they speak of, and one line for people for what all layers have."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple


class LayerName(NamedTuple):
    """The name of a layer's tensor in three parts: `model.layers.`, 3, `.mlp.up_proj.weight`."""

    prefix: str
    layer: int
    rest: str

    def at(self, layer: int) -> str:
        """The name of the same tensor in another layer."""
        return f"{self.prefix}{layer}{self.rest}"


def kind_of(tensor: str) -> str:
    """The kind of layer a tensor belongs to: its name with every number replaced (`model.layers.*.mlp.up_proj.weight`)."""
    return re.sub(r"(?<=\.)[0-9]+(?=\.|$)", "*", tensor)


def list_kinds(names: Iterable[str], most: int = 8) -> str:
    """The names, or their kinds with a count where there are many; at most `most` of them, and how many more."""
    kinds = Counter(kind_of(name) for name in names)
    listed = [f"{kind} ({count})" if count > 1 else kind for kind, count in kinds.items()]
    more = [f"and {len(listed) - most} more kinds"] if len(listed) > most + 1 else []
    return ", ".join([*listed[:most], *more] if more else listed)


def is_called_embedding(tensor: str) -> bool:
    """Whether a tensor is called as embeddings are, where no class tells which they are."""
    return re.search(r"embed|(^|\.)w[tp]e\.", tensor, re.IGNORECASE) is not None


def split_name(tensor: str) -> LayerName | None:
    """The parts of a tensor's name around its first number; None where no part of it is a number, as outside of a stack."""
    match = re.match(r"((?:[^.]*\.)*?)([0-9]{1,9})(\..*)", tensor, re.DOTALL)
    return LayerName(match[1], int(match[2]), match[3]) if match else None
