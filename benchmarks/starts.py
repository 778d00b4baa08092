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
run at the next step. The same command in several processes shares the work. `benchmarks/starting/arms.py` holds the
starts, a line each; `STAGES` in `units.py` the order.

Sources are trained here (`starting/sources.py`): `llama` (16 M, grouped key/value heads, head not tied) and `gpt2`
(LayerNorm, tied, learned positions) on Python's standard library, `llama-peps` on English, `llama-100m` on the Python
sources installed where it runs, `llama-near` and `llama-far` as parents of `llama`'s students that are nearer to them
in size, and further. All students of a source see the same batches under the same schedule, bf16, 4,096 tokens a step;
the peak rate of each is the best of whole runs with a grid of rates, which goes on while its best is at an edge. Losses
are over 128 held-out blocks, which choose the rate too; so a second held-out part is kept, measured with every run and
shown by `--final` alone. A seed is another order of the batches and other calibration sequences (64 of 256 tokens, from
the training text).
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.starting.arms import ARMS
from benchmarks.starting.report import Report, draw, final_table, tables
from benchmarks.starting.sources import RECIPES, Source, make, told_of
from benchmarks.starting.units import (
    CHOOSING,
    STAGES,
    Bench,
    Results,
    Stage,
    Unit,
    claim,
    every,
    left,
    seconds_a_unit,
)
from hf_ws.errors import StoppedError

RESULTS = Path(__file__).parent / "results" / "starts"


def main(arguments: list[str] | None = None) -> None:
    """Do what is asked; without a question, work."""
    args = _arguments(arguments)
    transformers_logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not (args.status or args.table or args.final):
        work(args)
        return
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
    add(
        "--steps-from",
        type=int,
        default=0,
        help="only units of at least so many steps; 1 leaves out what is not trained",
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


def work(args: argparse.Namespace) -> None:
    """Task after task: the first that is left and that no other process is at."""
    began = time.monotonic()
    benches: dict[str, Bench] = {}
    given_up: set[str] = set()

    def is_taken(key: str, task: Callable[[], str]) -> bool:
        with claim(args.cache / "claims" / key) as ours:
            if ours:
                try:
                    print(f"{time.strftime('%H:%M:%S')} {key}: {task()}", flush=True)
                except StoppedError as stopped:
                    raise SystemExit(f"{key}: {stopped}") from None
                except Exception:  # one start that fails does not cost the others
                    traceback.print_exc()
                    given_up.add(key)
        return ours

    while True:
        late = args.minutes is not None and time.monotonic() - began >= 60 * args.minutes
        todo = tasks(benches, args, units=not (late or args.only_sources))
        todo = {key: task for key, task in todo.items() if key not in given_up}
        if not todo:
            break
        if not any(is_taken(key, task) for key, task in todo.items() if task is not None):
            time.sleep(5)  # what is left is with other processes
    if given_up:
        raise SystemExit(f"failed, as told above: {', '.join(sorted(given_up))}")


def tasks(
    benches: dict[str, Bench], args: argparse.Namespace, units: bool
) -> dict[str, Callable[[], str] | None]:
    """What is left, in order: sources to train or to read, then, if wanted, units, stage by stage.

    None for a run whose learning rate other runs are still to choose.
    """

    def prepare(name: str) -> str:
        source = make(name, args.cache, args.peps)
        benches[name] = Bench(source, Results(args.cache, args.results))
        return f"loss {source.told['loss']:.3f}"

    def run(bench: Bench, unit: Unit) -> str:
        if bench.done(unit):
            return "done by another process"
        result = bench.run(unit, args.cache / "running")
        return f"{result['curve'][0][1]:.4f} to {result['curve'][-1][1]:.4f}, {result['seconds']:.0f} s"

    found: dict[str, Callable[[], str] | None] = {
        f"source {name}": partial(prepare, name) for name in args.sources if name not in benches
    }
    if units:
        left_over = [(s, b, unit) for b in benches.values() for unit, s in wanted(b, args).items()]
        left_over.sort(key=lambda one: STAGES.index(one[0]))
        found |= {
            unit.key: partial(run, bench, unit) if unit.rate or not unit.steps else None
            for _, bench, unit in left_over
        }
    return found


def wanted(bench: Bench, args: argparse.Namespace) -> dict[Unit, Stage]:
    """What is left of the units asked for."""
    return {
        unit: stage
        for unit, stage in left(bench).items()
        if (args.arms is None or unit.arm in args.arms)
        and args.steps_from <= unit.steps
        and (args.steps_up_to is None or unit.steps <= args.steps_up_to)
    }


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
        known = f"{hours:.1f} h left" if hours or not ours else "the rest never timed on such a machine"
        lines.append(f"  {stage.says}: {count - len(ours)} of {count} done, {known}")
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
