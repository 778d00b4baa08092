"""What calibration costs: wall time against the plain forward passes it needs, and memory.

    python benchmarks/calibration.py                    # 1.1 B parameters, made as benchmarks/transfer.py makes them
    python benchmarks/calibration.py --shape small

A Llama-shaped bf16 source. Every contender is a process of its own, repeated in turn, the source in the page cache;
medians are printed. Loading the model and proving its layouts are not counted. CPU seconds are what the process worked,
whatever else ran on the machine.

    plain       forward passes without gradients, the logits of one token only
    mean_abs    `calibrate` as a ranking wants it
    policy      `calibrate` with all that scores and layer policies ask and that needs no gradient
    moments     `calibrate` with second moments of everything that a matrix reads
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from transfer import SHAPES, make_source

WANTS = {
    "mean_abs": ("mean_abs",),
    "policy": ("rms", "mean", "variance", "similarity", "angles", "routes"),
    "moments": ("moments",),
}


class Peak(threading.Thread):
    """The most anonymous memory that this process held while it ran, in bytes beyond what it held before."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = self._now()
        self._over = threading.Event()

    def run(self) -> None:
        """Look every 20 ms."""
        while not self._over.wait(0.02):
            self.most = max(self.most, self._now())

    def stop(self) -> int:
        """The bytes."""
        self._over.set()
        self.join()
        return self.most - self.before

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        return 0


def measure(source: Path, contender: str, sequences: int, length: int) -> dict[str, float]:
    """Seconds and bytes of one run, in this process."""
    import torch
    from transformers import AutoModelForCausalLM

    from hf_ws import calibrate, certify
    from hf_ws.evidence import BATCH

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    certificate = certify(model)
    ids = torch.randint(
        0, model.config.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        model(ids[:1, :64], logits_to_keep=1)  # all weights are read once
    peak = Peak()
    peak.start()
    began, worked = time.perf_counter(), time.process_time()
    if contender == "plain":
        with torch.no_grad():
            for batch in ids.split(BATCH):
                model(batch, logits_to_keep=1)
    else:
        calibrate(model, ids, certificate=certificate, wants=WANTS[contender])
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    return {"seconds": seconds, "cpu": cpu, "bytes": peak.stop()}


def run(source: Path, contender: str, sequences: int, length: int) -> dict[str, float]:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--one", contender, "--work", str(source)]
    command += ["--sequences", str(sequences), "--length", str(length)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Make the source, measure, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--sequences", type=int, default=8, help="in the comparison")
    parser.add_argument("--whole", type=int, default=64, help="in one run of mean_abs at the end; 0 for none")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--moments-runs", type=int, default=1)
    parser.add_argument(
        "--work", type=Path, help="where the source is made and kept; a temporary folder if not given"
    )
    parser.add_argument("--one", choices=("plain", *WANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.work, args.one, args.sequences, args.length)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        source = (args.work or Path(temporary)) / f"calibration-{args.shape}"
        if not source.exists():
            source.parent.mkdir(parents=True, exist_ok=True)
            make_source(source, SHAPES[args.shape])
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ("plain", *WANTS)}
        for turn in range(args.runs):
            for name, rows in found.items():
                if name != "moments" or turn < args.moments_runs:
                    rows.append(run(source, name, args.sequences, args.length))
                    print(name, rows[-1], file=sys.stderr, flush=True)
        report(found, args.sequences, args.length)
        if args.whole:
            row = run(source, "mean_abs", args.whole, args.length)
            print(
                f"\nmean_abs on {args.whole} sequences of {args.length} tokens: {row['seconds']:.0f} s, "
                f"{row['bytes'] / 1e9:.2f} GB beyond the model"
            )


def report(found: dict[str, list[dict[str, float]]], sequences: int, length: int) -> None:
    """Print the medians."""
    print(f"{sequences} sequences of {length} tokens\n")
    print("| | runs | seconds | x plain | CPU seconds | x plain | GB beyond the model |")
    print("|---|---|---|---|---|---|---|")

    def median(name: str, what: str) -> float:
        return statistics.median(row[what] for row in found[name])

    for name, rows in found.items():
        line = f"| {name} | {len(rows)}"
        for what in ("seconds", "cpu"):
            line += f" | {median(name, what):.1f} | {median(name, what) / median('plain', what):.2f}"
        print(f"{line} | {median(name, 'bytes') / 1e9:.2f} |")


if __name__ == "__main__":
    main()
