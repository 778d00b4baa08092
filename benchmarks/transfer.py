"""What a transfer costs: wall time against a plain copy and against plain torch, memory against the target's size.

    python benchmarks/transfer.py                       # 1.1 B parameters, 2.2 GB; a few minutes
    python benchmarks/transfer.py --shape 7b            # 13 GB; made once under --work and kept

A Llama-shaped bf16 checkpoint in several shards is made on the spot and brought to half its width and half its depth.
Every measurement is a process of its own, repeated, with the source in the page cache; medians are printed.

    copy        read the bytes that must be read (kept rows of kept tensors), write as many as the target has
    plain       `from_pretrained`, slice in torch, `save_pretrained`
    selection   AutoSubclone, method weight_selection, `save_pretrained`
    subclone    AutoSubclone, a settled subclone plan (importance ranks, gains), `save_pretrained`
    ranking     making that plan: weight magnitude of every tensor of the source
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SHAPES = {
    "small": {"layers": 4, "hidden": 512, "ffn": 1536, "heads": 8, "kv_heads": 2},
    "1b": {"layers": 16, "hidden": 2048, "ffn": 8192, "heads": 32, "kv_heads": 8},
    "7b": {"layers": 32, "hidden": 4096, "ffn": 11008, "heads": 32, "kv_heads": 32},
}
CONTENDERS = ("copy", "plain", "selection", "subclone")


def make_source(folder: Path, shape: dict[str, int]) -> None:
    """A random checkpoint, written shard by shard so that 13 GB need no 13 GB of memory."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=shape["hidden"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        meta = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    split = split_torch_state_dict_into_shards(meta, max_shard_size="1GB")
    staging = folder.with_name(folder.name + ".part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    config.save_pretrained(staging)
    torch.manual_seed(0)
    for filename, names in split.filename_to_tensors.items():
        tensors = {n: torch.randn(meta[n].shape, dtype=torch.bfloat16).mul_(0.02) for n in names}
        save_file(tensors, staging / filename, metadata={"format": "pt"})
    if not split.is_sharded:
        staging.rename(folder)
        return
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in meta.values())},
        "weight_map": split.tensor_to_filename,
    }
    (staging / "model.safetensors.index.json").write_text(json.dumps(index))
    staging.rename(folder)


def _half(shape: dict[str, int]) -> dict[str, int]:
    return {"hidden": shape["hidden"] // 2, "layers": shape["layers"] // 2}


def run_copy(source: Path, output: Path, shape: dict[str, int]) -> None:
    """Read the kept rows' share of every kept tensor and write the target's number of bytes."""
    from safetensors import safe_open

    kept = {str(i) for i in range(shape["layers"] // 2)}
    buffer = bytearray(1 << 23)
    with (output / "copy.bin").open("wb") as out:
        for path in sorted(source.glob("*.safetensors")):
            with safe_open(path, "pt") as header, path.open("rb", buffering=0) as raw:
                for name in header.keys():  # noqa: SIM118 - a handle, not a dict
                    part = name.split(".")[2] if name.startswith("model.layers.") else None
                    if part is not None and part not in kept:
                        continue
                    size = 2
                    for length in header.get_slice(name).get_shape():
                        size *= length
                    halves = (
                        part is not None
                    )  # of a matrix in a layer, half the rows; embeddings and head keep all
                    _stream(
                        raw,
                        out,
                        buffer,
                        read=size // 2 if halves else size,
                        write=size // (4 if halves else 2),
                    )


def _stream(raw, out, buffer: bytearray, *, read: int, write: int) -> None:
    view = memoryview(buffer)
    while read > 0:
        count = raw.readinto(view[: min(read, len(buffer))])
        if not count:
            raw.seek(0)
            continue
        read -= count
        if write > 0:
            write -= out.write(view[: min(write, count)])


def run_plain(source: Path, output: Path, shape: dict[str, int]) -> None:
    """What one writes by hand: load all, slice, save."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(source, dtype="auto")
    half = _half(shape)
    values = model.config.to_dict() | {
        "hidden_size": half["hidden"],
        "intermediate_size": shape["ffn"] // 2,
        "num_hidden_layers": half["layers"],
        "num_attention_heads": shape["heads"] // 2,
        "num_key_value_heads": shape["kv_heads"] // 2,
    }
    target = LlamaForCausalLM(LlamaConfig.from_dict(values)).to(torch.bfloat16)
    state = model.state_dict()
    small = {
        name: state[name][
            tuple(slice(0, None, max(1, big // t)) for big, t in zip(state[name].shape, p.shape, strict=True))
        ]
        for name, p in target.state_dict().items()
    }
    target.load_state_dict(small)
    target.save_pretrained(output)


def run_selection(source: Path, output: Path, shape: dict[str, int]) -> None:
    """Ours, with evenly spaced indices."""
    from hf_ws import AutoSubclone

    AutoSubclone.from_pretrained(source, method="weight_selection", **_half(shape)).save_pretrained(output)


def run_subclone(source: Path, output: Path, shape: dict[str, int]) -> None:
    """Ours, with ranked indices and gains; the ranking was done before."""
    from hf_ws import Plan

    Plan.load(source.with_suffix(".plan.json")).apply(source).save_pretrained(output)


def run_ranking(source: Path, output: Path, shape: dict[str, int]) -> None:
    """Settle a subclone plan by weight magnitude, and keep it for `subclone`."""
    from hf_ws import AutoSubclone
    from hf_ws.store import open_source
    from hf_ws.transfer import settle

    plan = AutoSubclone.plan(source, **_half(shape))
    with open_source(source) as opened:
        settle(plan, opened).save(source.with_suffix(".plan.json"))


def measure(name: str, source: Path, shape: dict[str, int]) -> None:
    """Run one contender in this process; print seconds, and anonymous memory beyond what the imports took."""
    import torch
    import transformers

    import hf_ws.auto  # noqa: F401 - an idle interpreter with everything imported is where counting starts

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    idle, peak, done = _anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _anonymous())

    with tempfile.TemporaryDirectory(dir=source.parent) as output:
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        start = time.perf_counter()
        globals()[f"run_{name}"](source, Path(output), shape)
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
        written = sum(f.stat().st_size for f in Path(output).iterdir())
    print(json.dumps({"seconds": seconds, "anonymous": max(0, peak - idle), "written": written}))


def _anonymous() -> int:
    """Anonymous resident memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc/self/status, which needs Linux")


def _child(name: str, shape: str, work: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", name, "--shape", shape, "--work", str(work)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{name} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """Make the source, run every contender in turn, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--work", type=Path, default=Path("benchmarks/.work"), help="where the source is made and kept"
    )
    parser.add_argument("--child", choices=[*CONTENDERS, "ranking"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    source, shape = args.work.absolute() / args.shape, SHAPES[args.shape]
    if args.child:
        return measure(args.child, source, shape)
    if not source.exists():
        print(f"making {source} ...", flush=True)
        make_source(source, shape)
    for path in source.glob("*.safetensors"):  # into the page cache
        path.read_bytes()[:0]
    ranking = _child("ranking", args.shape, args.work)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(args.runs):
        for name in CONTENDERS:
            rows[name].append(_child(name, args.shape, args.work))
    _report(args.shape, rows, ranking)


def _report(shape: str, rows: dict[str, list[dict[str, float]]], ranking: dict[str, float]) -> None:
    seconds = {name: statistics.median(r["seconds"] for r in runs) for name, runs in rows.items()}
    memory = {name: statistics.median(r["anonymous"] for r in runs) for name, runs in rows.items()}
    target = rows["selection"][0]["written"]
    print(f"shape {shape}, target {target / 1e9:.2f} GB, {len(rows['copy'])} runs, medians\n")
    print(
        f"{'':10} {'seconds':>8} {'x copy':>7} {'x plain':>8} {'anonymous GB':>13} {'beyond target GB':>17}"
    )
    for name in CONTENDERS:
        beyond = (memory[name] - target) / 1e9
        print(
            f"{name:10} {seconds[name]:8.2f} {seconds[name] / seconds['copy']:7.2f} "
            f"{seconds[name] / seconds['plain']:8.2f} {memory[name] / 1e9:13.2f} {beyond:17.2f}"
        )
    print(
        f"ranking by magnitude, once: {ranking['seconds']:.2f} s, anonymous {ranking['anonymous'] / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
