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

import signal
import sys

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


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """One torch thread for each test, also after a test that asked for more; never imports torch itself."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which level of the sandbox was proved here, and how many hostile programs ran or were skipped."""
    tests = sys.modules.get("tests.test_sandbox")
    for line in tests.summary() if tests is not None else []:
        terminalreporter.write_line(line)
