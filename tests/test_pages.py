"""The pages tell the truth: their command lines run, what they print is what was printed, and what they name is there."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from commands.flags_page import anchor
from tests import pages
from tests.pages import PAGES, ROOT, blocks_of, compare, run_page

TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
WITH_COMMANDS = [name for name, text in TEXTS.items() if any(block.language in ("sh", "python") for block in blocks_of(text))]  # fmt: skip
WITH_SLOW = [name for name in WITH_COMMANDS if any(block.word == "slow" for block in blocks_of(TEXTS[name]))]


@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_the_commands_of_a_page_run_and_print_what_it_says(name: str, tmp_path: Path):
    problems, _ = run_page(name, tmp_path, slow=False)
    assert not problems, "\n\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_SLOW)
def test_the_long_commands_of_a_page_run_and_print_what_it_says(name: str, tmp_path: Path):
    problems, _ = run_page(name, tmp_path, slow=True)
    assert not problems, "\n\n".join(problems)


# ---------------------------------------------------------------------------------------------- what a page may contain


def outside_blocks(text: str) -> str:
    """A page without its fenced blocks."""
    return pages.FENCE.sub("", text)


@pytest.mark.parametrize("name", PAGES)
def test_commands_stand_in_blocks(name: str):
    """Where they are run; an indented line would not be."""
    assert re.findall(r"^ {4,}(?:python|make|pip|git) .*$", outside_blocks(TEXTS[name]), re.MULTILINE) == []


@pytest.mark.parametrize("name", PAGES)
def test_the_first_command_of_a_page_runs_on_what_the_repository_has(name: str):
    shells = [block for block in blocks_of(TEXTS[name]) if block.language == "sh"]
    if name.startswith("docs/"):
        of_make = all(command.startswith("make ") for command in shells[0].commands)
        assert shells[0].word in ("", "slow") or of_make, f"line {shells[0].line}"
        missing = [path for path in re.findall(r"(?<![\w./])(?:examples|docs|tests)/[\w./-]+", shells[0].text) if not (ROOT / path).exists()]  # fmt: skip
        assert missing == []


def test_pages_that_are_followed_in_one_folder_do_not_get_into_each_others_way():
    """What one page's commands write, no other page's write otherwise: the second would be refused, as the folder is not empty."""
    written: dict[str, set[str]] = {}
    for name, text in TEXTS.items():
        own = [block for block in blocks_of(text) if block.language == "sh" and block.word in ("", "slow")]
        for command in (command for block in own for command in block.commands if "--dry_run" not in command):
            for path in re.findall(r"--(?:save_path|study|save_activations|write_config) (\S+)", command):
                written.setdefault(path.removeprefix("./"), set()).add(name)
    assert len(written) > 40
    assert {path: names for path, names in written.items() if len(names) > 1} == {}


COMMAND = re.compile(r"`(python \S+\.py[^`]*|python -m [^`]*|make [a-z][^`]*|pip install [^`]*)`")


@pytest.mark.parametrize("name", PAGES)
def test_commands_inside_sentences_could_be_run(name: str, tmp_path: Path):
    """Their flags, targets and files are there; the values may be placeholders."""
    runner = pages.Runner(ROOT, slow=False)
    for line in COMMAND.findall(outside_blocks(TEXTS[name])):
        words = shlex.split(line.replace("...", ""))
        if words[0] == "python" and words[1] in pages.SCRIPTS:
            known = script_flags(words[1])
            assert {word.partition("=")[0] for word in words[2:] if word.startswith("--")} <= known, line
        elif words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {word.rstrip(",.") for word in words[1:] if "=" not in word} <= set(targets), line
        else:
            assert pages.OTHERS[words[0]](runner, line, words[1:], False) == "", line


def script_flags(script: str) -> set[str]:
    """The flags of a script."""
    import importlib

    parser = importlib.import_module(script.removesuffix(".py")).build_parser()
    return {option for action in parser._actions for option in action.option_strings}


FLAG = re.compile(r"(?<![\w-])--(?:no-)?[a-z][\w-]*")


OF_OTHERS = {
    "--private", "--index-url", "--install", "--share",  # hf, pip, wsl, the method of docs/adding-a-method.md
    "--hidden", "--layers", "--intermediate", "--heads", "--kv_heads", "--vocabulary",  # benchmarks/calibration_speed.py's shape
    "--nnodes", "--nproc_per_node", "--node_rank", "--master_addr", "--master_port", "--num_processes", "--cpu",  # torchrun, accelerate
}  # fmt: skip


def known_flags() -> set[str]:
    """Every flag of the commands, of the programs in examples, benchmarks and tests, and of the Makefile."""
    ours = {flag for script in pages.SCRIPTS for flag in script_flags(script)}
    folders = ("examples", "benchmarks", "tests", "commands")
    sources = [path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py")]
    declared = {flag for text in sources for flag in re.findall(r'add_argument\(\s*"(--[\w-]+)"', text)}
    return ours | declared | {f"--no-{flag[2:]}" for flag in declared} | OF_OTHERS


def test_every_flag_that_a_page_mentions_exists():
    known = known_flags()
    wrong = {
        f"{name}: {flag}"
        for name, text in TEXTS.items()
        for flag in FLAG.findall(re.sub(r"^```markdown\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
        if flag not in known
    }
    assert wrong == set()


@pytest.mark.parametrize("name", PAGES)
def test_links_between_pages_lead_somewhere(name: str):
    here = (ROOT / name).parent
    text = outside_blocks(TEXTS[name])
    links = re.findall(r"\]\((?!https?://)([^)\s]+)\)", text) + re.findall(
        r'(?:src|srcset|href)="(?!https?://)([^"]+)"', text
    )
    for target in links:
        file, _, part = target.partition("#")
        path = here / file if file else ROOT / name
        assert path.exists(), target
        if part and path.suffix == ".md":
            page = outside_blocks(path.read_text(encoding="utf-8"))
            headings = [anchor(heading) for heading in re.findall(r"^#+ (.+?) *$", page, re.MULTILINE)]
            assert part in headings, target


def test_every_page_is_on_the_index():
    index = TEXTS["docs/index.md"]
    linked = {f"docs/{target}" for target in re.findall(r"\]\(([\w-]+\.md)", index)}
    assert {name for name in PAGES if name.startswith("docs/")} - linked == {"docs/index.md"}


def test_figures_suit_light_and_dark_pages_and_say_what_to_see():
    """Each is an SVG with colours for either; a sentence stands for it where it is not shown, and one below says what to see."""
    shown = set()
    for name, text in TEXTS.items():
        for alt, target, rest in re.findall(r"!\[(.*?)\]\((.*?)\)\n\n(.*)", text):
            path = (ROOT / name).parent / target
            assert "@media (prefers-color-scheme: dark)" in path.read_text(), target
            assert len(alt.split()) > 4, f"{name}: {alt!r}"
            assert name == "README.md" or re.fullmatch(r"\*[^*]{40,}\*", rest), f"{name}: {target}"
            shown.add(path.resolve())
        assert len(re.findall(r"!\[", text)) == len(re.findall(r"!\[.*?\]\(.*?\.svg\)\n\n.", text)), name
    assert set((ROOT / "docs/figures").iterdir()) == shown


# -------------------------------------------------------------------------------------------------------- the README


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].encode()) < 6000


def tree() -> list[str]:
    """The names in the README's tree."""
    block = next(block for block in blocks_of(TEXTS["README.md"]) if block.word == "drawing")
    rows = [re.fullmatch(r"((?:\S+, )*\S+)  +\S.*", line) for line in block.text.splitlines()]
    assert all(rows), block.text
    return [name for row in rows if row for name in row[1].split(", ")]


def test_the_tree_of_the_readme_is_the_top_of_the_repository():
    assert [name for name in tree() if not (ROOT / name).exists()] == []
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout, so nobody knows which files belong to it")
    top = {name.split("/")[0] for name in listed.stdout.split("\0") if name} - {".gitignore", ".ci"}
    assert sorted(top - {name.rstrip("/") for name in tree()}) == []


# ------------------------------------------------------------------------------------------------------ the comparing


def test_a_block_is_held_to_what_was_printed():
    run = [
        "read 5 files",
        "omega 0.4: 20 tensors; mean s 0.333",
        "in 0.28 s (0.003 GB/s), peak memory 574.55 MB",
        "end",
    ]
    assert compare(run, run).problem == ""
    assert compare([*run[:2], "in 1.5 s (0.1 GB/s),  peak memory 3.1 GB", "end"], run).problem == ""
    assert compare([run[0], "...", "end"], run).problem == ""
    assert compare(["...", run[1], "..."], run).problem == ""
    assert compare([run[0], "omega 0.4: 20 tensors; mean s 0.336", "..."], run).problem == ""
    assert "0.393" in compare([run[0], "omega 0.4: 20 tensors; mean s 0.393", "..."], run).problem
    assert "6 files" in compare(["read 6 files", "..."], run).problem
    assert "no more" in compare(run[:3], run).problem
    assert "nothing more" in compare([*run, "and"], run).problem
    assert "21" in compare([run[0], "omega 0.4: 21 tensors; mean s 0.333", "..."], run).problem
    assert pages.rewritten([run[0], "...", "omega 0.4: 9 tensors; mean s 0.9"], run)[2] == run[1]


def test_a_page_that_lies_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A flag that is not there, a wrong line, a block of an unknown kind."""
    (tmp_path / "root").mkdir()
    page = "# P\n\n```sh\nls texts.jsonl\npython merge.py --lamda 1\nrm -r x\n```\n\n```text\ntexts.json\n...\n```\n"
    (tmp_path / "root/P.md").write_text(page)
    monkeypatch.setattr(pages, "furnish", lambda folder: (folder / "texts.jsonl").touch())
    monkeypatch.setattr(pages, "ROOT", tmp_path / "root")
    problems, _ = run_page("P.md", tmp_path, slow=False)
    assert len(problems) == 2
    assert "Did you mean '--lambda'" in problems[0]
    assert "got rm" in problems[0]
    assert "printed: texts.json\nthe run: texts.jsonl" in problems[1]
    with pytest.raises(AssertionError, match="sh never"):
        blocks_of("```sh never\nls\n```\n")
    with pytest.raises(AssertionError, match="without a language"):
        blocks_of("```\nls\n```\n")
