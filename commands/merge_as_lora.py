"""merge.py --as_lora: a merge of adapters, or of anything that changes its base by little, written as an adapter."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapters.extraction import Extraction, ExtractOptions, make_extraction
from adapters.low_rank import LoraChoice
from checkpoints.errors import ArgumentError
from checkpoints.model import Model, open_and_plan
from checkpoints.problems import Problems
from checkpoints.settings import setting
from checkpoints.source import FLOAT_DTYPES, TensorRef
from merging.merge_work import make_work
from merging.merged_tensors import MergedTensors

if TYPE_CHECKING:
    from commands.merge import Asked


def prepare(asked: Asked, arguments: argparse.Namespace, command: list[str]) -> Extraction:
    """Plan a merge and the adapter that holds it; nothing is written.

    Raises: Refusals: everything that does not fit.
    """
    problems = Problems()
    refused: dict[str, tuple[Any, str]] = {
        "omega": (asked.aim, "AIM relaxes checkpoints"),
        "base_model": (asked.recipe.base_model is None, "an adapter goes on a base, and the recipe has none"),
    }
    for name, (given, why) in refused.items():
        if given:
            problems.add(ArgumentError(f"{setting('as_lora')}: {why}. Leave it out, or mend {setting(name)}."))
    if asked.recipe.method_class.needs_data:
        problems.add(
            ArgumentError(
                f"{setting('as_lora')}: {asked.recipe.merge_method} changes every direction of a matrix, and runs the models for it. Leave it out."
            )
        )
    problems.raise_if_any()
    dtype = FLOAT_DTYPES.get(asked.recipe.out_dtype, FLOAT_DTYPES["float32"])
    recipe = replace(asked.recipe, out_dtype="float32")
    options = ExtractOptions(
        device=asked.options.stream.device,
        overwrite=asked.options.overwrite,
        resume=asked.options.resume,
        trust_remote_code=asked.options.trust_remote_code,
        quiet=asked.options.quiet,
        command=command,
    )

    def plan(opened: list[Model]) -> Extraction:
        work = make_work(recipe, opened, asked.options)
        base = opened[0]
        merged = MergedTensors("the merge", work.tensors, replace(asked.options.stream, compiled=None))
        refs = {
            name: (TensorRef(base.weights, name), TensorRef(merged, name))
            for name, info in merged.tensors.items()
            if name in base.weights.tensors and info.dtype.is_floating_point
        }
        found = Problems(notes=work.notes)
        for name, (before, after) in refs.items():
            if before.info.shape != after.info.shape:
                found.add(
                    f"{name}: expected shape {list(before.info.shape)} as in {base.label}, got {list(after.info.shape)}. An adapter changes no shape: use "
                    f"{setting('tokenizer_source', 'base')}."
                )
        choice = LoraChoice(energy=1.0, save_whole=("all",), dtype=dtype, is_exact=True)
        return make_extraction(
            base, opened, "the merge", refs, choice, asked.save_path, options,
            recipe={"merge": asked.recipe.as_json()}, tokenizer=None, problems=found,
        )  # fmt: skip

    return open_and_plan(
        recipe.inputs,
        plan,
        download=not arguments.dry_run,
        quiet=options.quiet,
        trust_remote_code=options.trust_remote_code,
    )
