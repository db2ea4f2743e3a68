"""AIM's flags, which performAIM.py and merge.py share; importing this imports no torch."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.errors import ArgumentError, InputError, Refusals, collecting

if TYPE_CHECKING:
    import torch

    from aim.calibrate import CalibrationOptions
    from aim.calibration import CalibrationData
    from aim.relaxing import Relaxing

CALIBRATION_FLAGS = (
    "calibration_data",
    "text_field",
    "n_samples",
    "block_size",
    "calibration_seed",
    "batch_size",
    "calibration_dtype",
    "calibration_tolerance",
    "calibration_mode",
    "max_memory",
)


def add_aim_flags(parser: argparse.ArgumentParser, *, omega_help: str) -> argparse._ArgumentGroup:
    """The flags of relaxing and of calibrating. Their defaults are None, so that it shows which were given.

    Returns: the group of the flags of relaxing.
    """
    how = parser.add_argument_group("activation-informed merging (AIM)")
    how.add_argument("--omega", metavar="O", help=omega_help)
    how.add_argument("--omegas", metavar="O,O", help="a sweep, such as 0,0.2,0.4: one checkpoint each, in SAVE_PATH/omega_0.2 and so on, from one calibration and one reading of the weights")  # fmt: skip
    how.add_argument("--scaling", metavar="S", help="of the importance s: identity (default), sqrt or square")
    how.add_argument("--control", metavar="C", help="uniform or permuted: relax as much, without knowing the channels (a merge that AIM helps no more than these was only too large)")  # fmt: skip
    how.add_argument(
        "--numerics",
        metavar="N",
        help="float32 (default; rounds once) or reference (the published program, bit for bit)",
    )
    how.add_argument("--activations", metavar="FILE", help="use these statistics of the base instead of calibrating")
    how.add_argument("--save_activations", metavar="FILE", help="keep the statistics for --activations")
    how.add_argument("--figures", metavar="FOLDER", help="draw s per kind of layer and over layers")
    text = parser.add_argument_group("calibration of the base model")
    text.add_argument("--calibration_data", metavar="DATA", help="a hub dataset NAME:CONFIG:SPLIT; a .txt (one text a line), .json, .jsonl or .parquet file, or .gz of one; a saved dataset folder (default: mit-han-lab/pile-val-backup::validation, as published)")  # fmt: skip
    text.add_argument("--text_field", metavar="F", help="the field of a row that holds the text (default text)")
    text.add_argument("--n_samples", metavar="N", help="texts (default 256)")
    text.add_argument("--block_size", metavar="N", help="tokens of a block, and of the longest text (default 512)")
    text.add_argument("--calibration_seed", metavar="N", help="of the shuffle that picks the texts (default 42)")
    text.add_argument("--batch_size", metavar="N", help="blocks of a forward pass (default: what is fastest)")
    text.add_argument("--calibration_dtype", metavar="DTYPE", help="of the forward pass: auto (the checkpoint's), float32, bfloat16 or float16 (default: the faster of the checkpoint's and float32)")  # fmt: skip
    text.add_argument("--calibration_tolerance", metavar="T", help="stop when s of the first half of the text and of the second differ by less in every kind of layer, looked at after 2048 tokens, 4096 and so on (default 0.02; 0 runs all of the text, as published)")  # fmt: skip
    text.add_argument("--calibration_mode", metavar="M", help="whole (all weights in memory), layerwise (one layer of them at a time) or auto (what fits; default)")  # fmt: skip
    text.add_argument("--max_memory", metavar="SIZE", help="for weights and hidden states of the calibration, such as 8GB (default: what is free)")  # fmt: skip
    return how


def given_aim_flags(arguments: argparse.Namespace) -> list[str]:
    """AIM's flags that were given, `--omega` and `--omegas` excepted."""
    names = ("scaling", "control", "numerics", "activations", "save_activations", "figures", *CALIBRATION_FLAGS)
    return [f"--{name}" for name in names if getattr(arguments, name) is not None]


def read_relaxing(arguments: argparse.Namespace, *, default_omega: str = "0.4") -> Relaxing:
    """How to relax, from flags. Raises ArgumentError."""
    from aim.omegas import Omega, parse_omega, parse_omegas
    from aim.relaxing import Relaxing

    problems: list[str | InputError] = []
    omegas: tuple[Omega, ...] = (parse_omega(default_omega),)
    with collecting(problems):
        if arguments.omega is not None and arguments.omegas is not None:
            raise ArgumentError("--omegas: excludes --omega. Give one of the two.")
        if arguments.omegas is not None:
            omegas = parse_omegas(arguments.omegas)
        elif arguments.omega is not None:
            omegas = (parse_omega(arguments.omega),)
    with collecting(problems):
        how = Relaxing(
            omegas,
            scaling="identity" if arguments.scaling is None else arguments.scaling,
            control="none" if arguments.control is None else arguments.control,
            seed=arguments.seed or 0,
            numerics="float32" if arguments.numerics is None else arguments.numerics,
            sweep=arguments.omegas is not None,
        )
    if problems:
        raise Refusals(problems)
    return how


def read_calibration(
    arguments: argparse.Namespace, device: torch.device | None
) -> tuple[CalibrationData, CalibrationOptions]:
    """Which texts and how they are run, from flags. Raises ArgumentError: as the two classes, or they are not needed."""
    from aim.calibrate import CalibrationOptions
    from aim.calibration import CalibrationData

    if arguments.activations is not None:
        needless = [f"--{name}" for name in CALIBRATION_FLAGS if getattr(arguments, name) is not None]
        if needless:
            raise ArgumentError(
                f"{needless[0]}: --activations brings the statistics, nothing is calibrated. Leave one of the two out."
            )
        if not Path(arguments.activations).is_file():
            raise ArgumentError(
                f"--activations {arguments.activations}: no such file. Make one with --save_activations."
            )
    given: dict[str, Any] = {"source": arguments.calibration_data, "text_field": arguments.text_field}
    for flag, key in (("n_samples", "n_samples"), ("block_size", "block_size"), ("calibration_seed", "seed")):
        given[key] = _whole(f"--{flag}", getattr(arguments, flag))
    options = CalibrationOptions(
        device=device,
        dtype=arguments.calibration_dtype,
        batch_size=_whole("--batch_size", arguments.batch_size),
        numerics="float32" if arguments.numerics is None else arguments.numerics,
        tolerance=_number("--calibration_tolerance", arguments.calibration_tolerance),
        mode="auto" if arguments.calibration_mode is None else arguments.calibration_mode,
        max_memory=_size("--max_memory", arguments.max_memory),
    )
    return CalibrationData(**{key: value for key, value in given.items() if value is not None}), options


def _whole(flag: str, text: str | None) -> int | None:
    """A flag's whole number, None where it was not given. Raises ArgumentError."""
    if text is None or re.fullmatch(r"-?\d{1,18}", text):
        return None if text is None else int(text)
    raise ArgumentError(f"{flag}: expected a whole number, got {text!r}.")


def _number(flag: str, text: str | None) -> float | None:
    """A flag's number, None where it was not given. Raises ArgumentError."""
    if text is None or re.fullmatch(r"-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
        return None if text is None else float(text)
    raise ArgumentError(f"{flag}: expected a number, got {text!r}.")


def _size(flag: str, text: str | None) -> int | None:
    """A flag's number of bytes, None where it was not given. Raises ArgumentError."""
    found = re.fullmatch(r"(\d{1,15})(B|KB|MB|GB|TB)?", text.upper()) if text is not None else None
    if text is not None and found is None:
        raise ArgumentError(f"{flag}: expected a size such as 500MB or 8GB, got {text!r}.")
    return None if found is None else int(found[1]) * 1000 ** ("B", "KB", "MB", "GB", "TB").index(found[2] or "B")


def _is_replaceable(path: Path) -> bool:
    """Whether an activations file may take the place of this one, which it may only if it is one."""
    from aim.statistics import is_activations_file

    try:
        return is_activations_file(path, str(path))
    except InputError:
        return False


def check_files(arguments: argparse.Namespace) -> list[InputError]:
    """Everything that keeps --save_activations and --figures from being written, known before the base is run for them."""
    from checkpoints.staging import existing_ancestor, is_writable, partial_folder

    problems: list[InputError] = []
    if arguments.save_activations is not None and arguments.activations is not None:
        problems.append(
            ArgumentError("--save_activations: --activations brings statistics that are kept already. Leave one out.")
        )
    out = Path(arguments.save_path).expanduser().resolve()
    for flag, text in (("--save_activations", arguments.save_activations), ("--figures", arguments.figures)):
        if text is None:
            continue
        path, is_file = Path(text).expanduser().resolve(), flag == "--save_activations"
        kind = "file" if is_file else "folder"
        if not text.strip():
            problems.append(ArgumentError(f"{flag}: expected a {kind}, got nothing. Name one."))
        elif path.exists() and path.is_dir() == is_file:
            problems.append(
                ArgumentError(
                    f"{flag} {text}: expected a {kind}, got a {'folder' if is_file else 'file'}. Name another."
                )
            )
        elif {out, partial_folder(out)} & {path, *path.parents}:
            problems.append(
                ArgumentError(f"{flag} {text}: lies in --save_path, which appears whole. Name a {kind} elsewhere.")
            )
        elif is_file and path.exists() and not _is_replaceable(path):
            problems.append(
                ArgumentError(f"{flag} {text}: is no activations file, and is not replaced by one. Name another.")
            )
        elif not is_writable(path if path.is_dir() else existing_ancestor(path)):
            problems.append(InputError(f"{flag} {text}: cannot be written. Name another {kind} or change permissions."))
    return problems
