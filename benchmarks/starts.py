"""Starts of small models from larger ones, compared: every method, rate chosen for each, several seeds.

    python benchmarks/starts.py --sources demo                   # the demo's source, at hand at once: some hours
    python benchmarks/starts.py --sources llama gpt2             # trains the sources first: many hours
    python benchmarks/starts.py --sources llama-100m             # on a GPU
    python benchmarks/starts.py --sources llama-peps --peps FOLDER   # text of the PEPs: train.txt.xz and test.txt.xz
    python benchmarks/starts.py --status                         # what is done, and what is left
    python benchmarks/starts.py --table                          # results and plots into benchmarks/results/starts
    python benchmarks/starts.py --final                          # the second held-out part: once, at the end

The work goes on where it was: a unit is one start with one learning rate and one seed, its result one file in the
cache (or committed), and a run or a source's training that is killed goes on from its last checkpoint. SIGTERM ends a
run at the next step. `benchmarks/starting/arms.py` holds the starts, a line each; `STAGES` in `units.py` the order.

Sources are trained here (`starting/sources.py`): `llama` (16 M, grouped key/value heads, head not tied) and `gpt2`
(LayerNorm, tied, learned positions) on Python's standard library, `llama-peps` on English, `llama-100m` on the
Python sources installed where it runs. All students of a source see
the same batches under the same schedule, bf16, 4,096 tokens a step; the peak rate of each is the best of a grid on
100 steps, and the grid goes on while its best is at an edge. Losses are over 128 held-out blocks, which choose the rate
too; so a second held-out part is kept, measured with every run and shown by `--final` alone. A seed is another order of
the batches and other calibration sequences (64 of 256 tokens, from the training text).
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.starting.arms import ARMS
from benchmarks.starting.report import Report, draw, final_table, tables
from benchmarks.starting.sources import RECIPES, Source, make, told_of
from benchmarks.starting.units import CHOOSING, Bench, Results, Unit, every, left, seconds_a_unit
from hf_ws.errors import StoppedError

RESULTS = Path(__file__).parent / "results" / "starts"


def main(arguments: list[str] | None = None) -> None:
    """Do what is asked; without a question, work."""
    args = _arguments(arguments)
    transformers_logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    for name in args.sources:
        if args.status:
            print(status(name, args))
        elif args.table:
            report = collect(name, args)
            if report is not None:
                report.write(args.results)
                draw(report, args.results)
                print(tables(report))
        elif args.final:
            report = collect(name, args)
            if report is not None:
                print(final_table(report))
        else:
            work(name, args)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--sources",
        nargs="+",
        choices=RECIPES,
        default=list(RECIPES),
        metavar="SOURCE",
        help=f"of {', '.join(RECIPES)}",
    )
    add("--cache", type=Path, default=Path("~/.cache/hf_ws/starts"), help="where sources and units are kept")
    add("--results", type=Path, default=RESULTS, help="the committed results")
    add("--peps", type=Path, help="folder with train.txt.xz and test.txt.xz, for llama-peps")
    add("--only-sources", action="store_true", help="train the sources and stop there")
    add(
        "--steps-up-to",
        type=int,
        help="only units of at most so many steps; 0 measures starts and trains none",
    )
    add("--arms", nargs="+", choices=ARMS, metavar="ARM", help=f"only these, of: {'; '.join(ARMS)}")
    add("--minutes", type=float, help="begin no unit after this long")
    add("--threads", type=int, help="of torch; all cores if not given")
    add("--status", action="store_true")
    add("--table", action="store_true", help="write results and plots, print the tables")
    add("--plot", action="store_true", dest="table", help="the same")
    add("--final", action="store_true", help="print the losses on the second held-out part")
    args = parser.parse_args(arguments)
    args.cache = args.cache.expanduser()
    return args


def work(name: str, args: argparse.Namespace) -> None:
    """Train the source if it is not yet, then unit after unit."""
    began = time.monotonic()
    try:
        source = make(name, args.cache, args.peps)
        print(f"{name}: loss {source.told['loss']:.3f}", flush=True)
        if args.only_sources:
            return
        bench = Bench(source, Results(args.cache, args.results))
        while todo := wanted(bench, args):
            if args.minutes is not None and time.monotonic() - began > 60 * args.minutes:
                return
            unit = todo[0]
            result = bench.run(unit, args.cache / "running")
            print(
                f"{time.strftime('%H:%M:%S')} {unit.key}: {result['curve'][0][1]:.4f} to {result['curve'][-1][1]:.4f}, "
                f"{result['seconds']:.0f} s; {len(todo) - 1} left",
                flush=True,
            )
    except StoppedError as stopped:
        raise SystemExit(f"{name}: {stopped}") from None


def wanted(bench: Bench, args: argparse.Namespace) -> list[Unit]:
    """What is left of the units asked for."""
    return [
        unit
        for unit in left(bench)
        if (args.arms is None or unit.arm in args.arms)
        and (args.steps_up_to is None or unit.steps <= args.steps_up_to)
    ]


def status(name: str, args: argparse.Namespace) -> str:
    """What is done of a source's work."""
    told = told_of(name, args.cache)
    if told is None:
        return f"{name}: the source is not trained (or not in {args.cache})"
    bench = Bench(
        Source(name, _folder(name, args), {}, told, RECIPES[name].targets), Results(args.cache, args.results)
    )
    todo, units = left(bench), every(bench)
    lines = [f"{name}: loss {told['loss']:.3f}, fingerprint {told['fingerprint']}"]
    for stage in dict.fromkeys(units.values()):
        ours = [unit for unit, its in todo.items() if its == stage]
        count = sum(its == stage for its in units.values())
        hours = seconds_a_unit(bench, ours) / 3600
        lines.append(f"  {stage.says}: {count - len(ours)} of {count} done, {hours:.1f} h left")
    for arm in ARMS:
        if why := bench.refusal(arm, CHOOSING):
            lines.append(f"  waits: {arm} ({why})")
    return "\n".join(lines)


def collect(name: str, args: argparse.Namespace) -> Report | None:
    """The results of a source, committed and in the cache; None if there is none."""
    file = args.results / f"{name}.json"
    committed = Report.read(file) if file.is_file() else None
    told = told_of(name, args.cache) or (committed.told if committed else None)
    if told is None:
        print(f"{name}: no results", file=sys.stderr)
        return None
    if committed and committed.told["fingerprint"] != told["fingerprint"]:
        raise SystemExit(
            f"{file} holds results of another training of {name} ({committed.told['fingerprint']}) than the cache "
            f"({told['fingerprint']}); they are not mixed: move the file away, or name the cache of that source"
        )
    return Report(told, Results(args.cache, args.results).all(name, told["fingerprint"]))


def _folder(name: str, args: argparse.Namespace) -> Path:
    return RECIPES[name].folder or args.cache / "sources" / name / "run" / "model"


if __name__ == "__main__":
    logging.getLogger("hf_ws").setLevel(
        logging.ERROR
    )  # that magnitude ranks without data is the point of one arm
    main()
