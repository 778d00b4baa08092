"""What training costs: tokens per second against a bare loop and Transformers' Trainer, and memory of distilling.

    python benchmarks/training.py                        # on a CPU; some ten minutes
    python benchmarks/training.py --shape large          # on a GPU, bf16: with model FLOPs utilisation
    python benchmarks/training.py --only memory

Every measurement is a process of its own; the arms of a repeat follow one another, so that what slows the machine slows
them all; medians are printed.

    bare        forward, backward, clip, AdamW, schedule: a loop of a dozen lines
    trainer     Transformers' Trainer as its run_clm.py example uses it
    ours        hf_ws.training.train
    teacher     the teacher's forward pass alone, on the same batches
    distil      hf_ws.training.train with that teacher, forward KL
    compiled    on a GPU: the same with compile=True
    liger       on a GPU with the package liger_kernel: the same with its kernels for norms, positions and MLPs
    both        on a GPU with it: compile=True and its kernels

    plain       forward KL and cross-entropy from whole float32 logits, backward; peak memory at a vocabulary of 128 k
    chunked     the same by hf_ws.distill.token_losses, from hidden states
    fused       on a GPU with liger_kernel: the same by its two fused losses

With liger_kernel, how far its losses and their gradients, and a model with its kernels, are from ours in float32.
Utilisation counts the FLOPs that the models need: of a token, 2 for every weight and 2 for every channel of every token
that it attends to, twice, in the teacher's forward pass; three times as many in a step of the student. Attention is
causal, so half of all pairs; the PaLM paper (2204.02311, appendix B) counts all of them, and would say more.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "student": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
        "teacher": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12},
        "vocab": 8192, "block": 256, "batch": 8, "steps": 9, "precision": "fp32",
    },
    "large": {  # about 0.5 B and 1.5 B
        "student": {"hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 20, "num_attention_heads": 20},
        "teacher": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 26, "num_attention_heads": 32},
        "vocab": 32768, "block": 2048, "batch": 8, "steps": 30, "precision": "bf16",
    },
}  # fmt: skip
ARMS = ["bare", "trainer", "ours", "teacher", "distil"]
MEMORY = ["plain", "chunked"]
TAUGHT = {"distil": {}, "compiled": {"compile": True}, "liger": {"liger": True}}
TAUGHT["both"] = TAUGHT["compiled"] | TAUGHT["liger"]
"""The settings of the arms that distil."""
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""bf16 FLOP/s of the makers' sheets, dense."""


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("speed", "memory", "exact"))
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(args.arm, SHAPES[args.shape], args.threads)))
        return
    import torch

    gpu, liger = torch.cuda.is_available(), find_spec("liger_kernel") is not None
    speed = ARMS + ["compiled"] * gpu + ["liger", "both"] * (gpu and liger)
    tables = {"speed": speed, "memory": MEMORY + ["fused"] * (gpu and liger), "exact": ["exact"] * liger}
    for title, arms in tables.items():
        if args.only in (None, title):
            found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
            for run in range(args.runs):
                for arm in arms:
                    print(f"{title}, run {run + 1} of {args.runs}: {arm}", file=sys.stderr)
                    found[arm].append(one(arm, args))
            report(title, found)


def one(arm: str, args: argparse.Namespace) -> dict[str, float]:
    """One measurement, in a process of its own."""
    command = [sys.executable, __file__, "--arm", arm, "--shape", args.shape, "--threads", str(args.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def report(title: str, found: dict[str, list[dict[str, float]]]) -> None:
    """Medians as a table."""
    middle = {
        arm: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for arm, runs in found.items()
    }
    if title == "exact":
        for own in middle.values():
            print(
                "\nfrom Liger's, relative: " + ", ".join(f"{key} {value:.1e}" for key, value in own.items())
            )
        return
    if title == "memory":
        print("\n| | GB | seconds | share of plain's memory |\n|---|---|---|---|")
        for arm, own in middle.items():
            share = own["gigabytes"] / middle["plain"]["gigabytes"]
            print(f"| {arm} | {own['gigabytes']:.2f} | {own['seconds']:.2f} | {share:.2f} |")
        return
    print("\n| | tokens/s | x bare | FLOPs utilisation |\n|---|---|---|---|")
    for arm, own in middle.items():
        used = f"{own['utilisation']:.0%}" if own["utilisation"] else ""
        print(f"| {arm} | {own['speed']:,.0f} | {own['speed'] / middle['bare']['speed']:.2f} | {used} |")
    apart = 1 / (1 / middle["bare"]["speed"] + 1 / middle["teacher"]["speed"])
    print(f"\ndistil takes {apart / middle['distil']['speed']:.3f} x the time of bare and teacher together")


def measure(arm: str, shape: dict[str, Any], threads: int) -> dict[str, float]:
    """What this process was started for."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arm == "exact":
        return exact(device)
    if arm in (*MEMORY, "fused"):
        return peak(arm, device)
    with device:  # drawn there: the CPU takes longer for it than a GPU for all steps
        student = llama(shape, "student")
        teacher = llama(shape, "teacher").eval() if arm in ("teacher", *TAUGHT) else None
    if teacher is not None and shape["precision"] == "bf16":
        teacher = teacher.bfloat16()
    count = shape["batch"] * shape["steps"]
    ids = torch.randint(shape["vocab"], (count, shape["block"]))
    run = {"bare": bare, "trainer": trainer, "teacher": forward}.get(arm) or partial(ours, arm)
    clock = Clock(teacher if arm == "teacher" else student, device, threads)
    run(student, teacher, ids, shape, device)
    speed = shape["batch"] * shape["block"] / clock.pace()
    length = shape["block"]
    flops = 3 * forward_flops(student, length) * (arm != "teacher") + forward_flops(teacher, length)
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    best = next((value for key, value in PEAK.items() if key in name), 0.0)
    return {"speed": speed, "utilisation": speed * flops / best if best else 0.0}


def llama(shape: dict[str, Any], which: str) -> Any:
    """A fresh model of a shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": shape["vocab"], "max_position_embeddings": shape["block"]}
    return LlamaForCausalLM(LlamaConfig(**sizes, **shape[which]))


def forward_flops(model: Any, length: int) -> int:
    """Of a token's way through a model, in sequences of a length; 0 without a model."""
    if model is None:
        return 0
    config = model.config
    weights = sum(
        p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n
    )  # that is looked up
    attention = 2 * config.num_hidden_layers * config.hidden_size * length // 2  # scores, and what they weigh
    return 2 * (weights + attention)


class Clock:
    """Notes the time whenever the model begins a step.

    On a GPU once all before is done; on one CPU thread this process's own time, which others on the machine do not
    lengthen; else the wall's.
    """

    def __init__(self, model: Any, device: Any, threads: int) -> None:
        self.times: list[float] = []
        self.device = device
        self.now = time.process_time if device.type == "cpu" and threads == 1 else time.perf_counter
        model.register_forward_pre_hook(self.note)

    def note(self, model: Any, _: Any) -> None:
        """Note it; not where the recipe tries the head out on one row, which it does before it trains."""
        import torch

        if model.training:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(self.now())

    def pace(self) -> float:
        """Seconds from one step to the next, the first third left out."""
        times = self.times[len(self.times) // 3 :]
        return (times[-1] - times[0]) / (len(times) - 1)


def half(shape: dict[str, Any], device: Any) -> Any:
    """The precision that the arms share."""
    import torch

    return torch.autocast(device.type, torch.bfloat16) if shape["precision"] == "bf16" else nullcontext()


def batches(ids: Any, shape: dict[str, Any], device: Any) -> Iterator[Any]:
    """The token ids of one step after another."""
    for rows in ids.split(shape["batch"]):
        yield rows.to(device)


def bare(student: Any, teacher: Any, ids: Any, shape: dict[str, Any], device: Any) -> None:
    """A loop that does nothing else."""
    import torch

    optimizer = torch.optim.AdamW(
        student.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, shape["steps"])
    student.train()
    for rows in batches(ids, shape, device):
        with half(shape, device):
            loss = student(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def forward(student: Any, teacher: Any, ids: Any, shape: dict[str, Any], device: Any) -> None:
    """The teacher's forward pass; in training mode for the clock's sake, which changes nothing without dropout."""
    import torch

    teacher.train()
    for rows in batches(ids, shape, device):
        with torch.no_grad(), half(shape, device):
            teacher(input_ids=rows, use_cache=False)


def trainer(student: Any, teacher: Any, ids: Any, shape: dict[str, Any], device: Any) -> None:
    """Transformers' Trainer."""
    import datasets
    from transformers import Trainer, TrainingArguments, default_data_collator

    rows = datasets.Dataset.from_dict({"input_ids": ids.numpy(), "labels": ids.numpy()})
    arguments = TrainingArguments(
        output_dir="/tmp", max_steps=shape["steps"], per_device_train_batch_size=shape["batch"], report_to="none",
        save_strategy="no", logging_steps=10, disable_tqdm=True, bf16=shape["precision"] == "bf16",
        use_cpu=device.type == "cpu", dataloader_pin_memory=device.type != "cpu",
    )  # fmt: skip
    Trainer(model=student, args=arguments, train_dataset=rows, data_collator=default_data_collator).train()


def ours(arm: str, student: Any, teacher: Any, ids: Any, shape: dict[str, Any], device: Any) -> None:
    """The recipe."""
    from hf_ws.training import TrainConfig, train

    config = TrainConfig(
        steps=shape["steps"], batch_size=shape["batch"], learning_rate=1e-4, precision=shape["precision"],
        progress=False, **{"liger": False} | TAUGHT.get(arm, {}),
    )  # fmt: skip
    train(config, model=student, teacher=teacher, train_blocks=ids)


def sides(tokens: int, vocab: int, widths: tuple[int, int], device: Any) -> tuple[Any, ...]:
    """Hidden states and heads of student and teacher, and labels; the student's take gradients."""
    import torch

    hidden, taught = (torch.randn(tokens, width, device=device) for width in widths)
    # In place, for what is freed before the start would hide as much of the peak.
    weight, theirs = (torch.randn(vocab, width, device=device).div_(width**0.5) for width in widths)
    labels = torch.randint(vocab, (tokens,), device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), taught, theirs, labels


def plain(hidden: Any, weight: Any, taught: Any, theirs: Any, labels: Any) -> Any:
    """Half cross-entropy, half forward KL, from whole logits."""
    from torch.nn.functional import cross_entropy, kl_div

    logits, wanted = hidden @ weight.T, (taught @ theirs.T).log_softmax(-1)
    divergence = kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")
    return 0.5 * cross_entropy(logits, labels) + 0.5 * divergence


def chunked(hidden: Any, weight: Any, taught: Any, theirs: Any, labels: Any) -> Any:
    """The same by ours."""
    from hf_ws.distill import Head, token_losses

    heads = {"student_head": Head(weight), "teacher_head": Head(theirs)}
    return token_losses(hidden, labels, taught, weights={"cross_entropy": 0.5, "forward_kl": 0.5}, **heads)[0]


def fused(hidden: Any, weight: Any, taught: Any, theirs: Any, labels: Any) -> Any:
    """The same by Liger's; its generalised Jensen-Shannon divergence is forward KL at beta 0."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    divergence = LigerFusedLinearJSD(jsd_beta=0.0)(hidden, weight, taught, theirs, labels)
    return 0.5 * LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels) + 0.5 * divergence


def peak(arm: str, device: Any) -> dict[str, float]:
    """Peak memory beyond what is there before the loss, and its seconds: 2,048 tokens, vocabulary 128 k."""
    import torch

    loss = {"plain": plain, "chunked": chunked, "fused": fused}[arm]
    given = sides(2048, 131_072, (512, 1024), device)
    given[1].grad = torch.zeros_like(given[1])  # there before every step but the first
    if device.type == "cuda":  # a first time for what is loaded and tuned on the way
        loss(*given).backward()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, started = _memory(device), time.perf_counter()
    done = loss(*given)
    done.backward()
    float(done)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {"gigabytes": (_memory(device) - before) / 1e9, "seconds": time.perf_counter() - started}


def exact(device: Any) -> dict[str, float]:
    """The largest differences from Liger's, as parts of the largest value: of the loss and gradients, and of logits."""
    import torch

    from hf_ws.training.kernels import put_kernels

    given = sides(256, 4096, (256, 512), device)
    found = []
    for one in (chunked, fused):
        loss = one(*given)
        found.append((loss.detach(), *torch.autograd.grad(loss, given[:2])))
    names = ("loss", "gradient of states", "gradient of head")
    apart = {name: apart_by(*pair) for name, pair in zip(names, zip(*found, strict=True), strict=True)}
    if device.type == "cpu":  # under Triton's interpreter, which does not run all kernels
        return apart
    model, ids = llama(SHAPES["small"], "student").to(device), torch.arange(256, device=device)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        put_kernels(model, True)
        return apart | {"logits": apart_by(before, model(input_ids=ids).logits)}


def apart_by(ours: Any, theirs: Any) -> float:
    """The largest difference, as a part of the largest value."""
    return float((ours - theirs).abs().max() / ours.abs().max())


def _memory(device: Any) -> float:
    import torch

    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


if __name__ == "__main__":
    main()
