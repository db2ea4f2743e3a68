"""The command from end to end with a pico model: all six benchmarks, stages, resuming, and what it refuses."""

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import jsonschema
import pytest

import evaluate_model
from checkpoints.errors import InputError
from checkpoints.provenance import fingerprint
from checkpoints.reader import open_checkpoint
from evaluation.benchmarks import PAPER
from evaluation.results import SCHEMA_FILE
from tests.evaluation_files import DATA, make_model, rows_of, samples, write_responses
from tests.scene import call

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = json.loads(SCHEMA_FILE.read_text())
QUICK = ("--dtype", "float32", "--data_dir", str(DATA), "--math_max_tokens", "32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), max_position_embeddings=2300)


@pytest.fixture(scope="module")
def runnable():
    """The paper's six, without the two that run programs where none can be locked up."""
    from evaluation.sandbox import Sandbox

    try:
        Sandbox(workers=1).close()
    except InputError as error:
        print(f"without humaneval and mbpp: {error}", file=sys.stderr)
        return [name for name in PAPER if name not in ("humaneval", "mbpp")]
    return list(PAPER)


run = partial(call, evaluate_model)


def read(path):
    results = json.loads(path.read_text())
    jsonschema.validate(results, SCHEMA, jsonschema.Draft202012Validator)
    return results


def test_all_six_from_the_command_line(folder, tmp_path, runnable):
    save_path = tmp_path / "out.json"
    names = ",".join(runnable)
    captured = run("--model", folder, *QUICK, "--limit", 4, "--benchmarks", names, "--save_path", save_path)
    results = read(save_path)
    assert list(results["benchmarks"]) == runnable == results["wanted"]
    assert results["complete"]
    assert results["partial"]
    assert results["finished"] is not None
    assert not results["comparable_to_paper"]
    assert set(results["model"]["files"]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    with closing(open_checkpoint(folder, "model")) as weights:
        assert results["model"]["fingerprint"] == fingerprint(weights)
    assert results["environment"]["packages"]["lm_eval"] == "0.4.13"
    for name, entry in results["benchmarks"].items():
        assert entry["n"] == 4
        assert 0 <= entry["score"] <= 1
        assert entry["partial"]
        assert entry["generation"]["backend"] == "hf"
        assert entry["generation"]["bos"]["bos_count"] == 1
        assert not entry["generation"]["chat_template"]
        assert entry["shots"] == (3 if name == "mbpp" else 0)
        assert any(reason.startswith("partial: 4 of ") for reason in entry["not_comparable_because"])
    logged = samples(save_path)
    assert [line["benchmark"] for line in logged] == [name for name in runnable for _ in range(4)]
    assert all(line["prompt"] and "score" in line and "status" in line for line in logged)
    assert "PARTIAL: limit 4, no full scores." in captured.out
    for name in runnable:
        assert f"{name} (partial)" in captured.out
    assert "Traceback" not in captured.err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.json", "out.responses.jsonl", "out.samples.jsonl"]
    # The same answers, graded again from their file, get the same grades, and nothing is lost of how they were made.
    again = tmp_path / "again.json"
    responses = tmp_path / "out.responses.jsonl"
    run("--stage", "score", "--responses", responses, "--data_dir", DATA, "--save_path", again, "--quiet")
    rescored = read(again)
    for name, entry in results["benchmarks"].items():
        same = {key: value for key, value in entry.items() if key != "seconds"}
        assert {key: value for key, value in rescored["benchmarks"][name].items() if key != "seconds"} == same
    assert rescored["model"] == results["model"]
    assert [line["score"] for line in samples(again)] == [line["score"] for line in logged]


def test_stages_one_after_the_other(folder, tmp_path):
    """generate, then all with --resume on the same file: nothing is generated twice."""
    save_path = tmp_path / "out.json"
    flags = ["--model", folder, *QUICK, "--limit", 2, "--benchmarks", "gsm8k,mmlu", "--save_path", save_path, "--quiet"]
    run(*flags, "--stage", "generate")
    generated = read(save_path)
    assert [entry["score"] for entry in generated["benchmarks"].values()] == [None, None]
    assert generated["complete"]
    assert not (tmp_path / "out.samples.jsonl").exists()
    lines = (tmp_path / "out.responses.jsonl").read_text()
    run(*flags, code=2)  # nothing is overwritten
    run(*flags, "--resume")
    graded = read(save_path)
    assert all(entry["score"] is not None for entry in graded["benchmarks"].values())
    assert (tmp_path / "out.responses.jsonl").read_text() == lines
    for name, entry in graded["benchmarks"].items():
        assert entry["generation"] == generated["benchmarks"][name]["generation"]


def test_generated_responses_go_where_they_are_told(folder, tmp_path):
    file = tmp_path / "mine.jsonl"
    flags = ["--model", folder, *QUICK, "--limit", 2, "--benchmarks", "gsm8k", "--stage", "generate", "--quiet"]
    run(*flags, "--responses", file, "--save_path", tmp_path / "out.json")
    first = json.loads(file.read_text().split("\n")[0])
    assert {"benchmark", "index", "response"} <= set(first)
    run(*flags, "--responses", file, "--save_path", tmp_path / "other.json", code=2)
    assert not (tmp_path / "other.json").exists()


def test_resume_does_what_is_left(folder, tmp_path, monkeypatch):
    from evaluation import prompts

    save_path = tmp_path / "out.json"
    flags = [
        "--model",
        folder,
        *QUICK,
        "--limit",
        2,
        "--benchmarks",
        "mmlu,math,gsm8k",
        "--save_path",
        save_path,
        "--quiet",
    ]
    asked = []
    build = prompts.build_requests

    def watch(benchmark, *arguments, **keywords):
        asked.append(benchmark.name)
        if asked == ["mmlu", "math"]:
            raise KeyboardInterrupt
        return build(benchmark, *arguments, **keywords)

    monkeypatch.setattr(prompts, "build_requests", watch)
    run(*flags, code=130)
    broken_off = read(save_path)
    assert list(broken_off["benchmarks"]) == ["mmlu"]
    assert broken_off["wanted"] == ["mmlu", "math", "gsm8k"]
    assert not broken_off["complete"]
    assert broken_off["finished"] is None
    asked.clear()
    run(*flags, "--resume")
    assert asked == ["math", "gsm8k"]
    results = read(save_path)
    assert results["complete"]
    assert results["benchmarks"]["mmlu"] == broken_off["benchmarks"]["mmlu"]
    assert [line["benchmark"] for line in samples(save_path)] == ["mmlu"] * 2 + ["math"] * 2 + ["gsm8k"] * 2
    asked.clear()
    run(*flags, "--resume")
    assert asked == [], "nothing is left to do"


def test_resume_refuses_other_settings(folder, tmp_path):
    save_path = tmp_path / "out.json"
    flags = ["--model", folder, *QUICK, "--benchmarks", "mmlu", "--save_path", save_path, "--quiet"]
    run(*flags, "--limit", 2)
    before = save_path.read_bytes()
    ended = run(*flags, "--limit", 3, "--profile", "paper", "--resume", code=2)
    assert "--resume: " in (error := ended.err)
    assert "profile 'fixed' there, 'paper' here; limit 2 there, 3 here" in error
    other = make_model(tmp_path / "other")
    ended = run("--model", other, *flags[2:], "--limit", 2, "--resume", code=2)
    assert f"model {folder.resolve()} there, {other.resolve()} here" in ended.err
    assert save_path.read_bytes() == before


@pytest.mark.slow
def test_a_killed_run_goes_on(folder, tmp_path):
    """A kill that leaves no time for anything: what was finished is there, whole."""
    save_path = tmp_path / "out.json"
    arguments = ["--model", folder, "--dtype", "float32", "--data_dir", DATA, "--limit", "4", "--save_path", save_path]
    command = [
        sys.executable,
        "evaluate_model.py",
        *map(str, arguments),
        "--benchmarks",
        "mmlu,ifeval",
        "--batch_size",
        "1",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not save_path.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed = read(save_path)
    assert "ifeval" not in killed["benchmarks"]
    run(*arguments, "--benchmarks", "mmlu,ifeval", "--batch_size", "1", "--resume", "--quiet")
    assert list(read(save_path)["benchmarks"]) == ["mmlu", "ifeval"]


def test_profile_paper_leaves_bos_out_of_the_harness_tasks(folder, tmp_path):
    save_path = tmp_path / "out.json"
    flags = [
        "--limit",
        1,
        "--benchmarks",
        "mmlu,gsm8k,ifeval",
        "--profile",
        "paper",
        "--save_path",
        save_path,
        "--quiet",
    ]
    run("--model", folder, *QUICK, *flags, "--stage", "generate")
    counts = {name: entry["generation"]["bos"]["bos_count"] for name, entry in read(save_path)["benchmarks"].items()}
    assert counts == {"mmlu": 0, "gsm8k": 1, "ifeval": 0}


def test_a_chat_template(folder, tmp_path):
    """Applied to all but the mathematical benchmarks, and recorded."""
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    )
    save_path = tmp_path / "out.json"
    flags = ["--apply_chat_template", "--limit", 1, "--benchmarks", "mmlu,gsm8k", "--save_path", save_path, "--quiet"]
    run("--model", model, *QUICK, *flags)
    entries = read(save_path)["benchmarks"]
    assert {name: entry["generation"]["chat_template"] for name, entry in entries.items()} == {
        "mmlu": True,
        "gsm8k": False,
    }
    assert "a chat template was applied" in entries["mmlu"]["not_comparable_because"]
    prompts = {line["benchmark"]: line["prompt"] for line in samples(save_path)}
    assert prompts["mmlu"].startswith("[system]The following are multiple choice questions")
    assert prompts["mmlu"].endswith("Answer:[assistant]")
    assert "[assistant]" not in prompts["gsm8k"]


def test_a_merge_recipe_is_recorded(folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    (model / "merge_recipe.json").write_text(json.dumps({"merge_method": "ties", "seed": None, "report": {"long": 1}}))
    run("--model", model, *QUICK, "--limit", 1, "--benchmarks", "mmlu", "--save_path", tmp_path / "o.json")
    assert read(tmp_path / "o.json")["model"]["merge_recipe"] == {"merge_method": "ties", "seed": None}


def test_without_samples_and_in_the_default_place(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run("--model", folder, *QUICK, "--limit", 1, "--benchmarks", "mmlu", "--no-log_samples")
    results, responses = sorted((tmp_path / "results").iterdir())
    assert results.name.startswith(f"{folder.name}_2")
    assert responses.name == f"{results.stem}.responses.jsonl"
    assert f"results/{results.name}: results written." in ended.out


def test_more_tasks_of_lm_eval(folder, tmp_path, monkeypatch):
    """By name, with lm_eval's own data handling; one that runs code is refused."""
    from lm_eval import tasks

    data = [{"question": "1+1?", "answer": "2"}, {"question": "1+2?", "answer": "3"}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, data)) + "\n")
    for name, unsafe in (("our_sums", "false"), ("our_code", "true")):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path / 'test.jsonl'}}}\n"
            'test_split: test\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\noutput_type: generate_until\n'
            f"generation_kwargs: {{until: ['.'], max_gen_toks: 4}}\nunsafe_code: {unsafe}\nmetric_list: [{{metric: exact_match}}]\n"
        )
    ours = partial(tasks.TaskManager, include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", ours)
    names = tmp_path / "tasks.txt"
    names.write_text("# more\nour_sums  # twice\nour_sums\n")
    flags = ["--model", folder, *QUICK, "--limit", 2, "--benchmarks", "mmlu", "--tasks_file", names]
    ended = run(*flags, "--save_path", tmp_path / "out.json")
    entry = read(tmp_path / "out.json")["extra_tasks"]["our_sums"]
    assert entry["n"] == 2
    assert any(metric.startswith("exact_match") for metric in entry["metrics"])
    assert "our_sums exact_match" in ended.out
    names.write_text("our_code\nour_sumz\n")
    ended = run(*flags, "--save_path", tmp_path / "new.json", code=2)
    error = ended.err
    assert "our_code runs code of the model outside our sandbox" in error
    assert "unknown lm_eval task 'our_sumz'. Did you mean 'our_sums'?" in error
    assert len(error) < 600


# ------------------------------------------------------------------------------------------------------------ refusals

REFUSED = [
    ([], 2, "--model: expected the folder or the hub name of a model"),
    (
        ["--model", "MODEL", "--benchmarks", "gsm9k"],
        2,
        "--benchmarks: unknown benchmark 'gsm9k'. Did you mean 'gsm8k'?",
    ),
    (["--model", "MODEL", "--math_benchmarks", "mbpp"], 2, "--math_benchmarks: unknown benchmark 'mbpp'"),
    (["--model", "MODEL", "--benchmarks", "math", "--math_benchmarks", ""], 2, "nothing is left to evaluate"),
    (["--model", "MODEL", "--limit", "0"], 2, "--limit: expected a number above 0, got 0."),
    (["--model", "MODEL", "--batch_size", "none"], 2, "--batch_size: expected auto or a number above 0, got 'none'."),
    (["--model", "MODEL", "--dtype", "bf16"], 2, "--dtype: unknown value 'bf16'. Did you mean 'bfloat16'?"),
    (["--model", "MODEL", "--profile", "papers"], 2, "--profile: unknown value 'papers'. Did you mean 'paper'?"),
    (["--model", "MODEL", "--backend", "vlm"], 2, "--backend: unknown value 'vlm'. Did you mean 'vllm'?"),
    (
        ["--model", "MODEL", "--math_prompt_type", "cot"],
        2,
        "--math_prompt_type: unknown value 'cot'. Did you mean 'wcot'?",
    ),
    (["--model", "MODEL", "--stage", "generat"], 2, "--stage: unknown value 'generat'. Did you mean 'generate'?"),
    (["--model", "MODEL", "--stage", "score"], 2, "--stage score: needs --responses FILE"),
    (["--model", "MODEL", "--responses", "r.jsonl"], 2, "--responses: goes with --stage score"),
    (["--model", "MODEL", "--resume"], 2, "--resume: needs --save_path"),
    (["--model", "MODEL", "--n_gpu", "-1"], 2, "--n_gpu: expected 0 (the CPU) or more, got -1."),
    (["--model", "MODEL", "--n_gpu", "2"], 2, "--n_gpu 2: there are 0 GPUs here."),
    (["--model", "MODEL", "--data_dir", "nowhere"], 2, "--data_dir nowhere: no such folder."),
    (["--model", "MODEL", "--apply_chat_template"], 2, "has no chat template"),
    (["--model", "MODEL", "--tasks_file", "nowhere.txt"], 2, "--tasks_file nowhere.txt: cannot be read"),
    (["--model", "./nowhere"], 1, "./nowhere: no such folder."),
    (["--model", "MODEL/config.json"], 1, "expected a folder, got a file"),
    (["--model", "org/nowhere"], 1, "org/nowhere: no such folder, HF_HUB_OFFLINE=1 forbids to ask the hub"),
    (["--model", "EMPTY"], 1, "expected config.json in"),
    (["--fetch_data", "--model", "MODEL"], 2, "--fetch_data: fetches data and stops."),
    (
        ["--stage", "score", "--responses", "nowhere.jsonl"],
        1,
        "nowhere.jsonl: cannot be read: No such file or directory",
    ),
    (
        ["--stage", "score", "--responses", "GIVEN", "--benchmarks", "gsm8k,math"],
        1,
        "expected responses of gsm8k, got none",
    ),
    (
        ["--stage", "score", "--responses", "GIVEN", "--resume", "--save_path", "x.json"],
        2,
        "--resume: goes on with generating",
    ),
    (
        ["--stage", "score", "--responses", "BEYOND"],
        1,
        "math: expected 'index' from 0 to 41, got 42. Is it of other data?",
    ),
]


@pytest.mark.parametrize(("arguments", "code", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(arguments, code, message, folder, tmp_path, monkeypatch):
    """A clear message, 2 for the arguments and 1 for everything else, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {
        "MODEL": str(folder),
        "MODEL/config.json": str(folder / "config.json"),
        "EMPTY": str(tmp_path / "empty"),
        "GIVEN": str(write_responses(tmp_path / "given.jsonl", [("math", 0, "5")])),
        "BEYOND": str(write_responses(tmp_path / "beyond.jsonl", [("math", 42, "5")])),
    }
    before = sorted(tmp_path.rglob("*"))
    given = [places.get(argument, argument) for argument in arguments]
    data = [] if "--data_dir" in given or "--fetch_data" in given else ["--data_dir", str(DATA)]
    captured = run(*given, *data, code=code)
    assert message in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert sorted(tmp_path.rglob("*")) == before


def test_all_wrong_flags_are_said_at_once():
    ended = run("--limit", -1, "--dtype", "x", "--benchmarks", "y", "--stage", "all", code=2)
    error = ended.err
    assert "4 problems:" in error
    for part in ("--limit", "--dtype", "--benchmarks", "--model"):
        assert f"- {part}" in error


def test_heads_that_gpus_do_not_divide(folder, tmp_path, monkeypatch):
    from evaluation import backends

    monkeypatch.setattr(backends, "count_gpus", lambda: 8)
    arguments = ["--model", folder, "--n_gpu", 3, "--data_dir", DATA, "--save_path", tmp_path / "out.json"]
    ended = run(*arguments, code=2)
    assert "--n_gpu 3: expected a number that divides the model's 4 attention heads. Here: 1, 2, 4." in ended.err


def test_which_benchmarks_run():
    from evaluation.request import choose_benchmarks

    assert choose_benchmarks(None, None, False) == PAPER
    assert choose_benchmarks("ifeval, gsm8k", None, False) == ("gsm8k", "ifeval")
    assert choose_benchmarks(None, "", False) == ("humaneval", "mbpp", "mmlu", "ifeval")
    assert choose_benchmarks("math", "gsm8k", False) == ("gsm8k",)
    assert choose_benchmarks("mmlu", "math,gsm8k", True) == ("mmlu", "math", "gsm8k", "mmlu_pro")
    assert choose_benchmarks(None, None, False, "score") == ()


def test_help_and_import_are_instant():
    """Nothing is imported but Python's own modules and ours: neither torch nor transformers nor lm_eval."""
    code = (
        "import sys; before = set(sys.modules); import evaluation, evaluate_model; evaluate_model.build_parser();"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"evaluation", "evaluate_model", "commands", "checkpoints"}


def test_the_python_interface(folder, tmp_path):
    from evaluation import evaluate, make_request

    request = make_request(
        model=str(folder), benchmarks="mmlu", dtype="float32", data_dir=str(DATA), limit=3, save_path=str(tmp_path / "o.json"), quiet=True
    )  # fmt: skip
    outcome = evaluate(request)
    assert outcome.results == read(outcome.save_path)
    assert outcome.results["command"] is None
    assert outcome.results["benchmarks"]["mmlu"]["n"] == 3
    assert len(rows_of("mmlu_stem")) == outcome.results["benchmarks"]["mmlu"]["data"]["rows"]


def test_resume_refuses_a_changed_checkpoint_or_changed_data(folder, tmp_path):
    model, data, save_path = tmp_path / "model", tmp_path / "data", tmp_path / "out.json"
    shutil.copytree(folder, model)
    data.mkdir()
    shutil.copyfile(DATA / "gsm8k.jsonl", data / "gsm8k.jsonl")
    flags = [
        "--model",
        model,
        "--dtype",
        "float32",
        "--data_dir",
        data,
        "--limit",
        2,
        "--math_max_tokens",
        8,
        "--quiet",
    ]
    flags += ["--benchmarks", "gsm8k", "--save_path", save_path]
    run(*flags, "--stage", "generate")
    responses = tmp_path / "out.responses.jsonl"
    kept = responses.read_text()
    for damage in (
        kept.replace('"response": "', '"response": "!'),
        kept[:-20],
        kept.splitlines()[0] + "\n",
        "[1]\n",
        None,
    ):
        responses.unlink() if damage is None else responses.write_text(damage)
        ended = run(*(flag for flag in flags if flag != "--quiet"), "--stage", "generate", "--resume")
        assert "does not have the responses of gsm8k as the results say, which are made again" in ended.err
        assert responses.read_text() == kept
    before = save_path.read_bytes()
    (model / "tokenizer_config.json").write_text((model / "tokenizer_config.json").read_text() + " ")
    ended = run(*flags, "--resume", code=1)
    assert "have changed since" in ended.err
    lines = (data / "gsm8k.jsonl").read_text().split("\n")
    (data / "gsm8k.jsonl").write_text("\n".join(lines[1:]))
    ended = run(*flags, "--resume", code=2)
    assert "other data of gsm8k" in ended.err
    assert save_path.read_bytes() == before
