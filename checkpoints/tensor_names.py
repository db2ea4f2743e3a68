"""Names of tensors as people read them: one line for what all layers have."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable


def kind_of(tensor: str) -> str:
    """The kind of layer a tensor belongs to: its name with every number replaced (`model.layers.*.mlp.up_proj.weight`)."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", tensor)


def list_kinds(names: Iterable[str], most: int = 8) -> str:
    """The names, or their kinds with a count where there are many; at most `most` of them, and how many more."""
    kinds = Counter(kind_of(name) for name in names)
    listed = [f"{kind} ({count})" if count > 1 else kind for kind, count in kinds.items()]
    more = [f"and {len(listed) - most} more kinds"] if len(listed) > most + 1 else []
    return ", ".join([*listed[:most], *more] if more else listed)


def is_called_embedding(tensor: str) -> bool:
    """Whether a tensor is called as embeddings are, where no class tells which they are."""
    return re.search(r"embed|(^|\.)w[tp]e\.", tensor, re.IGNORECASE) is not None


def layer_of(tensor: str) -> tuple[str, int] | None:
    """The stack that a tensor belongs to and its number there: (`model.layers.`, 3); None outside of a stack."""
    match = re.match(r"(.*?\.|)(\d+)\.", tensor)
    return (match[1], int(match[2])) if match else None
