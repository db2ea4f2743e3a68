"""Read YAML and JSON that nobody vouches for: plain data only, and never more work than the file is long."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from checkpoints.errors import ArgumentError, first_line

MAX_BYTES = 4 << 20
"""Of a file; a merge report of a large model with all its inputs takes a tenth of it."""
MAX_YAML_BYTES = 1 << 18
MAX_NODES = 100_000
"""Of a YAML document, where each use of an anchor counts as often as it is long."""


def read_documents(path: Path, where: str) -> list[Any]:
    """What the documents of a YAML file, or the one of a JSON file, hold: mappings, lists, texts, numbers, booleans, None.

    Args:
        path: the file.
        where: how messages name it.

    Raises: ArgumentError: it cannot be read, is too large, is neither, names a key twice, or grows without end.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ArgumentError(f"{where}: expected text in UTF-8, got something else. Give a recipe file.") from None
    except FileNotFoundError:
        raise ArgumentError(f"{where}: no such file. Name a recipe in YAML, or a merge_recipe.json.") from None
    except IsADirectoryError:
        raise ArgumentError(f"{where}: expected a file, got a folder. Name the recipe in it.") from None
    except OSError as error:
        raise ArgumentError(f"{where}: cannot be read: {error.strerror}. Name another file.") from None
    if text.lstrip().startswith("{") and len(raw) <= MAX_BYTES:
        try:
            return [json.loads(text, object_pairs_hook=lambda pairs: _without_twins(pairs, where))]
        except RecursionError:
            raise ArgumentError(f"{where}: is nested too deeply for a recipe. Name another file.") from None
        except ValueError:
            pass  # YAML's flow style starts with a brace too
    if len(raw) > MAX_YAML_BYTES:
        raise ArgumentError(f"{where}: is too large for a recipe. Name another file.")
    try:
        return _read_yaml(text, where)
    except RecursionError:
        raise ArgumentError(f"{where}: is nested too deeply for a recipe. Name another file.") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        problem = " ".join(filter(None, (getattr(error, "context", ""), getattr(error, "problem", ""))))
        raise ArgumentError(f"{where}: is no YAML{line}: {problem or first_line(error)}. Mend the file.") from None


def _without_twins(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ArgumentError(f"{where}: '{key}' is given twice in one place. Give it once.")
        mapping[key] = value
    return mapping


def _read_yaml(text: str, where: str) -> list[Any]:
    loader = yaml.SafeLoader(text)
    documents: list[Any] = []
    size = 0
    try:
        while loader.check_node():
            node = loader.get_node()
            assert node is not None
            size += _measure(node, {}, where)
            if size > MAX_NODES:
                raise ArgumentError(
                    f"{where}: is too large for a recipe once its anchors are written out. Name another file."
                )
            documents.append(loader.construct_document(node))
        return [one for one in documents if one is not None] or [None]
    finally:
        loader.dispose()


def _measure(node: yaml.Node, known: dict[int, int], where: str) -> int:
    """Nodes that `node` stands for, aliases written out. Raises ArgumentError: too many, a circle, a key given twice."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    size = known.get(id(node), -1)
    if size == 0:
        raise ArgumentError(f"{where}: an anchor holds itself (line {node.start_mark.line + 1}). Write it out.")
    if size > 0:
        return size
    known[id(node)] = 0  # being looked at
    if isinstance(node, yaml.MappingNode):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.items():
            if count > 1:
                raise ArgumentError(
                    f"{where}: '{key}' is given twice in one place (line {node.start_mark.line + 1}). Give it once."
                )
        children = [part for pair in node.value for part in pair]
    else:
        children = list(node.value)
    size = 1 + sum(_measure(child, known, where) for child in children)
    if size > MAX_NODES:
        raise ArgumentError(f"{where}: is too large for a recipe once its anchors are written out. Name another file.")
    known[id(node)] = size
    return size
