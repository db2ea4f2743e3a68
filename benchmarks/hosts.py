"""One merge over hosts of their own on one machine: network namespaces behind a bridge, and a folder that all of them see. Linux, as root.

    python benchmarks/hosts.py --models /tmp/merge_speed/models/h2048-l22-i5632-h32-k4-v32000 --method ties

Merges in one process; then on four hosts, of which the third's process is killed when it has finished some tensors; then the same command
on the three that are left. Prints what each run took and said, and ends with exit code 1 where the bytes are not those of one process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measured import processes_below
from benchmarks.merge_speed import OFFLINE

ROOT = Path(__file__).resolve().parent.parent
NET = "10.77.0"
BRIDGE = "merge-hosts"
STATE = ".merge-in-progress"


def ip(*arguments: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def hosts(count: int) -> Iterator[list[str]]:
    """Network namespaces that reach each other, with addresses `NET`.1 and so on; removed at the end. Yields their names."""
    names = [f"merge-host-{number}" for number in range(count)]
    ip("link", "add", BRIDGE, "type", "bridge")
    try:
        ip("link", "set", BRIDGE, "up")
        for number, name in enumerate(names):
            ip("netns", "add", name)
            ip("link", "add", f"mh{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"mh{number}", "master", BRIDGE, "up")
            ip("-n", name, "addr", "add", f"{NET}.{number + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for number, name in enumerate(names):
            for unwanted in (["ip", "link", "del", f"mh{number}"], ["ip", "netns", "del", name]):
                subprocess.run(unwanted, check=False, stderr=subprocess.DEVNULL)
        ip("link", "del", BRIDGE)


def start(names: Sequence[str], port: int, flags: Sequence[str], folder: Path) -> list[subprocess.Popen[bytes]]:
    """Start torchrun on every host, with one process of one thread each; what each says goes to `folder`/host-N."""
    started = []
    for rank, name in enumerate(names):
        run = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(names))]
        run += [
            "--node_rank",
            str(rank),
            "--master_addr",
            f"{NET}.1",
            "--master_port",
            str(port),
            "--nproc_per_node",
            "1",
        ]
        said = (folder / f"host-{rank}").open("wb")
        env = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen([*run, str(ROOT / "merge.py"), *flags], env=env, stdout=said, stderr=subprocess.STDOUT)
        )
    return started


def worker_of(launcher: int) -> int | None:
    """The process of merge.py below a torchrun; None while there is none."""
    below = list(processes_below(launcher))
    return next((pid for pid in reversed(below) if b"merge.py" in Path(f"/proc/{pid}/cmdline").read_bytes() and b"distributed.run" not in Path(f"/proc/{pid}/cmdline").read_bytes()), None)  # fmt: skip


def digests(out: Path) -> Any:
    """Of the weight files."""
    return json.loads((out / "merge_recipe.json").read_text())["outputs"]


def main() -> int:
    """Run, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder with base and tuned1 to tuned3")
    parser.add_argument("--method", default="ties")
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/hosts"), help="for what is written, removed at the end"
    )
    parser.add_argument("--port", type=int, default=29511)
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    out = arguments.folder / "out"
    tuned = ",".join(map(str, sorted(arguments.models.glob("tuned*"))))
    flags = ["--method", arguments.method, "--base_model", str(arguments.models / "base"), "--models_to_merge", tuned]
    flags += ["--save_path", str(out), "--workers", "1", "--device", "cpu", "--process_timeout", "20"]
    began = time.monotonic()
    subprocess.run(
        [sys.executable, str(ROOT / "merge.py"), *flags, "--quiet"], check=True, env={**os.environ, **OFFLINE}
    )
    expected = digests(out)
    print(f"one process: {time.monotonic() - began:.1f} s", flush=True)
    shutil.rmtree(out)
    with hosts(4) as names:
        began = time.monotonic()
        runs = start(names, arguments.port, flags, arguments.folder)
        journal = out.with_name("out.partial") / STATE / "journal-2"
        while not (journal.exists() and journal.stat().st_size) and all(run.poll() is None for run in runs):
            time.sleep(0.05)
        worker = worker_of(runs[2].pid)
        if worker is None:
            raise RuntimeError(f"the third host's process has ended: {(arguments.folder / 'host-2').read_text()}")
        os.kill(worker, signal.SIGKILL)
        print(f"killed the third host's process after {time.monotonic() - began:.1f} s", flush=True)
        codes = [run.wait() for run in runs]
        said = [
            line for line in (arguments.folder / "host-0").read_text().splitlines() if line.startswith("merge.py: ")
        ]
        print(
            f"all ended after {time.monotonic() - began:.1f} s, exit codes {codes}; the first said: {said}", flush=True
        )
        began = time.monotonic()
        codes = [run.wait() for run in start(names[:2] + names[3:], arguments.port + 1, flags, arguments.folder)]
        lines = [line for line in (arguments.folder / "host-0").read_text().splitlines() if "going on" in line or "peak memory" in line]  # fmt: skip
        print(f"three hosts: {time.monotonic() - began:.1f} s, exit codes {codes}; {lines}", flush=True)
    same = codes == [0, 0, 0] and digests(out) == expected
    print("the same bytes as one process" if same else "OTHER BYTES")
    shutil.rmtree(arguments.folder)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
