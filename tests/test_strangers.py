"""Regular expressions and chat templates of strangers: the same as without limits, and ended where they do not end."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import merge
from checkpoints.adapters import AdapterConfig
from checkpoints.chat_templates import check_template, foreign_markers
from checkpoints.errors import ArgumentError, InputError
from checkpoints.patterns import Pattern
from checkpoints.strangers import STRANGERS, Strangers, StrangersError
from evaluation.chat_template import TRIAL, TemplateFault, check_chat_template, confined
from merging.recipe_file import read_recipe_file

MODELS = Path(__file__).resolve().parent.parent / "examples/family/models"
NAME = "model.layers.1.mlp.down_proj.weight"
EXPLOSIVE = r"(.|.)*!"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
WRITES = "{% for a in range(99999) %}{% for b in range(99999) %}" + "x" * 99999 + "{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def impatient():
    """A process that may use one second, where the program's own may use five."""
    strangers = Strangers(seconds=1, memory_bytes=256 << 20)
    yield strangers
    strangers.close()


# ------------------------------------------------------------------------------------------------- regular expressions


@pytest.mark.filterwarnings("ignore::FutureWarning")
@settings(max_examples=150, deadline=None, database=None)
@given(
    st.text(st.sampled_from("ab.1[]()|*+?{},:^$\\dwi=!<>P-&~#"), max_size=12),
    st.lists(st.text(st.sampled_from("ab.1\n[é{"), max_size=8), max_size=4),
)
def test_expressions_mean_what_re_says(text, names):
    try:
        expected = [re.compile(text).search(name) is not None for name in ["", *names]]
    except re.error:
        with pytest.raises(ArgumentError, match="expected a regular expression"):
            Pattern("here", text)
    else:
        assert Pattern("here", text).find(["", *names]) == expected


def test_an_expression_that_does_not_end_is_ended_and_the_next_one_is_answered(impatient):
    with pytest.raises(StrangersError, match="it takes more than 1 seconds") as caught:
        impatient.ask("find", pattern=EXPLOSIVE, texts=[NAME])
    assert caught.value.kind == "Limit"
    assert impatient.ask("find", pattern="mlp", texts=[NAME, "x"]) == [True, False]


def test_the_clock_ends_what_uses_no_processor(monkeypatch):
    strangers = Strangers(clock_seconds=0.0)
    with pytest.raises(StrangersError, match="it takes more than"):
        strangers.ask("check", pattern="a")
    strangers.close()


def test_a_current_folder_that_was_deleted_is_not_needed(monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    strangers = Strangers()
    compiled = strangers.ask("compile_template", template="{{ messages }}")
    strangers.close()
    assert not compiled


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(", "unterminated"),
        ("a{99999999999999}", "too large"),
        ("(" * 9000 + ")" * 9000, "recursion"),
        ("*", "repeat"),
    ],
)
def test_what_is_no_expression(text, reason):
    with pytest.raises(ArgumentError, match=f"here: expected a regular expression.*{reason}") as caught:
        Pattern("here", text)
    assert len(str(caught.value)) < 500


def test_one_message_names_the_pattern(monkeypatch, impatient, tmp_path, capsys):
    monkeypatch.setattr("checkpoints.patterns.STRANGERS", impatient)
    argv = ["--method=linear", f"--base_model={MODELS / 'base'}", f"--models_to_merge={MODELS / 'math'}:1"]
    for flag in ("exclude", "only"):
        assert merge.main([*argv, f"--save_path={tmp_path / 'out'}", f"--{flag}={EXPLOSIVE}"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"merge.py: --{flag}: {EXPLOSIVE!r}: it takes more than 1 seconds on these names. ")
        assert said.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_pattern_remembers(monkeypatch):
    asked = []
    monkeypatch.setattr(STRANGERS, "ask", lambda task, **keywords: asked.append(task) or [True] * 2)
    pattern = Pattern("here", "b")
    assert pattern.find(["b", "a", "b"]) == [True, True, True]
    assert pattern.found_in("a")
    assert asked == ["check", "find"]


def test_an_adapters_patterns(monkeypatch, impatient):
    monkeypatch.setattr("checkpoints.patterns.STRANGERS", impatient)
    for key, message in (("(", "expected a regular expression"), (EXPLOSIVE, "it takes more than 1 seconds")):
        config = AdapterConfig(None, None, 8.0, {key: 1.0}, False, False, label="./a")
        with pytest.raises(InputError, match=rf"^\./a: adapter_config.json: alpha_pattern: .*{message}") as caught:
            config.scaling("model.layers.1.mlp.down_proj", 4)
        assert caught.value.exit_code == 1


def test_a_forked_process_asks_its_own(impatient):
    assert impatient.ask("find", pattern="a", texts=["a"]) == [True]
    child = os.fork()
    if not child:
        found = impatient.ask("find", pattern="b", texts=["a", "b"])
        impatient.close()
        os._exit(int(found != [False, True]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert impatient.ask("find", pattern="a", texts=["b"]) == [False]


def test_a_thousand_missing_models_are_looked_up_once_each(tmp_path, monkeypatch):
    count = 1000
    lines = "".join(f"- model: ./missing{i}\n  parameters: {{weight: 1.0}}\n" for i in range(count))
    (tmp_path / "many.yml").write_text(f"merge_method: linear\nmodels:\n{lines}")
    recipe = read_recipe_file(tmp_path / "many.yml")
    looked = []
    real = os.path.realpath
    monkeypatch.setattr("os.path.realpath", lambda path: looked.append(path) or real(path))
    assert [str(name) for name in recipe.inputs] == [f"./missing{i}" for i in range(count)]
    assert len(looked) == count


# ------------------------------------------------------------------------------------------------------ chat templates


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "line 1: Expected an expression"),
        ("{{ " + "(" * 9000 + " }}", "recursion"),
        ("{% if x %}" * 9000, "recursion"),
    ],
)
def test_what_is_no_template(template, message):
    with pytest.raises(InputError, match=f"^here: expected a Jinja template, got an error: .*{message}"):
        check_template(template, "here")


def test_a_template_is_compiled_under_limits(impatient, monkeypatch):
    monkeypatch.setattr("checkpoints.chat_templates.STRANGERS", impatient)
    check_template("{{ messages[0].content }}", "here")
    with pytest.raises(InputError, match=r"here: .*it takes more than 1 seconds"):
        check_template("{{ (10 ** (10 ** 9)) % 7 }}", "here")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOPS, "it takes more than 1 seconds"),
        (WRITES, "it needs more than 256 MiB of memory|it takes more than 1 seconds"),
        ("{{ 'a' * 5000000 }}", "it writes more than 4,000,000 characters"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
    ids=["loops", "writes", "long", "divides", "recurses"],
)
def test_templates_that_fail_are_refused_in_one_message(template, message, impatient, monkeypatch):
    tokenizer = _tokenizer(impatient, monkeypatch)
    with (
        pytest.raises(InputError, match=f"^./m: the chat template fails: .*(?:{message}).* Mend the template"),
        confined("./m"),
    ):
        tokenizer.apply_chat_template(TRIAL, chat_template=template, tokenize=False)
    with confined("./m"):
        assert tokenizer.apply_chat_template(TRIAL, chat_template="x", tokenize=False) == "x"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ messages[9].content }}", "has no element 9"),
    ],
)
def test_what_a_template_raises_reaches_lm_eval_as_jinjas_own_error(template, message, impatient, monkeypatch):
    from jinja2 import TemplateError

    tokenizer = _tokenizer(impatient, monkeypatch)
    with confined("./m"), pytest.raises(TemplateError, match=message):
        tokenizer.apply_chat_template(TRIAL, chat_template=template, tokenize=False)
    with pytest.raises(InputError, match=f"^./m: the chat template fails: .*{message}"), confined("./m"):
        tokenizer.apply_chat_template(TRIAL, chat_template=template, tokenize=False)


def _tokenizer(strangers, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setattr("evaluation.chat_template.STRANGERS", strangers)
    return AutoTokenizer.from_pretrained(MODELS / "code")


def test_chats_are_written_as_transformers_writes_them(monkeypatch, impatient):
    from transformers import AutoTokenizer

    chats = [
        (TRIAL, {"add_generation_prompt": True}),
        ([*TRIAL, {"role": "assistant", "content": "42 \n"}, *TRIAL], {}),
        ([{"role": "system", "content": "é"}, *TRIAL, {"role": "assistant", "content": "It is"}], {"continue_final_message": True}),
    ]  # fmt: skip
    template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )  # fmt: skip
    free = AutoTokenizer.from_pretrained(MODELS / "code")
    expected = [free.apply_chat_template(chat, chat_template=template, tokenize=False, **more) for chat, more in chats]
    tokenizer = _tokenizer(impatient, monkeypatch)
    with confined("./m"):
        assert expected == [
            tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **more) for chat, more in chats
        ]


def test_templates_are_confined_until_the_last_block_ends():
    """Whoever evaluates from a program of theirs finds transformers as it was."""
    from transformers import processing_utils, tokenization_utils_base

    def renderers():
        return [vars(module)["render_jinja_template"] for module in (tokenization_utils_base, processing_utils)]

    before = renderers()
    with confined("./outer"):
        inside = renderers()
        with pytest.raises(InputError), confined("./m"):
            raise InputError("x")
        assert renderers() == inside != before
    assert renderers() == before


def test_a_models_template_is_tried_before_the_model_is_loaded(tmp_path, monkeypatch, impatient):
    _tokenizer(impatient, monkeypatch)
    for path in (MODELS / "code").iterdir():
        if path.suffix == ".json" and "safetensors" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(LOOPS)
    with pytest.raises(InputError, match=r"^./m: the chat template fails: it takes more than 1 seconds"):
        check_chat_template(tmp_path, "./m", trust_remote_code=False)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    check_chat_template(tmp_path, "./m", trust_remote_code=False)
    (tmp_path / "tokenizer.json").write_text("{}")
    check_chat_template(tmp_path, "./m", trust_remote_code=False)  # loading the model says what is wrong with it


def test_faults_of_templates_pass_other_errors_by():
    with pytest.raises(TemplateFault, match=r"^./m: it"), confined("./m"):
        raise TemplateFault("it fails.")
    with pytest.raises(InputError, match=r"^other$"), confined("./m"):
        raise InputError("other")


def test_comments_of_a_template_are_looked_at_once():
    assert foreign_markers("{# <|a|> #}<|b|>{# #} <|c|> {# <|d|>", ()) == ["<|b|>", "<|c|>", "<|d|>"]
    assert foreign_markers("{#" * 500_000, ()) == []
