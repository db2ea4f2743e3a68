"""Help: the short one, the whole one, and the page of all flags that is made of the same parsers."""

from __future__ import annotations

import importlib
import re

import pytest

import merge
from commands import flags_page
from commands.command_line import Parser
from tests.scene import call

PARSERS = {name: importlib.import_module(module).build_parser() for name, module in flags_page.COMMANDS.items()}


def options(parser: Parser, *, common: bool = False) -> set[str]:
    """What a parser's flags are called; of the common ones alone."""
    flags = [action for group in parser.groups for action in (group.common if common else group.flags)]
    return {option for action in flags for option in action.option_strings}


def shown(text: str) -> set[str]:
    """The flags that a help lists: those that begin a line."""
    lines = re.findall(r"^  (-.*?)(?:  |$)", text, re.MULTILINE)
    return {flag for line in lines for flag in re.findall(r"(?<!\S)--[\w-]+", line)}


@pytest.mark.parametrize("name", PARSERS)
def test_help_shows_the_common_flags_and_help_all_every_flag(name: str):
    parser = PARSERS[name]
    module = importlib.import_module(flags_page.COMMANDS[name])
    about = {"--help", "--help-all", "--version"}
    short, whole = call(module, "--help").out, call(module, "--help-all").out
    assert shown(short) == options(parser, common=True) | about
    assert shown(whole) == options(parser) | about
    assert options(parser) | about == {o for a in parser._actions for o in a.option_strings if o.startswith("--")}
    left = len([flag for group in parser.groups for flag in group.flags if flag not in group.common])
    assert (
        f"\n{left} more flags: {name} --help-all, or docs/flags.md.\n" in short if left else "more flags" not in short
    )
    assert "more flags" not in whole
    assert 6 <= len(options(parser, common=True)) <= 14  # a dozen


def test_a_required_flag_is_common():
    for parser in PARSERS.values():
        for group in parser.groups:
            assert {flag for flag in group.flags if flag.required} <= set(group.common)


def test_usage_names_what_is_required():
    assert call(merge, "--help").out.startswith("usage: merge.py [flags]\n")
    first = "usage: compare_models.py FILE [flags]\n"
    assert call(importlib.import_module("compare_models"), "--help").out.startswith(first)
    first = "usage: extract_lora.py --model MODEL --base_model MODEL --save_path FOLDER [flags]\n"
    assert call(importlib.import_module("extract_lora"), "--help").out.startswith(first)


def test_help_of_a_method_shows_its_own_flags():
    usual = shown(call(merge, "--help").out)
    assert shown(call(merge, "--method", "SLERP", "--help").out) == usual | {"--t"}
    assert shown(call(merge, "--method=ties", "--help").out) == usual | {
        "--normalize", "--no-normalize", "--rescale", "--no-rescale"
    }  # fmt: skip
    assert shown(call(merge, "--method", "none_of_ours", "--help").out) == usual


def test_the_page_of_flags_is_that_of_the_commands():
    made = flags_page.make_page()
    assert flags_page.PAGE.read_text(encoding="utf-8") == made, "run: python -m commands.flags_page --write"


def test_the_page_has_every_flag_once_and_in_its_tables():
    _, *sections = re.split(r"^## ", flags_page.make_page(), flags=re.MULTILINE)
    assert [section.partition("\n")[0] for section in sections] == list(PARSERS)
    for section, parser in zip(sections, PARSERS.values(), strict=True):
        rows = re.findall(r"^\| (?:\*\*)?(`.*?`)(?:\*\*)? \| (.+) \|$", section, re.MULTILINE)
        assert len(rows) == sum(len(group.flags) for group in parser.groups)
        listed = [flag for cell, _ in rows for flag in re.findall(r"`(--[\w-]+)", cell)]
        assert sorted(listed) == sorted(options(parser))
        assert all(not re.search(r"(?<!\\)\|", text) for _, text in rows)


def test_the_page_prints_what_it_writes(capsys: pytest.CaptureFixture[str]):
    assert flags_page.main([]) == 0
    assert capsys.readouterr().out == flags_page.make_page()
