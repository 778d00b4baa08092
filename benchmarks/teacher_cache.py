"""What a teacher's cache costs and changes: bytes per token, the loss against the live teacher's, the time of training.

    python benchmarks/teacher_cache.py                  # ten minutes on one core

The teacher is the demo's source (5.8 M parameters, 2,048 tokens), the student its subclone of half the width, the text
Python's standard library. Prints tables for BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_ws import AutoSubclone
from hf_ws.distill import Favourites, token_losses
from hf_ws.training import History, TrainConfig, cache_teacher, train
from hf_ws.training.data import load_text, pack, split_held_out
from hf_ws.training.teacher_cache import Contents

SOURCE = Path(__file__).parents[1] / "recipes" / "demo" / "source"
BLOCK = 256
FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda x: x,
    "float16": lambda x: x.half().float(),
    "bfloat16": lambda x: x.bfloat16().float(),
    "8 bits, steps of 1/10 nat": lambda x: (x * 10).round().clamp(min=-255) / 10,
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="of each training run")
    steps = parser.parse_args().steps
    logging.getLogger("hf_ws").setLevel(logging.ERROR)  # that magnitude ranks without data is no matter here
    transformers_logging.disable_progress_bar()
    text, held_out = split_held_out(load_text("stdlib"))
    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    blocks = {"train_blocks": pack(text, tokenizer, BLOCK), "eval_blocks": pack(held_out, tokenizer, BLOCK)}
    print_sizes()
    print_losses(blocks["eval_blocks"].dataset[:32]["input_ids"])
    print_runs(blocks, steps)


def start() -> PreTrainedModel:
    """The same student every time."""
    return AutoSubclone.from_pretrained(SOURCE, hidden=128, method="weight_selection").float()


def print_sizes() -> None:
    """Bytes per token, by what is kept and how large the vocabulary is."""
    print(
        "\n| bytes per token | vocabulary up to 65,536 | larger | float16 logits of 128,256 |\n|---|---|---|---|"
    )
    for k in (8, 32, 128):
        sizes = [
            Contents(teacher="", tokenizer=None, data="", block=1, temperature=1.0, vocabulary=n, k=k)
            for n in (65_536, 128_256)
        ]
        print(f"| k = {k} | {' | '.join(str(one.bytes_per_token) for one in sizes)} | {2 * 128_256:,} |")


@torch.no_grad()
def print_losses(ids: Tensor) -> None:
    """Forward KL of one student on held-out text: from the whole vocabulary, from k tokens, as they are stored."""
    teacher = AutoModelForCausalLM.from_pretrained(SOURCE).eval()
    student = start().eval()
    logits, taught = (model(ids).logits[:, :-1].flatten(0, 1).float() for model in (student, teacher))
    labels = ids[:, 1:].flatten()

    def loss(said: Tensor | Favourites) -> float:
        return token_losses(logits, labels, said, weights={"forward_kl": 1.0})[0].item()

    live = loss(taught)
    print(
        f"\nForward KL of the start from the live teacher: {live:.5f} nats per token. Its difference from a cache:\n"
    )
    print("| k | mass kept | " + " | ".join(FORMATS) + " |\n|---|---|" + "---|" * len(FORMATS))
    for k in (8, 16, 32, 64, 128):
        kept = Favourites.of(taught.log_softmax(-1), k)
        mass = kept.log_probs.exp().sum(-1).mean().item()
        found = [
            loss(Favourites(kept.ids, rounded(kept.log_probs), rounded(kept.rest))) - live
            for rounded in FORMATS.values()
        ]
        print(f"| {k} | {mass:.4f} | " + " | ".join(f"{one:+.5f}" for one in found) + " |")


def print_runs(blocks: dict, steps: int) -> None:
    """The same run from the live teacher, from its k likeliest tokens, and from a cache of them."""
    config = TrainConfig(
        steps=steps, batch_size=8, learning_rate=2e-3, log_every=1, eval_every=steps, max_eval_blocks=64
    )
    with tempfile.TemporaryDirectory() as folder:
        cached = Path(folder) / "cache"
        began = time.process_time()
        cache = cache_teacher(
            replace(config, teacher=str(SOURCE)), cached, train_blocks=blocks["train_blocks"]
        )
        asking = time.process_time() - began
        runs = {
            "live teacher": replace(config, teacher=str(SOURCE)),
            "live teacher, kd_top_k = 32": replace(config, teacher=str(SOURCE), kd_top_k=32),
            "cache, k = 32": replace(config, teacher_cache=str(cached)),
            "no teacher": config,
        }
        histories, seconds = {}, {}
        for name, one in runs.items():
            began = time.process_time()
            histories[name] = train(one, model=start(), **blocks)
            seconds[name] = time.process_time() - began
        tokens, stored = cache.tokens, sum(file.stat().st_size for file in cached.iterdir())
    print(
        f"\nCache of {tokens:,} tokens: {stored:,} bytes on disk, {stored / tokens:.2f} a token, "
        f"written in {asking:.0f} CPU s.\n"
    )
    print(
        f"| {steps} steps of 8 x {BLOCK} | KL, last 20 | held-out loss | far from live | from live top 32 | CPU s |"
    )
    print("|---|---|---|---|---|---|")
    for name, history in histories.items():
        figures = row(history, *list(histories.values())[:2])
        print(f"| {name} | {' | '.join(figures)} | {seconds[name]:.0f} |")


def row(history: History, *others: History) -> list[str]:
    """A run's figures, and how far its loss is at any step from that of others."""
    kl = [one["kd_loss"] for one in history.rows if "kd_loss" in one][-20:]
    if not kl:
        return ["", f"{history.final_loss:.4f}", *("" for _ in others)]
    own, *theirs = ([one["loss"] for one in run.rows if "loss" in one] for run in (history, *others))
    far = [max(abs(a - b) for a, b in zip(own, their, strict=True)) for their in theirs]
    means = (f"{sum(kl) / len(kl):.4f}", f"{history.final_loss:.4f}")
    return [*means, *(f"{one:.5f}" for one in far)]


if __name__ == "__main__":
    main()
