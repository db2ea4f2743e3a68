"""Run the base model on calibration text and collect what its weights' inputs look like."""

from __future__ import annotations

from collections.abc import Callable

from aim.activations import Activations
from aim.calibration_run import CalibrationOptions, CalibrationRun, Numerics
from aim.calibration_text import CalibrationData, TokenBlocks, make_blocks
from aim.enough import first_check
from aim.passes import fits, layerwise, whole
from aim.targets import Selection, select_like_the_reference, select_targets
from aim.together import Alone
from aim.unfinished import UnfinishedCalibration
from checkpoints.errors import InputError, first_line
from checkpoints.model import Model
from checkpoints.settings import setting
from forward.loading import config_of, is_out_of_memory, quiet_transformers

__all__ = ["CalibrationOptions", "Numerics", "calibrate"]


def check_runs_on_text(base: Model) -> None:
    """Raise InputError where the base is no causal language model, which alone can be run on plain text."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    name = base.architecture.model_class
    known = {  # of the second kind most run on tokens alone, and the others say so when they are run
        entry
        for names in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
        for entry in ([names] if isinstance(names, str) else names)
    }
    if name in known:
        return
    config = config_of(base)
    if base.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    mapped = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    advice = "Merge without AIM" + (", or have config.json name a causal class under architectures." if mapped else ".")
    raise InputError(
        f"{base.label}: expected a causal language model, got {name}, which AIM cannot calibrate. {advice}"
    )


def check_block_size(base: Model, block_size: int) -> None:
    """Raise InputError where blocks have more tokens than the base has positions: it would fail on them, or make no sense."""
    config = config_of(base)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < block_size:  # -1: as many as you like
        raise InputError(
            f"{setting('block_size')}: expected at most the {positions} positions of {base.label}, got {block_size}. Lower it."
        )


def check_has_all_weights(base: Model) -> None:
    """Raise InputError where weights are missing or do not fit config.json, and random numbers would take their place."""
    architecture = base.architecture
    if architecture.missing:
        more = f" and for {len(architecture.missing) - 1} more" if len(architecture.missing) > 1 else ""
        raise InputError(
            f"{base.label}: expected a tensor for {architecture.missing[0]}{more}, got none. Use a complete base model."
        )
    for name, complaint in architecture.mismatched.items():
        raise InputError(f"{base.label}: {name}: does not fit config.json: {complaint}. Use matching files.")


def select(base: Model, numerics: Numerics) -> tuple[Selection, list[str]]:
    """What is relaxed under these numerics, and warnings. Raises InputError as the two selections do."""
    return select_like_the_reference(base) if numerics == "reference" else (select_targets(base), [])


def read_blocks(base: Model, data: CalibrationData, *, quiet: bool = False) -> TokenBlocks:
    """The calibration texts as tokens of the base. Raises InputError: no tokenizer; as `make_blocks`."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                base.tokenizer_folder, local_files_only=True, trust_remote_code=base.trust_remote_code
            )
            if len(tokenizer) <= len(
                set(tokenizer.all_special_ids)
            ):  # what transformers makes for some classes without files
                raise ValueError("it has no tokens")
        except Exception as error:  # a tokenizer's own code fails in every way there is
            reason = first_line(error) if base.vocabulary_digest else "there is none"
            raise InputError(
                f"{base.label}: expected a tokenizer, which calibration needs: {reason}. Add its tokenizer files."
            ) from error
        blocks = make_blocks(data, lambda text: list(tokenizer.encode(text)) if text else [], quiet=quiet)
    table = base.weights.tensors.get(base.architecture.stored_name(base.architecture.input_embedding or ""))
    rows = table.shape[0] if table is not None else 0
    if table is not None and int(blocks.tokens.max()) >= rows:
        raise InputError(
            f"{base.label}: its tokenizer gives the id {int(blocks.tokens.max())}, its embedding has {rows} rows. Use matching files."
        )
    return blocks


def calibrate(
    base: Model,
    data: CalibrationData,
    options: CalibrationOptions | None = None,
    *,
    blocks: TokenBlocks | None = None,
    unfinished: UnfinishedCalibration | None = None,
    progress: Callable[[int], object] = lambda tokens: None,
    note: Callable[[str], object] = lambda line: None,
    share: Alone | None = None,
) -> Activations:
    """Collect the statistics of every weight that AIM relaxes.

    Args:
        base: opened, a causal language model.
        data: which texts; `blocks`: the same, where they were read already.
        options: device, dtype, batch size, when it is enough.
        unfinished: what an earlier run of the same calibration left, and where this one keeps what it has.
        progress: called with numbers of tokens as they are done, the first time with 0, when the model is loaded.
        note: called with lines that say how the model is run.
        share: one's part, where several processes share the calibration.

    Raises: InputError: no causal model, it cannot be loaded or run, out of memory, NaN in a statistic (names the weight).
    """
    options = options or CalibrationOptions()
    check_runs_on_text(base)
    check_has_all_weights(base)
    check_block_size(base, data.block_size)
    selection, _ = select(base, options.numerics)
    blocks = blocks or read_blocks(base, data)
    first = first_check(data.block_size) * data.block_size
    if options.stops_at and blocks.tokens.numel() < first:
        note(
            f"{blocks.tokens.numel():,} tokens of text, fewer than the {first:,} after which both halves are first compared: "
            "all of it is used"
        )
    with quiet_transformers():
        calibrating = CalibrationRun(
            base, selection, options, data, blocks, unfinished, progress, note, share or Alone()
        )
        try:
            return (whole if fits(base, options) else layerwise)(calibrating)
        except InputError:
            raise
        except Exception as error:  # a class's own code, which is built, looked at and run, fails in every way there is
            if isinstance(error, MemoryError) or is_out_of_memory(error):
                raise
            raise calibrating.fails(error) from error
