"""AIM's flags, which performAIM.py and merge.py share; importing this imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.errors import ArgumentError

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
)


def add_aim_flags(parser: argparse.ArgumentParser, *, omega_help: str) -> None:
    """The flags of relaxing and of calibrating. Their defaults are None, so that it shows which were given."""
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
    text.add_argument("--n_samples", type=int, metavar="N", help="texts (default 256)")
    text.add_argument(
        "--block_size", type=int, metavar="N", help="tokens of a block, and of the longest text (default 512)"
    )
    text.add_argument(
        "--calibration_seed", type=int, metavar="N", help="of the shuffle that picks the texts (default 42)"
    )
    text.add_argument("--batch_size", type=int, metavar="N", help="blocks of a forward pass (default 1)")
    text.add_argument("--calibration_dtype", metavar="DTYPE", help="of the forward pass: auto (the checkpoint's; default), float32, bfloat16 or float16")  # fmt: skip


def given_aim_flags(arguments: argparse.Namespace) -> list[str]:
    """AIM's flags that were given, `--omega` and `--omegas` excepted."""
    names = ("scaling", "control", "numerics", "activations", "save_activations", "figures", *CALIBRATION_FLAGS)
    return [f"--{name}" for name in names if getattr(arguments, name) is not None]


def read_relaxing(arguments: argparse.Namespace, *, default_omega: str = "0.4") -> Relaxing:
    """How to relax, from flags. Raises ArgumentError."""
    from aim.omegas import parse_omega, parse_omegas
    from aim.relaxing import Relaxing

    if arguments.omega is not None and arguments.omegas is not None:
        raise ArgumentError("--omegas: excludes --omega. Give one of the two.")
    omegas = (
        parse_omegas(arguments.omegas)
        if arguments.omegas is not None
        else (parse_omega(arguments.omega or default_omega),)
    )
    return Relaxing(
        omegas,
        scaling=arguments.scaling or "identity",
        control=arguments.control or "none",
        seed=arguments.seed or 0,
        numerics=arguments.numerics or "float32",
    )


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
    renamed = {"calibration_data": "source", "calibration_seed": "seed"}
    keys = ("calibration_data", "text_field", "n_samples", "block_size", "calibration_seed")
    given: dict[str, Any] = {
        renamed.get(key, key): getattr(arguments, key) for key in keys if getattr(arguments, key) is not None
    }
    options = CalibrationOptions(
        device=device,
        dtype=arguments.calibration_dtype or "auto",
        batch_size=1 if arguments.batch_size is None else arguments.batch_size,
        numerics=arguments.numerics or "float32",
    )
    return CalibrationData(**given), options
