"""AIM's flags, which performAIM.py and merge.py share: flags -> values by setting; importing this imports no torch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from checkpoints.errors import ArgumentError
from checkpoints.settings import setting
from commands.command_line import Group, Parser

if TYPE_CHECKING:
    from aim.reading import Given

SETTINGS = {
    "omega": "omega",
    "omegas": "omegas",
    "protect": "protect",
    "scaling": "scaling",
    "control": "control",
    "numerics": "numerics",
    "seed": "seed",
    "activations": "statistics",
    "save_activations": "save_activations",
    "figures": "figures",
    "calibration_data": "calibration.source",
    "text_field": "text_field",
    "n_samples": "n_samples",
    "block_size": "block_size",
    "calibration_seed": "calibration.seed",
    "batch_size": "batch_size",
    "calibration_dtype": "calibration.dtype",
    "calibration_tolerance": "calibration.tolerance",
    "calibration_mode": "calibration.mode",
    "max_memory": "max_memory",
}
"""Flag -> the setting of `aim.reading` that it gives."""
NOT_ALONE = [flag for flag in SETTINGS if flag not in ("omega", "omegas", "seed")]
"""Flags of merge.py that mean nothing without omega."""


def add_aim_flags(parser: Parser, *, omega_help: str, alone: bool = False) -> Group:
    """The flags of relaxing and of calibrating. Their defaults are None, so that it shows which were given.

    Args:
        alone: AIM is all that the command does, so that more of them are common.

    Returns: the group of the flags of relaxing.
    """
    how = parser.add_argument_group("activation-informed merging (AIM)")
    how.add_argument("--omega", common=True, metavar="O", help=omega_help)
    how.add_argument("--omegas", common=alone, metavar="O,O", help="a sweep, such as 0,0.2,0.4: one checkpoint each, in SAVE_PATH/omega_0.2 and so on, from one calibration and one reading of the weights")  # fmt: skip
    how.add_argument("--protect", common=True, metavar="P", help="what of the base: channels (default; by the importance s of each input channel, as published) or mean (its answer to the mean input of each weight: W_merged - (1 - omega) (D u) u^T)")  # fmt: skip
    how.add_argument("--scaling", metavar="S", help="of the importance s: identity (default), sqrt or square; after_first, after_first_sqrt, after_first_square: the same without the first token of each block, which takes massive activations on itself")  # fmt: skip
    how.add_argument("--control", metavar="C", help="uniform or permuted, with --protect mean also random: relax as much, without knowing the base's inputs (a merge that AIM helps no more than these was only too large); without_top: as AIM, but the channels that stand out stay as merged")  # fmt: skip
    how.add_argument(
        "--numerics",
        metavar="N",
        help="float32 (default; rounds once) or reference (the published program, bit for bit)",
    )
    how.add_argument(
        "--activations", common=alone, metavar="FILE", help="use these statistics of the base instead of calibrating"
    )
    how.add_argument("--save_activations", common=alone, metavar="FILE", help="keep the statistics for --activations")
    how.add_argument("--figures", metavar="FOLDER", help="draw s per kind of layer and over layers")
    text = parser.add_argument_group("calibration of the base model")
    text.add_argument("--calibration_data", common=True, metavar="DATA", help="a hub dataset NAME:CONFIG:SPLIT; a .txt (one text a line), .json, .jsonl or .parquet file, or .gz of one; a saved dataset folder (default: mit-han-lab/pile-val-backup::validation, as published)")  # fmt: skip
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


def are_given(arguments: argparse.Namespace) -> bool:
    """Whether flags ask for AIM: for an omega. Raises ArgumentError: other flags of AIM's stand alone."""
    if arguments.omega is not None or arguments.omegas is not None:
        return True
    for flag in NOT_ALONE:
        if vars(arguments)[flag] is not None:
            omega = setting("omega")
            raise ArgumentError(
                f"{setting(SETTINGS[flag])}: belongs to AIM. Add {omega}, such as {setting('omega', 0.4)}, or leave it out."
            )
    return False


def read_flags(arguments: argparse.Namespace) -> Given:
    """What flags give of AIM's settings, each a value of its kind."""
    from aim.reading import read_values

    return read_values({name: vars(arguments)[flag] for flag, name in SETTINGS.items()})


def draws(arguments: argparse.Namespace) -> bool:
    """Whether the control that flags ask for draws from the seed."""
    if arguments.control is None:
        return False
    from aim.choices import DRAWN

    return arguments.control in DRAWN
