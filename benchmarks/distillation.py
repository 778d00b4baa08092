"""What a teacher is worth at equal time: the same start trained without it, with it, and from its cache.

    python benchmarks/distillation.py                    # three seeds of three arms, two minutes each, and the cache
    python benchmarks/distillation.py --seconds 300

Time is this process's CPU time on one thread, which is wall time where nobody else is on the machine.

The teacher is the demo's source (5.8 M parameters), the student its subclone of half the width and six of eight layers,
the text Python's standard library. How many steps an arm gets follows from its own speed, measured first as the
difference of a short run and a shorter one, so that neither set-up nor evaluation counts; asking the teacher for the
cache is paid once and stands apart. Resumable: runs that are there are not run again. Prints a table for BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_ws import AutoSubclone
from hf_ws.training import TrainConfig, cache_teacher, train
from hf_ws.training.data import Packed, load_text, pack, split_held_out

SOURCE = Path(__file__).parents[1] / "recipes" / "demo" / "source"
ARMS = ("without", "with", "cached")
BLOCK, WARM, TIMED = 256, 4, 20
THIN = 12  # one text in so many, for all of them are asked of the teacher


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120, help="of training for every run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs") / "distillation")
    args = parser.parse_args()
    logging.getLogger("hf_ws").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    text, held_out = split_held_out(load_text("stdlib"))
    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    blocks = {
        "train_blocks": pack(text[::THIN], tokenizer, BLOCK),
        "eval_blocks": pack(held_out, tokenizer, BLOCK),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in range(args.seeds):
        for arm in ARMS:
            file = args.output / f"{arm}-{seed}-{args.seconds:g}.json"
            if not file.exists():
                file.write_text(json.dumps(run(arm, seed, args, blocks)))
            found[arm].append(json.loads(file.read_text()))
            print(f"{arm}, seed {seed}: {found[arm][-1]}", flush=True)
    report(found)


def run(arm: str, seed: int, args: argparse.Namespace, blocks: dict[str, Packed]) -> dict[str, Any]:
    """One run of as many steps as its time allows."""
    config = TrainConfig(
        steps=1, threads=1, batch_size=16, learning_rate=4e-3, precision="bf16", seed=seed, log_every=10,
        eval_every=0, max_eval_blocks=128, progress=False, kd_weight=0.0 if arm == "without" else 0.5,
    )  # fmt: skip
    teacher = AutoModelForCausalLM.from_pretrained(SOURCE) if arm == "with" else None
    asked = 0.0
    if arm == "cached":
        config, asked = with_cache(config, args, blocks)
    took = []
    for steps in (WARM, WARM + TIMED):
        student, started = start(blocks), time.process_time()
        train(
            replace(config, steps=steps), model=student, teacher=teacher, train_blocks=blocks["train_blocks"]
        )
        took.append(time.process_time() - started)
    steps = int(args.seconds * TIMED / (took[1] - took[0]))
    history = train(
        replace(config, steps=steps, eval_every=steps), model=start(blocks), teacher=teacher, **blocks
    )
    return {
        "steps": steps,
        "tokens": steps * history.tokens_per_step,
        "loss": history.final_loss,
        "asked": asked,
        "started": history.evaluations[0][1],
    }


def start(blocks: dict[str, Packed]) -> PreTrainedModel:
    """The same student every time."""
    return AutoSubclone.from_pretrained(
        SOURCE, hidden=128, layers=6, calibration=blocks["train_blocks"].dataset[:64]["input_ids"]
    ).float()


def with_cache(
    config: TrainConfig, args: argparse.Namespace, blocks: dict[str, Packed]
) -> tuple[TrainConfig, float]:
    """The settings with a cache of what the teacher says of all blocks, and the seconds that asking took."""
    folder, record = args.output / "cache", args.output / "cache.json"
    if not record.exists():
        started = time.process_time()
        teacher = AutoModelForCausalLM.from_pretrained(SOURCE)
        cache_teacher(
            config,
            folder,
            every_block=True,
            model=start(blocks),
            teacher=teacher,
            train_blocks=blocks["train_blocks"],
        )
        record.write_text(json.dumps(time.process_time() - started))
    return replace(config, teacher_cache=str(folder)), json.loads(record.read_text())


def report(found: dict[str, list[dict[str, Any]]]) -> None:
    """Means and spread over seeds."""
    print(
        "\n| | tokens | held-out loss | lowest and highest seed | seconds of asking |\n|---|---|---|---|---|"
    )
    for arm, runs in found.items():
        losses = [one["loss"] for one in runs]
        tokens, asked = (statistics.mean(one[key] for one in runs) for key in ("tokens", "asked"))
        spread = f"{min(losses):.3f}, {max(losses):.3f}"
        print(f"| {arm} | {tokens:,.0f} | {statistics.mean(losses):.3f} | {spread} | {asked:.0f} |")


if __name__ == "__main__":
    main()
