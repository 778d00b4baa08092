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
from hf_ws.sizes import sizes_of

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "recipes" / "demo" / "source"
BESIDE = ROOT.parent / "shared" / "real" / "stories260k"
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


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.parent.name)
def test_a_start_knows_part_of_what_its_source_knows(path: Path) -> None:
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
        command = [sys.executable, "-m", "hf_ws.cli", "subclone", str(path), str(folder), "--hidden", "32"]
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": threads}
        size = sizes_of(source_model(path).config)
        command[-1] = str(size["hidden"] // 2)
        subprocess.run(
            [*command, "--layers", "2"], check=True, env=environment, capture_output=True, timeout=120
        )
        made.append((folder / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_from_a_checkpoint_to_a_trained_student(tmp_path: Path) -> None:
    """The road of the README: the command line makes the start, the recipe distils it, Transformers loads it."""
    start, run = tmp_path / "start", tmp_path / "run"
    _run(
        sys.executable,
        "-m",
        "hf_ws.cli",
        "subclone",
        str(DEMO),
        str(start),
        "--hidden",
        "128",
        "--layers",
        "2",
    )
    recipe = [
        "recipes/clm.py",
        "--config",
        "recipes/configs/smoke.yaml",
        "--model",
        str(start),
        "--output",
        str(run),
    ]
    files = [
        str(Path(sysconfig.get_paths()["stdlib"]) / name) for name in ("argparse.py", "ast.py", "csv.py")
    ]
    more = [
        "--teacher",
        str(DEMO),
        "--steps",
        "6",
        "--eval-every",
        "3",
        "--warmup-steps",
        "1",
        "--train-files",
        *files,
    ]
    _run(
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", *recipe, *more, "--eval-files", files[0]
    )
    trained = AutoModelForCausalLM.from_pretrained(run / "model")
    untrained = AutoModelForCausalLM.from_pretrained(start)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = torch.tensor(tokenizer(Path(files[0]).read_text())["input_ids"][:1024]).view(8, 128)
    assert loss(trained, ids) < loss(untrained, ids)
    assert (run / "metrics.jsonl").read_text().count("\n") > 1
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def _run(*command: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
