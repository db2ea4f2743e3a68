"""Merge fine-tuned language models into one checkpoint.

    python merge.py --method dare_ties --base_model unsloth/llama-2-13b \\
        --models_to_merge WizardLMTeam/WizardLM-13B-V1.2,vanillaOVO/WizardMath-13B-V1.0 --save_path ./merged
    python merge.py --method ties --base_model ./base --models_to_merge ./math:0.6,./code:0.4 --density 0.3 \\
        --save_path ./merged --dry_run
    python merge.py --method my_package.my_module:MyMethod --base_model ./base --models_to_merge ./math --save_path ./merged
    python merge.py --config recipe.yml --save_path ./merged
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from checkpoints.errors import ArgumentError, InputError, named_by
from checkpoints.problems import Problems
from checkpoints.screen import say
from checkpoints.settings import setting, show_settings
from commands import aim_flags, shell
from commands.command_line import (
    FLAGS,
    Group,
    Parser,
    parse_choice,
    parse_save_path,
    parse_yes_or_no,
    positive,
    show_flag,
    whole,
)
from merging.methods import METHODS, canonical, get_method, is_outside, parameters_by_key
from merging.parameters import REQUIRED, Parameter

if TYPE_CHECKING:
    import torch

    from aim.reading import Given
    from aim.request import AimRequest
    from alignment.layout import Layout
    from merging.recipe import Recipe
    from streaming.output import RunOptions


BY_LOSS = "loss"
"""What `--weights` says for weights by the models' losses on examples."""


def build_parser(named: Sequence[str] = ()) -> Parser:
    """The flags of merge.py.

    Args:
        named: the methods that the command line names, whose parameters are common flags. Those outside of this program,
            `package.module:Class`, are imported, and their parameters become flags too.

    Raises: ArgumentError: one of them cannot be imported, or its parameters cannot be flags.
    """
    parser = Parser(prog="merge.py", description=__doc__)
    what = parser.add_argument_group("what to merge")
    what.add_argument(
        "--method",
        common=True,
        metavar="METHOD",
        help=", ".join(METHODS) + " (in any case); or one of your own, package.module:Class (docs/adding-a-method.md)",
    )
    what.add_argument("--base_model", common=True, metavar="MODEL", help="what the models were fine-tuned from: a folder, a hub name, NAME@REVISION, a .safetensors or .gguf file; gives config, tokenizer and vocabulary")  # fmt: skip
    what.add_argument("--models_to_merge", common=True, metavar="A,B,C", help="folders, hub names, NAME@REVISION, .safetensors or .gguf files; LoRA adapters too, by themselves or as BASE+ADAPTER; with weights A:0.5,B:0.3")  # fmt: skip
    what.add_argument("--model_data", metavar="A,B,C", help=f"{', '.join(name for name, entry in METHODS.items() if entry.needs_data)}: text of each model's own task, in the order of the models: .jsonl, .json, .txt or .parquet files (or .gz) of texts, or of prompt and answer; with --weights loss one such file of the task that the merge is for")  # fmt: skip
    what.add_argument("--config", common=True, metavar="FILE", help="instead of the three above: a recipe, in mergekit's YAML or the merge_recipe.json of another merge (docs/from-mergekit.md)")  # fmt: skip
    what.add_argument("--write_config", metavar="FILE", help="write what the flags say as such a recipe, and do nothing else")  # fmt: skip
    what.add_argument("--keep_intermediate", metavar="NAME", help="write the recipe's merge of this name too, as SAVE_PATH-NAME, and read it from there; several separated by commas")  # fmt: skip
    what.add_argument(
        "--save_path", common=True, metavar="FOLDER", help="the merged checkpoint; appears when it is complete"
    )
    what.add_argument("--as_lora", action="store_true", help="write the merge as a LoRA adapter of the base, where its changes have low rank: those of adapters added up (docs/adapters.md)")  # fmt: skip
    what.add_argument("--verify", metavar="FOLDER", help="merge nothing: check that every file of a result is what its run wrote (sizes, digests) and that none was added, that every number is finite, and shapes")  # fmt: skip
    how = parser.add_argument_group(
        "how (a flag that the method does not use is an error; --method NAME --help shows those of the method)"
    )
    how.add_argument(
        "--seed",
        type=whole,
        metavar="N",
        help=f"{', '.join(name for name, entry in METHODS.items() if entry.draws)}, --control permuted and random: seed of what is drawn (default 0)",
    )
    how.add_argument("--exclude", metavar="REGEX", help="tensors in whose name this is found are taken from the base")
    layout = parser.add_argument_group("vocabulary and head of the output")
    layout.add_argument("--tokenizer_source", metavar="S", help="whose tokenizer and vocabulary: base, union (the base's and the tokens that models add) or one of the models (default: union where a model adds tokens, else base)")  # fmt: skip
    layout.add_argument("--pad_to_multiple_of", type=positive, metavar="N", help="rows of embedding and head are a multiple of this")  # fmt: skip
    shell.add_layout_flags(layout)
    how.add_argument("--only", metavar="REGEX", help="tensors in whose name this is not found are taken from the base, such as the vision tower's with --only language_model")  # fmt: skip
    aim_flags.add_aim_flags(
        parser,
        omega_help="relax the merge by the base's activations before it is written: 0 puts the most active channel back to the base, 1 changes nothing; also by filter, mlp=0.2,self_attn=0.6,0.4",
    )
    sweeps = parser.add_argument_group("sweeps: one checkpoint for each value, in SAVE_PATH/lambda_0.5 and so on, from one reading of the weights; with --omega each is relaxed, with --omegas as often, in SAVE_PATH/lambda_0.5_omega_0.2")  # fmt: skip
    sweeps.add_argument("--lambdas", metavar="L,L", help="values of --lambda, such as 0.3,0.5,0.7")
    sweeps.add_argument("--densities", metavar="D,D", help="values of --density for all models; with --lambdas every pair, in SAVE_PATH/lambda_0.5_density_0.3 and so on")  # fmt: skip
    shell.add_output_flags(parser)
    report = parser.add_argument_group("report")
    report.add_argument(
        "--report", default="sample", metavar="WHAT", help="sample (one block in 16; default), full or none"
    )
    # Last, so that a method's key that is a flag already is refused as the method's slip.
    more = [
        (name, parameter)
        for name in filter(is_outside, named)
        for parameter, _ in get_method(name).parameters().values()
    ]
    keys = parameters_by_key(more)
    for key, users in keys.items():
        is_common = any(parameter.common or name in named for name, parameter in users)
        add_parameter(how, key, users, common=is_common)
    parser.set_defaults(parameter_keys=tuple(keys))
    return parser


def add_parameter(group: Group, key: str, users: Sequence[tuple[str, Parameter]], *, common: bool) -> None:
    """Add the flag of a recipe key; its help says what each method means by it, and does without.

    Raises: ArgumentError: a method outside of this program has a key that is another flag already.
    """
    said: dict[str, dict[str, list[str]]] = {}
    for name, parameter in users:
        said.setdefault(parameter.help, {}).setdefault(default_text(parameter), []).append(name)
    text = "; ".join(
        f"{clause}: " + "; ".join(f"{', '.join(names)} ({default})" for default, names in defaults.items())
        for clause, defaults in said.items()
    )
    kinds = {parameter.is_switch for _, parameter in users}
    form: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if kinds == {True} else {"metavar": "V"}
    try:
        if len(kinds) != 1:
            raise ValueError("for other methods it is a number where it is a switch here, or the other way round")
        group.add_argument(
            show_flag(key, None),
            common=common,
            help=show_settings(text, show_flag).replace("%", "%%"),
            **form,
        )
    except (argparse.ArgumentError, ValueError) as error:
        name = users[-1][0]
        raise ArgumentError(
            f"{setting('method')}: {name}: its parameter {key} cannot be a flag: {error}. Give the parameter another key."
        ) from error


def default_text(parameter: Parameter) -> str:
    """What a parameter is where nothing is given, for `--help`."""
    if parameter.default is REQUIRED:
        return "required"
    words = {True: "yes", False: "no", None: "as the method does"}
    return f"default {words[parameter.default] if parameter.is_switch else parameter.default}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    named = named_method(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="merge.py")
    try:
        parser = build_parser(named)
    except InputError as error:
        parser.error(str(error.shown(show_flag)))

    def body(arguments: argparse.Namespace) -> None:
        check_required(parser, arguments)
        run(arguments, shell.command(parser, argv))

    return shell.run(parser, body, argv)


def named_method(argv: Sequence[str]) -> list[str]:
    """The method that `--method` names, if it is there: needed before the flags are read, as parameters of one outside of this
    program are flags.

    For such a one the current folder becomes the last place that modules are looked for, as with `python -m`.
    """
    named = [argument.partition("=")[2] for argument in argv if argument.startswith("--method=")]
    named += [value for flag, value in pairwise(argv) if flag == "--method"]
    named = [canonical(name) for name in named[-1:]]
    if any(map(is_outside, named)) or (
        "--trust_remote_code" in argv and any(argument.startswith("--config") for argument in argv)
    ):
        sys.path.append(os.getcwd())
    return named


def check_required(parser: Parser, arguments: argparse.Namespace) -> None:
    """Exit with a message where flags are missing without which nothing is said, before anything heavy is imported."""
    if arguments.verify is not None:
        return
    needed = [] if arguments.config is not None else ["--method", "--base_model", "--models_to_merge"]
    needed += [] if arguments.write_config is not None else ["--save_path"]
    missing = [flag for flag in needed if vars(arguments)[flag.removeprefix("--")] is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")


def run(arguments: argparse.Namespace, command: list[str]) -> None:
    """Flags -> recipe and options -> plan -> merge, relaxed by AIM where asked."""
    if (arguments.verify is not None or arguments.write_config is not None) and not shell.is_first():
        return
    if arguments.verify is not None:
        verify(arguments)
        return
    if arguments.write_config is not None:
        write_config(arguments)
        return
    with (
        shell.processes("merge.py", arguments) as processes,
        shell.refusals_as_json(arguments),
        shell.run_log(arguments.log_file, command) as log,
    ):
        from merging.merge_work import prepare
        from streaming.work import joined

        asked = read_flags(arguments, command)
        if arguments.as_lora:
            if processes is not None:
                raise ArgumentError(
                    f"{setting('as_lora')}: an adapter is made by one process. Start it without torchrun."
                )
            from commands.extract_lora import carry_out
            from commands.merge_as_lora import prepare as prepare_adapter

            upload = shell.read_upload(arguments, [""])
            carry_out(prepare_adapter(asked, arguments, command), upload, arguments, log)
            return
        options = replace(asked.options, log=log, processes=processes)
        asked = replace(asked, recipe=keep_intermediate(asked, arguments, options))
        step = asked.aim.step(asked.save_path, options, dry_run=arguments.dry_run) if asked.aim else None
        own = step.folders if step else [""]
        upload = shell.read_upload(arguments, [joined(merge, one) for merge in asked.sweep or [""] for one in own])
        with named_by(asked.recipe.places):
            make = None
            if asked.sweep:
                from merging.sweep import make_sweep

                make = partial(make_sweep, asked.sweep)
            job = prepare(asked.recipe, asked.save_path, options, step=step, download=not arguments.dry_run, make=make)
            shell.carry_out(job, upload, arguments)


def keep_intermediate(asked: Asked, arguments: argparse.Namespace, options: RunOptions) -> Recipe:
    """Write the named merges that are to be kept, each into a folder of its own. Returns: the recipe that reads them there.

    Raises: Refusals: a name that the recipe does not have; as a merge.
    """
    if arguments.keep_intermediate is None:
        return asked.recipe
    names = [name.strip() for name in arguments.keep_intermediate.split(",")]
    for name in names:
        if name not in asked.recipe.merges:
            known = f"one of {', '.join(asked.recipe.merges)}" if asked.recipe.merges else "a recipe with named merges"
            raise ArgumentError(
                f"{setting('keep_intermediate')}: expected {known}, got {name!r}. Name a merge of the recipe."
            )
    if arguments.dry_run:  # which plans them as what they would be without a folder
        return asked.recipe
    from merging.merge_work import prepare
    from merging.named_merges import in_order, with_folders

    folders: dict[str, Path] = {}
    for name in in_order(asked.recipe.merges, names):
        recipe = with_folders(asked.recipe.merges[name], folders)
        used = {key: merge for key, merge in asked.recipe.merges.items() if key != name and key not in folders}
        folder = asked.save_path.with_name(f"{asked.save_path.name}-{name}")
        shell.carry_out(
            prepare(replace(recipe, merges=used if recipe.uses_merges else {}), folder, options), None, arguments
        )
        folders[name] = folder
    return with_folders(asked.recipe, folders)


@dataclass(frozen=True)
class Asked:
    """What the flags and the file of --config ask for.

    Attributes:
        recipe: what to merge.
        aim: what AIM does to it, None for nothing.
        options: how to run.
        save_path: where to.
        sweep: folder -> recipe of each of several merges; empty for one.
    """

    recipe: Recipe
    aim: AimRequest | None
    options: RunOptions
    save_path: Path
    sweep: Mapping[str, Recipe] = field(default_factory=dict)


def read_flags(arguments: argparse.Namespace, command: list[str]) -> Asked:
    """Everything the flags say. Raises Refusals: every flag that is wrong."""
    problems = Problems()
    device, options, save_path = shell.read_run(arguments, command, problems)
    begin_sweep(arguments, problems)
    recipe = problems.attempt(lambda: read_recipe(arguments))
    sweep = problems.attempt(lambda: read_sweep(arguments, recipe)) or {}
    report = problems.attempt(lambda: read_report(arguments))
    request = problems.attempt(lambda: read_aim(arguments, recipe, device))
    if request and save_path:
        with problems.collect():
            request.check_kept(save_path)
    problems.raise_if_any()
    assert recipe is not None
    assert options is not None
    assert report is not None
    assert save_path is not None
    if device is None and recipe.method_class.needs_data:  # models run
        options = replace(options, stream=replace(options.stream, device=shell.gpu_or_cpu()))
    return Asked(recipe, request, replace(options, report=report), save_path, sweep)


def begin_sweep(arguments: argparse.Namespace, problems: Problems) -> None:
    """Refuse what a sweep excludes, and take its first value for the flag that it goes through, where that is required."""
    for name, key in (("lambdas", "lambda"), ("densities", "density")):
        given = vars(arguments)[name]
        if given is None:
            continue
        if vars(arguments)[key] is not None:
            problems.add(ArgumentError(f"{setting(name)}: excludes {setting(key)}. Give one of the two."))
        for other in ("as_lora", "write_config"):
            if vars(arguments)[other]:
                problems.add(ArgumentError(f"{setting(name)}: excludes {setting(other)}. Give one of the two."))
        if arguments.config is None and not problems:
            vars(arguments)[key] = given.partition(",")[0]


def read_sweep(arguments: argparse.Namespace, recipe: Recipe | None) -> Mapping[str, Recipe]:
    """The recipes of a sweep; none where no flag asks for it. Raises InputError where a value is wrong."""
    if recipe is None or (arguments.lambdas is None and arguments.densities is None):
        return {}
    from merging.sweep import read_sweep

    return read_sweep({"lambdas": arguments.lambdas, "densities": arguments.densities}, recipe)


def read_aim(arguments: argparse.Namespace, recipe: Recipe | None, device: torch.device | None) -> AimRequest | None:
    """AIM as flags and recipe ask for it, None where they do not. Raises InputError where a setting is wrong or stands alone."""
    given = given_of_aim(arguments, recipe)
    if given is None:
        return None
    from aim.reading import make_request

    return make_request(given, shell.device_of_models(device))


def given_of_aim(arguments: argparse.Namespace, recipe: Recipe | None) -> Given | None:
    """What flags and a recipe's section give of AIM's settings; None where AIM takes no part. Raises InputError: flags stand alone."""
    section = recipe.aim if recipe else None
    if section is None and not (recipe is None and arguments.config is not None) and not aim_flags.are_given(arguments):
        return None
    if section is None:
        return aim_flags.read_flags(arguments)
    from aim.reading import agree, read_section

    return agree(read_section(section, arguments.config), aim_flags.read_flags(arguments), arguments.config)


def read_recipe(arguments: argparse.Namespace) -> Recipe:
    """What to merge, from flags or a file. Raises InputError where something is wrong."""
    if arguments.config is not None:
        return read_config(arguments)
    from alignment.layout import Layout
    from merging.recipe_flags import make_recipe

    if arguments.weights == BY_LOSS:
        weigh_by_loss(arguments)
    seed_is_aims = aim_flags.draws(arguments) and not get_method(arguments.method).draws
    layout: Layout | None = None
    recipe: Recipe | None = None
    problems = Problems()
    with problems.collect():
        layout = Layout(**given_layout(arguments))
    with problems.collect():
        recipe = make_recipe(
            arguments.method,
            arguments.base_model,
            arguments.models_to_merge,
            parameters={key: vars(arguments)[FLAGS.get(key, key)] for key in arguments.parameter_keys},
            seed=None if seed_is_aims else arguments.seed,
            out_dtype=arguments.dtype,
            exclude=arguments.exclude,
            only=arguments.only,
            layout=layout,
            model_data=arguments.model_data,
        )
    problems.raise_if_any()
    assert recipe is not None
    return recipe


def weigh_by_loss(arguments: argparse.Namespace) -> None:
    """Put numbers in the place of `--weights loss`, and say them; the text has done its work then. Raises InputError."""
    import torch

    from checkpoints.location import parse_model
    from merging.loss_weights import weights_by_loss

    if not any(parameter.key == "weight" for parameter, _ in get_method(arguments.method).parameters().values()):
        raise ArgumentError(f"{setting('weight', BY_LOSS)}: {arguments.method} has no weights. Leave it out.")
    if arguments.model_data is None or "," in arguments.model_data:
        raise ArgumentError(
            f"{setting('weight', BY_LOSS)}: expected one file of examples of the task that the merge is for. Add {setting('model_data', 'FILE.jsonl')}."
        )
    names = [part.strip() for part in arguments.models_to_merge.split(",")]
    found = weights_by_loss(
        [parse_model(name) for name in names],
        arguments.model_data,
        shell.parse_device(arguments.device) or torch.device("cpu"),
        trust_remote_code=arguments.trust_remote_code,
    )
    if not arguments.quiet and shell.is_first():
        for name, (weight, loss) in zip(names, found, strict=True):
            say(f"note: {name}: loss {loss:.4f} on {arguments.model_data}, weight {weight:.6f}.")
    arguments.weights, arguments.model_data = ",".join(repr(weight) for weight, _ in found), None


def given_layout(arguments: argparse.Namespace) -> dict[str, Any]:
    """What flags say of the output's vocabulary and head, by recipe key. Raises ArgumentError where one is wrong."""
    keys = (
        "tokenizer_source",
        "new_token_rows",
        "pad_to_multiple_of",
        "chat_template",
        "copy_tokenizer_from",
        "allow_config_difference",
    )
    given = {key: vars(arguments)[key] for key in keys}
    given["tie_word_embeddings"] = parse_yes_or_no("tie_word_embeddings", arguments.tie_word_embeddings)
    return {key: value for key, value in given.items() if value is not None}


def read_config(arguments: argparse.Namespace) -> Recipe:
    """What the file of --config says to merge; what flags say besides must not contradict it. Raises Refusals."""
    from merging.recipe_file import read_recipe_file

    problems = Problems()
    for name in ("method", "base_model", "models", "model_data", *arguments.parameter_keys):
        if vars(arguments)[FLAGS.get(name, name)] is not None:
            problems.add(
                ArgumentError(
                    f"{setting(name)}: {setting('config')} says what to merge. Write it into the file, or leave one out."
                )
            )
    recipe: Recipe | None = None
    with problems.collect():
        recipe = read_recipe_file(
            arguments.config,
            seed=None if aim_flags.draws(arguments) else arguments.seed,
            out_dtype=None if arguments.dtype == "auto" else arguments.dtype,
            exclude=arguments.exclude,
            only=arguments.only,
            layout=given_layout(arguments),
            trust_remote_code=arguments.trust_remote_code,
        )
    if recipe and recipe.base_model is None and (recipe.aim is not None or aim_flags.are_given(arguments)):
        problems.add(ArgumentError(f"{arguments.config}: base_model: AIM needs one. Name it, or leave AIM out."))
    problems.raise_if_any()
    assert recipe is not None
    return recipe


def write_config(arguments: argparse.Namespace) -> None:
    """Write the recipe that the flags make as a file. Raises InputError where a flag is wrong, or the file is there."""
    path = Path(arguments.write_config).expanduser()
    problems = Problems()
    recipe: Recipe | None = None
    given: Given | None = None
    with problems.collect():
        recipe = read_recipe(arguments)
    with problems.collect():
        given = given_of_aim(arguments, recipe)
        if given is not None:
            from aim.reading import make_request

            make_request(given)
    where = setting("write_config", path)
    if path.exists() and not arguments.overwrite:
        problems.add(ArgumentError(f"{where}: is there already. Name another file, or add {setting('overwrite')}."))
    elif not path.parent.is_dir() or path.is_dir():
        problems.add(ArgumentError(f"{where}: expected a file in a folder that exists. Name one."))
    problems.raise_if_any()
    from merging.recipe_file import write_recipe_file

    assert recipe is not None
    write_recipe_file(recipe, path, given.as_section() if given else None)
    if not arguments.quiet:
        print(f"{path}: written. Merge with: python merge.py --config {path} --save_path FOLDER")


def verify(arguments: argparse.Namespace) -> None:
    """Check the results of an earlier run. Raises InputError: everything that is wrong with them."""
    from streaming.verify import bytes_in, results_in, verify

    folder = parse_save_path(arguments.verify)
    for result in results_in(folder):
        with shell.progress_bar("verifying", bytes_in(result), quiet=arguments.quiet) as advance:
            verified = verify(result, trust_remote_code=arguments.trust_remote_code, progress=advance)
        for note in verified.notes:
            say(f"note: {result}: {note}")
        if verified.undigested:
            say(f"note: {result}: the run took no digests, so that only sizes were compared.")
        if not arguments.quiet:
            size = shell.gigabytes(verified.bytes)
            files = f"{verified.files - verified.side_files} weight file(s), {verified.side_files} other file(s)"
            print(f"{result}: as written: {files}, {verified.tensors} tensors, {size}, all finite.")


def read_report(arguments: argparse.Namespace) -> Literal["none", "sample", "full"]:
    """How much the merge report looks at. Raises ArgumentError."""
    return parse_choice("report", arguments.report, ("none", "sample", "full"))  # type: ignore[return-value]
