"""What comes out of each format's own reader is the text that went in, and nothing else."""

from __future__ import annotations

import csv
import io
import re
import subprocess

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from checkpoints import escaping

SIGNS = "`*_{}[]()<>#+-.!|~&$:@=^%\\\"'\r\n\t\x1b\x9b\u202e\u2028\x00;,/ aAw19é\uff1d"
TEXTS = st.one_of(
    st.text(st.sampled_from(SIGNS), max_size=20),
    st.text(max_size=20),
    st.lists(
        st.sampled_from([
            "\n", "# x", "<img src=x>", "[y](http:e)", "http://e.example", "www.e.example", "a", "&lt;", "```", "|", "=1+1", "---",
            "\\immediate\\write18{x}", "%", "1. x", "- x", "$x$", "![i](u)", "~~x~~", "[r]: u", "--", " ", "_", "dare_ties", "'",
        ]),
        max_size=5,
    ).map("".join),
)  # fmt: skip
MARKDOWN = MarkdownIt("gfm-like", {"html": True, "linkify": False}).disable("linkify")


def many(test):
    return settings(max_examples=300, deadline=None, database=None)(given(TEXTS)(test))


@many
def test_visible_text_is_one_line_of_printable_signs(text):
    shown = escaping.visible(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()
    assert escaping.terminal(text).split("\n") == [escaping.visible(line) for line in text.split("\n")]


# ----------------------------------------------------------------------------------------------------------------- CSV


@many
def test_csv(text):
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerow(["a", escaping.csv_cell(text), "b"])
    (row,) = csv.reader(io.StringIO(written.getvalue()))
    assert [row[0], escaping.csv_text(row[1]), row[2]] == ["a", escaping.visible(text), "b"]
    first = row[1].lstrip()[:1]
    assert first not in set(escaping.FORMULA) or re.fullmatch(r"[-+]?\d+(\.\d+)?([eE][-+]?\d+)?", row[1])


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\t=", "\r=", " =", "'", "\uff1d"])
def test_formulas_are_texts(begin):
    assert escaping.csv_cell(f"{begin}HYPERLINK(1)")[0] in "'\\"


@pytest.mark.parametrize(
    ("value", "cell"), [(-1.5, "-1.5"), (0, "0"), (-1e-300, "-1e-300"), ("-1.5", "-1.5"), (None, ""), ("-a", "'-a")]
)
def test_numbers_stay_numbers(value, cell):
    assert escaping.csv_cell(value) == cell
    assert escaping.csv_cell(float("-inf")) == "-inf"


# --------------------------------------------------------------------------------------------------------------- LaTeX

LATEX_TOKEN = re.compile(
    r"\\text(?P<name>backslash|asciitilde|asciicircum|less|greater|bar|asciigrave)\{\}|\\(?P<sign>[&%$#_{}])|\{(?P<group>\[|\]|\*|'')\}"
    r"|(?P<nothing>\{\})|(?P<plain>[^\\{}&%$#_~^<>|\[\]*\"`])"
)
LATEX_NAMES = {
    "backslash": "\\", "asciitilde": "~", "asciicircum": "^", "less": "<", "greater": ">", "bar": "|", "asciigrave": "`",
}  # fmt: skip


@many
def test_latex(text):
    written, at, read = escaping.latex(text), 0, []
    while at < len(written):
        token = LATEX_TOKEN.match(written, at)
        assert token, f"TeX would obey {written[at:]!r}"
        found = token.groupdict()
        group = '"' if found["group"] == "''" else found["group"]
        read.append(LATEX_NAMES.get(found["name"] or "") or found["sign"] or group or found["plain"] or "")
        at = token.end()
    assert "".join(read) == escaping.visible(text)
    assert "--" not in written
    assert escaping.latex_comment(text) == f"% {escaping.visible(text)}"


# ------------------------------------------------------------------------------------------------------------ Markdown


def inline(block: str) -> list[tuple[str, str]]:
    """(type, content) of the parts of Markdown's blocks; neighbouring texts joined."""
    return [part for token in MARKDOWN.parse(block) if token.type == "inline" for part in parts_of(token)]


def parts_of(token) -> list[tuple[str, str]]:
    joined: list[tuple[str, str]] = []
    for part in token.children or ():
        kind = "text" if part.type == "text_special" else part.type
        if joined and joined[-1][0] == kind == "text":
            joined[-1] = (kind, joined[-1][1] + part.content)
        else:
            joined.append((kind, part.content))
    return [part for part in joined if part != ("text", "")]


def shape(block: str) -> list[str]:
    return [token.type for token in MARKDOWN.parse(block)]


@many
@example("1. x")
@example("[x]: y")
def test_markdown_text(text):
    expected = [("text", escaping.visible(text).strip())] if escaping.visible(text).strip() else []
    written = escaping.markdown(text)
    for before, after in (("", ""), ("- ", ""), ("# ", ""), ("x\n\n", "\n\ny")):
        block = f"{before}{written}{after}"
        plain = [("text", "x"), *expected, ("text", "y")] if after else expected
        assert inline(block) == plain
        if expected:
            assert shape(block) == shape(f"{before}z{after}")
    assert inline(f"x {escaping.markdown_inside(text)}y") == [("text", f"x {escaping.visible(text)}y")]


@many
def test_markdown_tables(text):
    shown = escaping.visible(text).strip()
    for cell in (escaping.markdown(text), escaping.markdown_code_cell(text)):
        table = f"| a | b |\n| --- | --- |\n| {cell} | y |\n"
        assert shape(table) == shape("| a | b |\n| --- | --- |\n| z | y |\n")
        read = inline(table)[2:-1]
        assert [content.strip() for _, content in read] == ([shown] if shown else [])
        assert {kind for kind, _ in read} <= {"text", "code_inline"}


@many
def test_markdown_code(text):
    block = f"x {escaping.markdown_code(text)}, `y`"
    assert inline(block) == [
        ("text", "x "),
        ("code_inline", escaping.visible(text) or " "),
        ("text", ", "),
        ("code_inline", "y"),
    ]


def test_names_stay_readable():
    for name in (
        "dare_ties",
        "code+math",
        "ties (density 0.2)",
        "unsloth/llama-2-13b",
        "a: b",
        "R&D",
        "0.4,mlp=0.2",
        "v1.2",
    ):
        assert escaping.markdown(name) == name
        assert escaping.latex(name).replace("\\", "") == name
        assert escaping.csv_cell(name) == name


@many
def test_yaml(text):
    front = f"a:\n- {escaping.yaml_text(text)}\nb: {escaping.yaml_text(text)}\nc: 1\n"
    shown = escaping.visible(text)
    assert yaml.safe_load(front) == {"a": [shown], "b": shown, "c": 1}


@settings(max_examples=30, deadline=None, database=None)
@given(st.lists(TEXTS.filter(lambda text: "\0" not in text and not re.search("[\ud800-\udfff]", text)), max_size=6))
def test_shell(words):
    line = escaping.shell(["printf", "%s\\0", *words])
    assert line.isprintable()
    environment = {"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"}
    said = subprocess.run(["bash", "-c", line], capture_output=True, check=True, env=environment)
    assert said.stdout.decode().split("\0")[:-1] == (words or [""])
