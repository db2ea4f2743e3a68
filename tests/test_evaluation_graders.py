"""Graders through the command's own path: reference answers are right, junk is wrong, and why."""

import json

import pytest

from checkpoints.errors import InputError
from evaluation.benchmarks import get_benchmark, humaneval, mbpp
from evaluation.benchmarks.contract import Grade, Response, mean, spread
from evaluation.benchmarks.humaneval import program as humaneval_program
from evaluation.benchmarks.ifeval import INSTRUCTIONS
from evaluation.benchmarks.mbpp import program as mbpp_program
from evaluation.benchmarks.mmlu import pooled_stderr
from evaluation.benchmarks.mmlu_pro import read_choice
from evaluation.benchmarks.settings import Settings
from evaluation.grading.tools import Tools
from evaluation.sandbox import Sandbox
from tests.evaluation_files import references, rows_of, samples, score

FIXED = Settings()
JUNK = (
    "",
    "I do not know.",
    "banana",
    "\\boxed{}",
    "Sure! Here is the answer:",
    "pass",
    "x" * 3000,
    "\ud800 \u2028 \0",
)


@pytest.fixture(scope="session")
def sandbox_works():
    """Skips where programs cannot be locked up; the sandbox's own tests say when that is a failure."""
    from evaluation.sandbox import Sandbox

    try:
        Sandbox(workers=1).close()
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("names", [("gsm8k", "math"), ("humaneval", "mbpp")], ids="+".join)
def test_reference_answers_are_right(names, tmp_path, request):
    if "mbpp" in names:
        request.getfixturevalue("sandbox_works")
    results = score(tmp_path, references(*names))
    for name in names:
        entry = results["benchmarks"][name]
        assert (entry["score"], entry["stderr"], entry["n"]) == (1.0, 0.0, len(rows_of(name)))
        assert {
            entry["counts"][key] for key in ("no_answer", "timed_out", "forged", "grader_errors", "unanswered")
        } == {0}
    assert results["complete"]
    wrong = [sample for sample in samples(tmp_path / "scored0.json") if sample["status"] != "right"]
    assert wrong == []


@pytest.mark.parametrize("name", ["gsm8k", "math", "humaneval", "mbpp", "mmlu", "mmlu_pro"])
def test_junk_is_wrong(name, tmp_path, request):
    if name in ("humaneval", "mbpp"):
        request.getfixturevalue("sandbox_works")
    data = None
    if name == "mmlu_pro":
        data = tmp_path / "data"
        data.mkdir()
        row = {"question": "q", "options": list("abcd"), "answer": "A", "category": "law", "cot_content": "A: so."}
        for file in ("mmlu_pro.jsonl", "mmlu_pro_validation.jsonl"):
            (data / file).write_text((json.dumps(row) + "\n") * 20)
    junk = [(name, index % 20, text) for index, text in enumerate(JUNK * 3)]
    results = score(tmp_path, junk, **({"data_dir": data} if data else {}))
    assert results["benchmarks"][name]["score"] == 0.0
    assert results["benchmarks"][name]["n"] == len(JUNK) * 3


def test_answers_of_other_rows_are_wrong(tmp_path, sandbox_works):
    names = ("gsm8k", "math", "humaneval", "mbpp")
    shifted = []
    for name in names:
        own = references(name)
        shifted += [(name, index, other) for (_, index, _), (_, _, other) in zip(own, own[1:] + own[:1], strict=True)]
    results = score(tmp_path, shifted)
    same = {"gsm8k": 1, "math": 2}  # neighbours whose answers happen to be equal
    right = {name: round(entry["score"] * entry["n"]) for name, entry in results["benchmarks"].items()}
    for name in names:
        targets = [get_benchmark(name).read_row(row).get("target", index) for index, row in enumerate(rows_of(name))]
        equal = sum(a == b for a, b in zip(targets, targets[1:] + targets[:1], strict=True))
        assert right[name] <= max(equal, same.get(name, 0)), name


def test_rows_may_repeat_and_stay_in_order(tmp_path):
    gold = [row["answer"] for row in rows_of("gsm8k")[:3]]
    given = [("gsm8k", 2, gold[2]), ("gsm8k", 0, "5"), ("gsm8k", 2, "no"), ("gsm8k", 0, gold[0]), ("gsm8k", 0, gold[0])]
    results = score(tmp_path, given)
    entry = results["benchmarks"]["gsm8k"]
    assert (entry["n"], entry["score"], entry["counts"]["rows_answered"], entry["partial"]) == (5, 0.6, 2, True)
    assert entry["stderr"] == pytest.approx((0.24 / 4) ** 0.5)
    lines = samples(tmp_path / "scored0.json")
    assert [(line["index"], line["score"]) for line in lines] == [(2, 1.0), (0, 0.0), (2, 0.0), (0, 1.0), (0, 1.0)]
    assert "comparable" not in entry or not entry["comparable"]
    assert not entry["comparable_to_paper"]


def test_given_answers_end_at_the_stop_strings(tmp_path):
    """What a model went on with, after its answer, does not count; `--limit` keeps the first responses."""
    gold = rows_of("gsm8k")[0]["answer"].rpartition("#### ")[2]
    text = f"The answer is: {gold}"
    given = [
        ("gsm8k", 0, text + "</s> The answer is: 999999"),
        ("gsm8k", 0, text + "\n\nQuestion: And then?\nThe answer is: 999999"),
        ("gsm8k", 0, text + "<|im_end|>999999"),
        ("gsm8k", 0, text + "\nThe answer is: 999999"),
    ]
    score(tmp_path, given)
    assert [line["score"] for line in samples(tmp_path / "scored0.json")] == [1.0, 1.0, 1.0, 0.0]
    assert score(tmp_path, given, "--limit", "3")["benchmarks"]["gsm8k"]["score"] == 1.0


# ------------------------------------------------------------------------------------------------------------- programs

PROMPT = 'import math\n\n\ndef helper(x):\n    return x\n\ndef area(r):\n    """Area."""\n'
ROW = {"prompt": PROMPT, "entry_point": "area", "test": "", "task_id": ""}
BODY = "    return math.pi * r * r\n"


def given(text):
    return humaneval_program(ROW, Response(0, text), FIXED)


def test_a_completion_ends_at_a_stop_string():
    assert given(BODY) == PROMPT + BODY
    assert given(BODY + "\ndef area2(r):\n    pass\n\nprint(area(1))") == PROMPT + BODY
    assert given(BODY + "\n# Test\nassert 1") == PROMPT + BODY
    generated = Response(0, "x = 1\n```", "stop")
    assert humaneval_program(ROW, generated, FIXED) == PROMPT + "x = 1\n```"


@pytest.mark.parametrize(
    "text",
    [
        "def area(r):\n    return 1\n",
        "import os\n\ndef other():\n    pass\n\ndef area(r):\n    return 1\n",
        "Here it is:\n```python\ndef area(r):\n    return 1\n```\nIt works.",
        "```\ndef area(r):\n    return 1\n",
        "async def area(r):\n    return 1\n",
    ],
)
def test_a_given_response_may_be_a_whole_program(text):
    program = given(text)
    assert program.startswith("import math\n\n\ndef helper(x):")
    assert program.count("def area") == 1
    assert "```" not in program
    compile(program, "program", "exec")


def test_a_given_completion_may_be_fenced():
    assert given(f"```python\n{BODY}```") == PROMPT + BODY.rstrip("\n")
    repeated = BODY + "\ndef area(r):\n    return 0\n"
    assert given(repeated) == PROMPT + BODY, "an indented body is a completion, whatever follows it"


def test_programs_with_a_chat_template():
    chat = Settings(chat=True)
    assert humaneval_program(ROW, Response(0, BODY + "```\nDone.", "stop"), chat) == PROMPT + BODY
    assert mbpp_program(Response(0, "def f():\n    pass\n```\nDone.", "stop"), chat) == "def f():\n    pass"
    plain = Response(0, "```python\nx\n```", "stop")
    assert mbpp_program(plain, FIXED) == plain.text, "without a template a generated text is taken as it is"


@pytest.mark.parametrize(
    "text",
    ["x = 1\n[DONE] y", "[BEGIN]\nx = 1\n[DONE]", "So:\n```python\nx = 1\n```", "```\nx = 1\n```\nand\n```\ny\n```"],
)
def test_given_mbpp_responses(text):
    assert mbpp_program(Response(0, text), FIXED).strip() == "x = 1"


def test_a_helper_of_the_prompt_is_the_tests_own(sandbox_works):
    """As in HumanEval/32, whose test asks `poly`, which the prompt gives, whether the zero is one."""
    prompt = "import math\n\n\ndef line(a, x):\n    return a + x\n\n\ndef zero(a):\n"
    test = "def check(candidate):\n    assert abs(line(3.0, candidate(3.0))) < 1e-6\n"
    row = {"prompt": prompt, "entry_point": "zero", "test": test, "canonical_solution": "    return -a\n"}
    endings = {"    return -a\n": "passed", "    return 5.0\n\ndef line(a, x):\n    return 0.0\n": "failed"}
    with Sandbox(workers=1) as sandbox:
        for ending, status in endings.items():
            assert sandbox.run([humaneval.judged(row, prompt + ending)])[0].status == status


@pytest.mark.parametrize(
    ("code", "test", "names"),
    [
        ("def half(x): return 1\ndef sum(a, b): return half(a)", "assert sum(1, 2) == 1", ("sum",)),  # as task 126
        ("def f(x): return sum(x)", "assert f([1]) == sum([1]) and abs(f([1])) == 1", ("f",)),
        ("class Node: pass\ndef f(x): pass", "x = Node()\nassert f(x) is None", ("Node", "f")),  # as task 367
        ("def f(:", "f(1)", None),
        ("def g(): pass", "f(1)", None),
    ],
)
def test_mbpp_takes_from_a_program_what_the_reference_defines(code, test, names):
    row = {"code": code, "test_setup_code": "", "test_list": [test]}
    assert mbpp.judged(row, "").names == names


def test_verdicts_become_counts(tmp_path, sandbox_works):
    """Time-outs are counted apart from failures."""
    programs = [
        (0, rows_of("mbpp")[0]["code"]),
        (0, "while True: pass"),
        (0, "import sys\nsys.exit(0)"),
        (0, "raise ValueError('no')"),
    ]
    results = score(tmp_path, [("mbpp", index, source) for index, source in programs])
    entry = results["benchmarks"]["mbpp"]
    assert (entry["score"], entry["n"]) == (0.25, 4)
    assert entry["counts"]["timed_out"] == 1
    statuses = [line["status"] for line in samples(tmp_path / "scored0.json")]
    assert statuses == ["right", "timeout", "wrong", "wrong"]
    assert entry["grader"]["sandbox_level"] in ("bubblewrap", "userns_landlock", "landlock")


# --------------------------------------------------------------------------------------------------------------- IFEval


def test_known_instructions_are_those_of_lm_eval():
    from evaluation.grading.sentences import no_download

    with no_download():
        from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    assert set(INSTRUCTION_DICT) == INSTRUCTIONS


def test_ifeval_metrics_by_hand():
    """Three prompts, six instructions. strict: 2/2, 1/3, 0/1; loose: 2/2, 3/3, 0/1.

    prompt level: 1/3 and 2/3; instruction level: 3/6 and 5/6; score: (1/3 + 1/2) / 2.
    """
    checks = [([1, 1], [1, 1]), ([1, 0, 0], [1, 1, 1]), ([0], [0])]
    grades = [
        Grade(0.0, "wrong", extra={"strict": list(map(bool, strict)), "loose": list(map(bool, loose))})
        for strict, loose in checks
    ]
    metrics = get_benchmark("ifeval").metrics(grades)
    assert list(metrics) == [
        "mean_strict_acc",
        "prompt_level_strict_acc",
        "inst_level_strict_acc",
        "prompt_level_loose_acc",
        "inst_level_loose_acc",
    ]
    values = [metric.value for metric in metrics.values()]
    assert values == pytest.approx([5 / 12, 1 / 3, 1 / 2, 2 / 3, 5 / 6])
    assert metrics["prompt_level_strict_acc"] == mean([1.0, 0.0, 0.0])
    # Instruction level, prompts as clusters: influence 0.5 + (followed - 0.5 asked) / 2 = 1, 0.25, 0.25.
    assert metrics["inst_level_strict_acc"].stderr == pytest.approx(mean([1.0, 0.25, 0.25]).stderr)
    assert metrics["mean_strict_acc"].stderr == pytest.approx(mean([1.0, 0.125, 0.125]).stderr)


def test_ifeval_through_the_command(tmp_path):
    rows = rows_of("ifeval")
    comma = next(index for index, row in enumerate(rows) if row["instruction_id_list"] == ["punctuation:no_comma"])
    lower = next(
        index for index, row in enumerate(rows) if row["instruction_id_list"] == ["change_case:english_lowercase"]
    )
    texts = [
        ("ifeval", comma, "No comma here."),
        ("ifeval", comma, "One, two."),
        ("ifeval", lower, "this is a sentence written in english with no capitals at all."),
        ("ifeval", lower, "SHOUTING is not allowed in this answer at all."),
        ("ifeval", comma, "*First, line*\nThe rest has none."),
    ]
    results = score(tmp_path, texts)
    entry = results["benchmarks"]["ifeval"]
    assert entry["grader"]["sentence_splitter"] == "simple"
    assert "sentences were split without nltk's punkt data" in entry["not_comparable_because"]
    strict, loose = (entry["metrics"][f"prompt_level_{kind}_acc"] for kind in ("strict", "loose"))
    assert (strict, loose) == (0.4, 0.6), "without its first line the last one follows"
    again = score(tmp_path, texts)
    assert again["benchmarks"]["ifeval"]["metrics"] == entry["metrics"]


def test_ifeval_with_punkt(tmp_path, monkeypatch):
    """Punkt's data beside the benchmarks' is found, used and recorded. Four small files of our own stand in for it."""
    import shutil

    from tests.evaluation_files import DATA

    folder = tmp_path / "data"
    english = folder / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    shutil.copyfile(DATA / "ifeval.jsonl", folder / "ifeval.jsonl")
    (english / "abbrev_types.txt").write_text("dr\nmr\n")
    (english / "collocations.tab").write_text("")
    (english / "sent_starters.txt").write_text("")
    (english / "ortho_context.tab").write_text("the\t46\n")
    results = score(tmp_path, [("ifeval", index, "Hi Dr. Who. Bye.") for index in range(30)], data_dir=folder)
    entry = results["benchmarks"]["ifeval"]
    assert entry["grader"]["sentence_splitter"] == "punkt"
    assert entry["counts"]["grader_errors"] == 0
    assert not any("punkt" in reason for reason in entry["not_comparable_because"])


# ------------------------------------------------------------------------------------------------------- MMLU, MMLU-Pro


def test_mmlu_counts_by_subject(tmp_path):
    rows = rows_of("mmlu_stem")
    right = [("mmlu", index, "ABCD"[row["answer"]]) for index, row in enumerate(rows)]
    given = [(name, index, f"The answer is ({text})." if index % 2 else text) for name, index, text in right]
    results = score(tmp_path, given)
    assert results["benchmarks"]["mmlu"]["score"] == 1.0
    assert results["benchmarks"]["mmlu"]["partial"], "mmlu_stem.jsonl holds a part of the subjects"
    wrong = [(name, index, text if index % 2 else "ABCD"["DABC".index(text)]) for name, index, text in right]
    entry = score(tmp_path, wrong)["benchmarks"]["mmlu"]
    assert entry["score"] == 0.5
    assert len(entry["metrics"]) == 19
    assert entry["metrics"]["acc_astronomy"] in (0.0, 0.5, 1.0)


def test_pooled_standard_error_is_that_of_lm_eval():
    from lm_eval.api.metrics import mean_stderr, pooled_sample_stderr

    groups = [[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]]
    expected = pooled_sample_stderr([mean_stderr(group) for group in groups], [len(group) for group in groups])
    assert pooled_stderr(groups) == pytest.approx(float(expected))
    assert mean(groups[2]).stderr == pytest.approx(mean_stderr(groups[2]))
    assert pooled_stderr([[1.0], [0.0]]) is None
    assert mean([1.0]).stderr is None


def test_limits_take_rows_of_all_subjects():
    assert spread(["a", "a", "a", "b", "c", "c"], 4) == [0, 1, 3, 4]
    assert spread(["a", "b"], 9) == [0, 1]
    assert get_benchmark("gsm8k").first([{}] * 5, 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("so the answer is (C). The answer is (D).", "C"),
        ("Answer: B", "B"),
        ("It must be F, not because of ...", "F"),
        ("none", None),
    ],
)
def test_mmlu_pro_letters(text, letter):
    assert read_choice(text) == letter


def test_mmlu_pro_guesses_are_counted():
    benchmark = get_benchmark("mmlu_pro")
    rows = [{"options": list("abcd"), "answer": letter} for letter in "ABCD"]
    with Tools(FIXED) as tools:
        grades = benchmark.grade(rows, [Response(0, "none")] * 4, tools, lambda count: None)
    assert sum(grade.score for grade in grades) == 1.0  # one seed for every guess, as the script has it
    assert all(grade.extra == {"guessed": True} for grade in grades)
