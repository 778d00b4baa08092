"""The recipe on the engines that split a run over processes: each gives the loss curve of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
ENGINES = ROOT / "recipes" / "accelerate"
DEEPSPEED = ROOT / ".venv" / "deepspeed"
END = "<|endoftext|>"
FLAGS = "--block 16 --steps 8 --learning-rate 5e-3 --log-every 1 --eval-every 4 --max-eval-blocks 8 --save-every 4"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, a student, a teacher, and the run of one process."""
    folder = tmp_path_factory.mktemp("engines")
    texts = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" for i in range(150)]
    (folder / "text.py").write_text("\n".join(texts))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=280, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    for name, seed in (("student", 0), ("teacher", 4)):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(vocab_size=280, **sizes)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    launch(folder, "one", [sys.executable], batch=4, ACCELERATE_USE_CPU="1")
    return folder


def launch(
    folder: Path, name: str, launcher: list[str], *more: str, batch: int = 2, **environment: str
) -> None:
    known = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"}
    command = [*launcher, str(ROOT / "recipes" / "clm.py"), "--model", str(folder / "student")]
    command += [
        "--teacher",
        str(folder / "teacher"),
        "--train-files",
        str(folder / "text.py"),
        *FLAGS.split(),
    ]
    command += ["--batch-size", str(batch), "--output", str(folder / name), "--no-progress", *more]
    done = subprocess.run(
        command, env=os.environ | known | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def accelerate(folder: Path, engine: str) -> list[str]:
    """The launcher with one of our configs, for two processes in float32 whatever it says."""
    settings = yaml.safe_load((ENGINES / f"{engine}.yaml").read_text()) | {
        "num_processes": 2,
        "mixed_precision": "no",
    }
    file = folder / f"{engine}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_curve(folder: Path, name: str, reference: str = "one") -> None:
    one, other = rows(folder / reference), rows(folder / name)
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for a, b in zip(one, other, strict=True):
        for key in a.keys() & {"loss", "ce_loss", "kd_loss", "eval_loss", "tokens"}:
            assert b[key] == pytest.approx(a[key], abs=1e-3), (a, b)
    first, second = (load_file(folder / run / "model" / "model.safetensors") for run in (reference, name))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[key], second[key], atol=1e-4) for key in first)


MARKS = {
    "cpu2": "optimizer.pt",
    "fsdp2": "pytorch_model_fsdp.bin",
    "zero2": "global_step8",
    "zero3": "global_step8",
}
"""What only this engine leaves in a checkpoint: Accelerate takes another one without a word where it cannot."""


@pytest.mark.parametrize("engine", ["cpu2", "fsdp2"])
def test_two_processes_give_the_curve_of_one(place: Path, engine: str) -> None:
    """The teacher is split as well under FSDP2."""
    launch(place, engine, accelerate(place, engine), ACCELERATE_USE_CPU="1")
    assert (place / engine / "checkpoint-8" / MARKS[engine]).exists()
    assert_same_curve(place, engine)
    if engine == "fsdp2":
        assert_resumes(place, engine, engine)


# peft asks Transformers by a name that is about to go.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_trained_where_weights_are_split(place: Path) -> None:
    """The adapter and the merged model are saved whole, and are those of one process."""
    lora = ("--lora", "r=4", "alpha=16", "merge=true")
    launch(place, "lora", [sys.executable], *lora, batch=4, ACCELERATE_USE_CPU="1")
    launch(place, "lora-fsdp2", accelerate(place, "fsdp2"), *lora, ACCELERATE_USE_CPU="1")
    split = place / "lora-fsdp2"
    assert set(torch.load(split / "checkpoint-8" / MARKS["fsdp2"])) == {
        name for name, parameter in adapted(place, split).named_parameters() if "lora_" in name
    }
    assert_same_curve(place, "lora-fsdp2", "lora")
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (place / "lora", split))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[key], other[key], atol=1e-4) for key in one)
    ids = torch.arange(24).view(1, 24)
    with torch.no_grad():
        merged = LlamaForCausalLM.from_pretrained(split / "model")(ids).logits
        assert torch.allclose(adapted(place, split)(ids).logits, merged, atol=1e-5)
    assert_resumes(place, "fsdp2", "lora-fsdp2", *lora)


def adapted(place: Path, run: Path) -> PeftModel:
    """The student with the adapter that a run saved."""
    return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(place / "student"), run / "adapter")


def assert_resumes(place: Path, engine: str, run: str, *more: str) -> None:
    """What is lost after step 4 comes back bit for bit."""
    whole = load_file(place / run / "model" / "model.safetensors")
    for name in ("model", "checkpoint-8"):
        (place / run / name).rename(place / f"away-{run}-{name}")
    launch(place, run, accelerate(place, engine), "--resume", *more, ACCELERATE_USE_CPU="1")
    resumed = load_file(place / run / "model" / "model.safetensors")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.deepspeed
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_deepspeed_gives_the_curve_of_one(place: Path, engine: str) -> None:
    """With DeepSpeed in a folder of its own (`make zero`), for where it is installed Transformers imports it."""
    path = f"{ROOT}{os.pathsep}{DEEPSPEED}"
    launch(place, engine, accelerate(place, engine), PYTHONPATH=path, DS_ACCELERATOR="cpu")
    assert (place / engine / "checkpoint-8" / MARKS[engine]).exists()
    assert_same_curve(place, engine)


@pytest.mark.parametrize("file", sorted(ENGINES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_is_one_that_accelerate_reads(file: Path) -> None:
    known = load_config_from_file(str(file))
    assert known.num_processes >= 1
    assert file.read_text().startswith("# ")
