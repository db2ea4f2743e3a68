"""What all tests share: no network, one thread, and the same hypothesis examples on every run."""

import os

# Before any test module imports a library that reads these once.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MPLBACKEND="Agg",
    MERGE_AIM_CACHE="off",
)

import ast
import signal
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A job in the background ignores Ctrl-C, and one below nohup the end of its terminal; tests send both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# too_slow measures time, which a busy machine decides; everything else about a run is fixed.
settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


ROOT = Path(__file__).resolve().parent.parent
SUMMARY: list[str] = []
"""Lines for the end of a run."""
RUNS_COMMANDS = {
    "merge",
    "performAIM",
    "evaluate_model",
    "compare_models",
    "commands",
    "examples",
    "benchmarks",
    "subprocess",
}
"""Modules whose import shows that a test runs whole commands or processes: with them it belongs to the tier `command`."""


@cache
def runs_commands(path: Path) -> bool:
    """Whether a test file, or a file of tests/ that it imports, imports something of RUNS_COMMANDS."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            helper = ROOT.joinpath(*name.split(".")).with_suffix(".py")
            if name.split(".")[0] in RUNS_COMMANDS or (
                name.startswith("tests.") and helper.is_file() and runs_commands(helper)
            ):
                return True
    return False


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import the tier `command` where it is left out: its imports alone take a tenth of what is left."""
    left_out = "not command" in config.option.markexpr
    return True if left_out and collection_path.name.startswith("test_") and runs_commands(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tier `command`, which `make test-fast` leaves out; single tests beside others have the mark themselves."""
    for item in items:
        if runs_commands(item.path):
            item.add_marker("command")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """One torch thread for each test, also after a test that asked for more; never imports torch itself."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Keep what a process of `-n auto` says at its end."""
    SUMMARY.extend(node.workeroutput.get("summary", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Say at the end which level of the sandbox was proved here, and how many hostile programs ran or were skipped."""
    tests = sys.modules.get("tests.test_sandbox")
    lines = tests.summary() if tests is not None else []
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["summary"] = lines
    else:
        SUMMARY.extend(lines)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the tests of the sandbox say, whichever process ran them."""
    for line in SUMMARY:
        terminalreporter.write_line(line)
