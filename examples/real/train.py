"""Training of an expert: a short fine-tune of the base on one domain, of all weights but the embeddings.

    PYTHONPATH=. python -m examples.real.train --base real/base --data real/data --domain sql --out real/experts/sql

The loss is on answers only. Three minutes of processor time; the same seed gives the same batches.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoints.errors import ArgumentError
from examples.miniature import guarded
from examples.real.texts import Encoded, read_encoded

LOG = "training.json"
"""Of an expert's folder: the recipe, and the loss of each step."""


@dataclass(frozen=True)
class Recipe:
    """How an expert is trained.

    Attributes:
        tokens: of all documents together, prompts included; a document may come twice.
        rate: peak learning rate. It rises over the first `warmup` of the steps, and falls to zero over the second half.
        documents: in one step.
        seed: of the order of the documents.
    """

    tokens: int = 20_000
    rate: float = 2e-4
    documents: int = 6
    seed: int = 1
    warmup: float = 0.08

    def rate_at(self, step: int, steps: int) -> float:
        """Learning rate of a step."""
        up, down = (step + 1) / max(1.0, steps * self.warmup), (steps - step) / (steps * 0.5)
        return self.rate * min(1.0, up, down)


def order(documents: Sequence[Encoded], recipe: Recipe) -> list[list[int]]:
    """The documents of each step. Steps of about the same length lie in one window, so that little is padded."""
    rng = random.Random(recipe.seed)
    mean = sum(map(len, documents)) / len(documents)
    steps, window = max(1, int(recipe.tokens / mean / recipe.documents)), 8 * recipe.documents
    drawn: list[int] = []
    while len(drawn) < steps * recipe.documents:
        drawn += rng.sample(range(len(documents)), len(documents))
    found: list[list[int]] = []
    for start in range(0, steps * recipe.documents, window):
        part = sorted(drawn[start : start + window], key=lambda index: len(documents[index]))
        cut = [part[i : i + recipe.documents] for i in range(0, len(part), recipe.documents)]
        rng.shuffle(cut)
        found += cut
    return found[:steps]


def train(base: Path, documents: Sequence[Encoded], out: Path, recipe: Recipe, label: str, device: str = "cpu") -> None:
    """Train one expert and write it.

    Args:
        base: the checkpoint that is fine-tuned.
        documents: of the domain's train split.
        out: folder that appears when it is complete: a float32 checkpoint with tokenizer.
        recipe: how.
        label: of the progress bar.
        device: where it is trained.
    """
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.real.losses import answers

    torch.manual_seed(recipe.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    model.get_input_embeddings().weight.requires_grad_(False)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    steps, losses, started = order(documents, recipe), [], time.process_time()
    model.train()
    for step, indices in enumerate(bar := tqdm(steps, desc=label, unit="step", dynamic_ncols=True)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step, len(steps))
        loss = answers(model, [documents[index] for index in indices]).losses.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(float(loss.detach()), 4))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(base).save_pretrained(partial)
    log = {"recipe": asdict(recipe), "losses": losses, "processor_seconds": round(time.process_time() - started, 1)}
    (partial / LOG).write_text(json.dumps(log, indent=1) + "\n")
    partial.rename(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the checkpoint that is fine-tuned")
    parser.add_argument("--data", type=Path, required=True, help="folder with DOMAIN_train.jsonl")
    parser.add_argument("--domain", required=True, help="which one")
    parser.add_argument("--out", type=Path, required=True, help="folder of the expert")
    parser.add_argument("--seed", type=int, default=1, help="of the order of the documents (default 1)")
    arguments = parser.parse_args(argv)
    return guarded("train.py", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Flags -> an expert. Raises InputError: the folder is there; the documents cannot be read."""
    from transformers import AutoTokenizer

    if arguments.out.exists():
        raise ArgumentError(
            f"--out {arguments.out}: expected a folder that is not there, got one that is. Choose another."
        )
    documents = read_encoded(arguments.data, arguments.domain, "train", AutoTokenizer.from_pretrained(arguments.base))
    train(arguments.base, documents, arguments.out, Recipe(seed=arguments.seed), arguments.domain)


if __name__ == "__main__":
    sys.exit(main())
