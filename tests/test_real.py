"""The main job on real pretrained weights: the demo's source, and any other that lies beside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_ws import AutoSubclone
from hf_ws.plan import Gather
from hf_ws.sizes import sizes_of

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "recipes" / "demo" / "source"
BESIDE = ROOT.parent / "shared" / "real" / "stories260k"
HF_WS = str(Path(sys.executable).with_name("hf-ws"))
SOURCES = [path for path in (DEMO, BESIDE) if path.is_dir()]


@cache
def source_model(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@cache
def text(path: Path) -> torch.Tensor:
    """Token ids [32, 128] of what the model was trained to write: source code, or stories of its own."""
    if (path / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(path)
        files = [
            "argparse.py",
            "ast.py",
            "calendar.py",
            "configparser.py",
            "csv.py",
            "datetime.py",
            "shutil.py",
        ]
        code = "".join((Path(sysconfig.get_paths()["stdlib"]) / name).read_text() for name in files)
        return torch.tensor(tokenizer(code)["input_ids"][: 32 * 128]).view(32, 128)
    torch.manual_seed(0)
    start = torch.ones(32, 1, dtype=torch.long)
    return source_model(path).generate(
        start, attention_mask=start, do_sample=True, max_new_tokens=127, min_new_tokens=127, pad_token_id=0
    )


@torch.no_grad()
def loss(model: PreTrainedModel, ids: torch.Tensor) -> float:
    return float(model.float()(input_ids=ids, labels=ids).loss)


def smaller(path: Path, method: str, **more: object) -> PreTrainedModel:
    sizes = sizes_of(source_model(path).config)
    return AutoSubclone.from_pretrained(
        path, hidden=sizes["hidden"] // 2, layers=round(sizes["layers"] * 3 / 4), method=method, **more
    )


def test_a_start_knows_part_of_what_its_source_knows() -> None:
    """Not so the 260 K model beside: half of a stream of 64 channels says nothing before it is trained."""
    path = DEMO
    ids = text(path)
    whole = loss(source_model(path), ids[16:])
    fresh = loss(smaller(path, "random"), ids[16:])
    selected = loss(smaller(path, "weight_selection"), ids[16:])
    subcloned = loss(smaller(path, "subclone", calibration=ids[:16]), ids[16:])
    assert whole < subcloned < selected < fresh


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.parent.name)
@pytest.mark.parametrize("method", ["subclone", "weight_selection"])
def test_the_same_size_is_the_same_model(path: Path, method: str) -> None:
    source = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    target = AutoSubclone.from_pretrained(path, method=method)
    wanted, made = source.state_dict(), target.state_dict()
    assert wanted.keys() == made.keys()
    assert all(torch.equal(wanted[name], made[name]) for name in wanted)
    assert source.generation_config.to_dict() == target.generation_config.to_dict()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.parent.name)
def test_two_processes_make_the_same_bytes(path: Path, tmp_path: Path) -> None:
    """Whatever the hash seed and the number of threads; ranked, with gains."""
    made = []
    for number, (hash_seed, threads) in enumerate([("0", "1"), ("7", "2")]):
        folder = tmp_path / str(number)
        hidden = sizes_of(source_model(path).config)["hidden"] // 2
        _run(
            f"{HF_WS} subclone {path} {folder} --hidden {hidden} --layers 2",
            PYTHONHASHSEED=hash_seed,
            OMP_NUM_THREADS=threads,
        )
        made.append((folder / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_from_a_checkpoint_to_a_trained_student(tmp_path: Path) -> None:
    """The road of the README: the command line makes the start, the recipe distils it, Transformers loads it."""
    start, run = tmp_path / "start", tmp_path / "run"
    files = [
        str(Path(sysconfig.get_paths()["stdlib"]) / name) for name in ("argparse.py", "ast.py", "csv.py")
    ]
    _run(f"{HF_WS} subclone {DEMO} {start} --hidden 128 --layers 2")
    _run(
        f"{sys.executable} -m accelerate.commands.launch --cpu recipes/clm.py --config recipes/configs/smoke.yaml "
        f"--model {start} --teacher {DEMO} --output {run} --steps 6 --eval-every 3 --warmup-steps 1 "
        f"--train-files {' '.join(files)} --eval-files {files[0]}"
    )
    trained = AutoModelForCausalLM.from_pretrained(run / "model")
    untrained = AutoModelForCausalLM.from_pretrained(start)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = torch.tensor(tokenizer(Path(files[0]).read_text())["input_ids"][:1024]).view(8, 128)
    assert loss(trained, ids) < loss(untrained, ids)
    assert (run / "metrics.jsonl").read_text().count("\n") > 1
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def _run(command: str, **variables: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(
        command.split(), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


def test_a_narrower_head_keeps_the_frequencies_that_it_turns_at() -> None:
    """At every size better than the first channels of a head, and than its first pairs."""
    ids = text(DEMO)[16:]
    for keep in (48, 32):
        plan = AutoSubclone.plan(DEMO, head_dim=keep, method="weight_selection")
        half = keep // 2
        others = (tuple(range(keep)), (*range(half), *range(32, 32 + half)))
        losses = [
            loss(plan.with_maps({**plan.maps, "head_dim": Gather(index, 64)}).apply(DEMO), ids)
            for index in (plan.maps["head_dim"].index, *others)
        ]
        assert losses[0] == min(losses)
        assert losses[0] < losses[2] - 0.05
