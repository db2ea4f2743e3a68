"""Datasets from the hub: into its cache when a run needs them, or into a folder by `--fetch_data`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from checkpoints.errors import InputError
from checkpoints.hub_errors import Unreachable, one_line_errors, progress_bars
from checkpoints.screen import say
from checkpoints.settings import setting
from evaluation.benchmarks.contract import Benchmark
from evaluation.dataset_files import REVISIONS_FILE, Missing, missing_splits
from evaluation.grading.sentences import RESOURCE, find_punkt


def hub_snapshot(benchmark: Benchmark) -> tuple[Path, str]:
    """The folder and the commit of a benchmark's dataset in the hub's cache; downloaded first where it is not there.

    Raises:
        Missing: the cache lacks it, and the hub gives no answer.
        InputError: the hub refuses.
    """
    from huggingface_hub import constants

    dataset = benchmark.dataset
    cached: Path | None
    try:
        cached = _snapshot(benchmark, local_files_only=True)
    except Unreachable:
        cached = None
    if cached is not None and not missing_splits(cached, dataset):
        return cached, cached.name
    try:
        if constants.is_offline_mode():
            raise Unreachable("HF_HUB_OFFLINE=1 forbids to ask the hub")
        folder = _snapshot(benchmark)
    except Unreachable as error:
        raise Missing(benchmark.name, f"the cache holds no copy of the dataset {dataset.repo}, and {error}.") from error
    absent = missing_splits(folder, dataset)
    if absent:
        raise InputError(f"{benchmark.name}: expected {absent[0]} in the dataset {dataset.repo}, got no such file.")
    return folder, folder.name


def fetch_data(benchmarks: Sequence[Benchmark], folder: Path | None, *, quiet: bool = False) -> list[str]:
    """Download the data of benchmarks, and punkt where IFEval is among them.

    Args:
        benchmarks: whose data.
        folder: gets a copy of each dataset's repository, and revisions.json with their commits; None for the hub's cache.
        quiet: no progress bars.

    Returns: a line for each thing fetched.
    Raises: InputError: the hub cannot be reached or refuses; the folder cannot be written.
    """
    lines = []
    revisions = _read_revisions(folder) if folder else {}
    for benchmark in benchmarks:
        repo = benchmark.dataset.repo
        try:
            with progress_bars(not quiet):
                snapshot = _snapshot(benchmark, local_dir=None if folder is None else folder / repo)
        except Unreachable as error:
            raise InputError(f"{benchmark.name}: the dataset {repo} cannot be fetched: {error}.") from error
        if folder is not None:
            revisions[repo] = _commit_of(benchmark)
            _write(folder / REVISIONS_FILE, json.dumps(revisions, indent=2, sort_keys=True) + "\n")
        lines.append(f"{benchmark.name}: {repo} -> {snapshot}")
    if any(benchmark.name == "ifeval" for benchmark in benchmarks) and find_punkt(folder) is None:
        lines.append(_fetch_punkt(folder))
    return lines


def _snapshot(benchmark: Benchmark, *, local_files_only: bool = False, local_dir: Path | None = None) -> Path:
    from huggingface_hub import snapshot_download

    dataset = benchmark.dataset
    with one_line_errors(dataset.repo, None):
        return Path(
            snapshot_download(
                dataset.repo,
                repo_type="dataset",
                allow_patterns=sorted(set(dataset.splits.values())),
                local_files_only=local_files_only,
                local_dir=local_dir,
            )
        )


def _commit_of(benchmark: Benchmark) -> str:
    from huggingface_hub import HfApi

    with one_line_errors(benchmark.dataset.repo, None):
        return str(HfApi().dataset_info(benchmark.dataset.repo).sha)


def _fetch_punkt(folder: Path | None) -> str:
    import nltk

    target = folder / "nltk_data" if folder else None
    if not nltk.download(RESOURCE, download_dir=str(target) if target else None, quiet=True):
        say(f"warning: nltk's {RESOURCE} cannot be fetched; IFEval will use the simple splitter.")
        return f"ifeval: nltk {RESOURCE}: not fetched"
    return f"ifeval: nltk {RESOURCE} -> {target or 'nltk_data'}"


def _read_revisions(folder: Path) -> dict[str, str]:
    try:
        revisions = json.loads((folder / REVISIONS_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return revisions if isinstance(revisions, dict) else {}


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written: {error.strerror}. Choose another {setting('data_dir')}."
        ) from error
