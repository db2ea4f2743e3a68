"""Run the base model on calibration text and collect what its weights' inputs look like."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import torch

from aim.activations import Watcher
from aim.calibration import Blocks, CalibrationData, make_blocks
from aim.reference import ReferenceWatcher
from aim.statistics import Activations
from aim.targets import Selection, select_like_the_reference, select_targets
from aim.unfinished import UnfinishedCalibration
from checkpoints.errors import ArgumentError, InputError, first_line
from checkpoints.model import Model
from checkpoints.provenance import fingerprint
from checkpoints.reader import Checkpoint, read_tensor
from checkpoints.settings import setting
from checkpoints.source import FLOAT_DTYPES, dtype_name

Numerics = Literal["float32", "reference"]


@dataclass(frozen=True)
class CalibrationOptions:
    """How the base model is run.

    Attributes:
        device: where; None for the GPU or GPUs where there are any, spilling over to the CPU, else the CPU.
        dtype: of the forward pass: `auto` (the checkpoint's), float32, bfloat16 or float16.
        batch_size: blocks of one forward pass.
        numerics: `reference` rounds as the published program does.
    """

    device: torch.device | None = None
    dtype: str = "auto"
    batch_size: int = 1
    numerics: Numerics = "float32"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ArgumentError(f"{setting('batch_size')}: expected at least 1, got {self.batch_size}.")
        if self.dtype != "auto" and self.dtype not in FLOAT_DTYPES:
            raise ArgumentError(
                f"{setting('calibration.dtype')}: expected auto, {', '.join(FLOAT_DTYPES)}, got {self.dtype!r}."
            )
        if self.numerics == "reference" and self.batch_size != 1:
            raise ArgumentError(
                f"{setting('batch_size')}: {setting('numerics', 'reference')} runs one block at a time, got {self.batch_size}. Leave it out."
            )
        if self.numerics == "reference" and self.dtype not in ("auto", "bfloat16"):
            raise ArgumentError(
                f"{setting('calibration.dtype')}: {setting('numerics', 'reference')} runs in bfloat16, got {self.dtype}. Leave it out."
            )


def check_causal(base: Model) -> None:
    """Raise InputError where the base is no causal language model, which alone can be run on plain text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = base.architecture.model_class
    known = {
        entry
        for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for entry in ([names] if isinstance(names, str) else names)
    }
    if name in known:
        return
    config = _config(base)
    if base.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    mapped = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    advice = "Merge without AIM" + (", or have config.json name a causal class under architectures." if mapped else ".")
    raise InputError(
        f"{base.label}: expected a causal language model, got {name}, which AIM cannot calibrate. {advice}"
    )


def check_block_size(base: Model, block_size: int) -> None:
    """Raise InputError where blocks have more tokens than the base has positions: it would fail on them, or make no sense."""
    config = _config(base)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and block_size > positions:
        raise InputError(
            f"{setting('block_size')}: expected at most the {positions} positions of {base.label}, got {block_size}. Lower it."
        )


def check_complete(base: Model) -> None:
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


def read_blocks(base: Model, data: CalibrationData, *, quiet: bool = False) -> Blocks:
    """The calibration texts as tokens of the base. Raises InputError: no tokenizer; as `make_blocks`."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                base.tokenizer_folder, local_files_only=True, trust_remote_code=base.trust_remote_code
            )
        except Exception as error:  # a tokenizer's own code fails in every way there is
            reason = first_line(error) if base.vocabulary_digest else "there is none"
            raise InputError(
                f"{base.label}: expected a tokenizer, which calibration needs: {reason}. Add its tokenizer files."
            ) from error
        blocks = make_blocks(data, lambda text: list(tokenizer.encode(text)) if text else [], quiet=quiet)
    rows = base.weights.tensors[base.architecture.stored_name(base.architecture.input_embedding or "")].shape[0]
    if int(blocks.tokens.max()) >= rows:
        raise InputError(
            f"{base.label}: its tokenizer gives the id {int(blocks.tokens.max())}, its embedding has {rows} rows. Use matching files."
        )
    return blocks


def calibrate(
    base: Model,
    data: CalibrationData,
    options: CalibrationOptions | None = None,
    *,
    blocks: Blocks | None = None,
    unfinished: UnfinishedCalibration | None = None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Activations:
    """Collect the statistics of every weight that AIM relaxes.

    Args:
        base: opened, a causal language model.
        data: which texts; `blocks`: the same, where they were read already.
        options: device, dtype, batch size.
        unfinished: what an earlier run of the same calibration left, and where this one keeps what it has.
        progress: called with numbers of tokens as they are done, the first time with 0, when the model is loaded.

    Raises: InputError: no causal model, it cannot be loaded or run, out of memory, NaN in a statistic (names the module).
    """
    options = options or CalibrationOptions()
    check_causal(base)
    check_complete(base)
    check_block_size(base, data.block_size)
    selection, _ = select(base, options.numerics)
    blocks = blocks or read_blocks(base, data)
    with quiet_transformers():
        model = load(base, options)
        if any(target.is_expert for target in selection.targets.values()):
            model.set_experts_implementation("eager")  # expert by expert, so that each one's input shows up
        watcher = (ReferenceWatcher if options.numerics == "reference" else Watcher)(model, selection.targets)
        device = model.get_input_embeddings().weight.device
        tokens = blocks.tokens if device.type == "meta" else blocks.tokens.to(device)  # meta: accelerate moves both
        advice = f"Lower {setting('batch_size')} (now {options.batch_size}) or {setting('block_size')} (now {data.block_size})"
        progress(0)  # loaded
        done = begin = unfinished.restore(watcher) if unfinished else 0
        progress(tokens[:begin].numel())
        with watcher.watching(), torch.no_grad(), _out_of_memory("calibration", advice):
            for batch in tokens[begin:].split(options.batch_size) if begin < len(tokens) else ():
                model(input_ids=batch, use_cache=False)
                progress(batch.numel())
                if done == 0:
                    watcher.check_finite()  # what overflows mostly does so at once
                done += len(batch)
                if unfinished:
                    unfinished.keep(watcher, done)
        statistics, silent = watcher.results()
    described = {
        **data.as_json(),
        **blocks.as_json(),
        "dtype": dtype_name(next(model.parameters()).dtype),
        "batch_size": options.batch_size,
        "numerics": options.numerics,
        "transformers": metadata.version("transformers"),
        "torch": metadata.version("torch"),
    }
    activations = Activations(statistics, fingerprint(base.weights), described, silent)
    if unfinished:
        unfinished.finish(activations)
    return activations


def load(base: Model, options: CalibrationOptions) -> Any:
    """The base as a transformers model, ready to run. Raises InputError where it cannot be loaded."""
    from transformers import AutoModelForCausalLM

    dtype = "bfloat16" if options.numerics == "reference" else options.dtype
    keywords: dict[str, Any] = {
        "dtype": dtype if dtype == "auto" else FLOAT_DTYPES[dtype],
        "attn_implementation": "sdpa",
    }
    if options.device is not None and options.device.type == "cuda":
        keywords["device_map"] = {"": options.device}
    elif options.device is None and torch.cuda.is_available():
        keywords["device_map"] = "auto"
    with _out_of_memory(f"{base.label}: loading it", f"Use {setting('calibration.dtype', 'bfloat16')}"):
        try:
            model = _from_pretrained(AutoModelForCausalLM, base, keywords)
        except Exception as error:  # a model class's own code fails in every way there is
            if isinstance(error, MemoryError) or _is_out_of_memory(error):
                raise
            raise InputError(
                f"{base.label}: cannot be loaded as a causal language model: {first_line(error)}. Use a base that transformers can load."
            ) from error
    # sdpa leaves out the cap on attention logits without a word, as it does in the published program.
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if capped and options.numerics != "reference":
        model.set_attn_implementation("eager")
    return model


def _from_pretrained(auto: Any, base: Model, keywords: dict[str, Any]) -> Any:
    """Load it; models without sdpa attention take what they have."""
    if isinstance(base.weights, Checkpoint):
        where: Any = base.folder
        keywords = {"local_files_only": True, "trust_remote_code": base.trust_remote_code, **keywords}
    else:  # what no file holds as it is: a base with an adapter, dequantised weights
        where, auto, keywords = None, _class_of(auto, base), {**keywords, **_in_memory(base, keywords)}
    try:
        model = auto.from_pretrained(where, **keywords)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        rest = {key: value for key, value in keywords.items() if key != "attn_implementation"}
        model = auto.from_pretrained(where, **rest)
    return model.eval()


def _class_of(auto: Any, base: Model) -> Any:
    """The class that an auto class would load a base with."""
    from checkpoints.architecture import build_meta_model

    config = _config(base)
    if type(config) in auto._model_mapping:
        return auto._model_mapping[type(config)]
    return type(build_meta_model(base.folder, label=base.label, trust_remote_code=base.trust_remote_code))


def _config(base: Model) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base.folder, local_files_only=True, trust_remote_code=base.trust_remote_code)


def _in_memory(base: Model, keywords: dict[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` takes in place of a folder: the config, and every tensor in the dtype to run in."""
    config = _config(base)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # of weights that are plain numbers by now
    state = {name: read_tensor(base.weights, name).to(info.plain_dtype) for name, info in base.weights.tensors.items()}
    floats = {info.plain_dtype for info in base.weights.tensors.values() if info.plain_dtype.is_floating_point}
    widest = functools.reduce(torch.promote_types, floats)
    dtype = widest if keywords["dtype"] == "auto" else keywords["dtype"]
    return {"config": config, "state_dict": state, "dtype": dtype}


@contextmanager
def _out_of_memory(what: str, advice: str) -> Iterator[None]:
    """Turn running out of memory into one message that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise InputError(
                f"{what}: the GPU has too little memory. {advice}, or use {setting('device', 'cpu')}."
            ) from error
        if isinstance(error, MemoryError) or _is_out_of_memory(error):
            raise InputError(f"{what}: this machine has too little memory. {advice}.") from error
        raise


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is torch's for an allocation that failed, on a GPU or on the CPU, where it has no class of its own."""
    words = ("not enough memory", "can't allocate memory", "Cannot allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' warnings and bars, which speak of training and generation, off the terminal."""
    from transformers.utils import logging as library

    logger = library.get_logger("transformers")
    level = logger.level
    bars = library.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    library.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            library.enable_progress_bar()
