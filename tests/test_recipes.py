"""Every recipe as a command, with its smoke settings."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTImageProcessor,
)

from hf_ws.training.tasks import TASKS
from tests.test_tasks import speaker
from tests.test_tasks_media import listener, vit, whisper

ROOT = Path(__file__).parents[1]


def _students(folder: Path) -> dict[str, Path]:
    """A start for every recipe, with its processor."""
    torch.manual_seed(0)
    llama = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    eyes = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.5])
    words = speaker(mask_token="<mask>")
    made = {
        "clm": (LlamaForCausalLM(LlamaConfig(vocab_size=310, **llama)), words),
        "mlm": (BertForMaskedLM(BertConfig(vocab_size=310, **llama)), words),
        "seq2seq": (T5ForConditionalGeneration(T5Config(vocab_size=310, **t5)), words),
        "image_classification": (vit(), eyes),
        "speech": (whisper(), listener()),
    }
    for name, (model, processor) in made.items():
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return {name: folder / name for name in made}


def test_every_recipe_runs_as_a_command_with_its_smoke_settings(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT)}
    smoke = {"image_classification": "smoke-image", "speech": "smoke-speech"}
    students = _students(tmp_path)
    assert students.keys() == TASKS.keys() == {file.stem for file in (ROOT / "recipes").glob("*.py")}

    def run(name: str) -> None:
        output, settings = tmp_path / f"run-{name}", f"{smoke.get(name, 'smoke')}.yaml"
        flags = [
            "--config",
            ROOT / "recipes" / "configs" / settings,
            "--model",
            students[name],
            "--output",
            output,
        ]
        flags += ["--steps", "4", "--eval-every", "2", "--batch-size", "4", "--max-eval-blocks", "8"]
        flags += ["--no-progress"]
        command = [*map(str, [sys.executable, ROOT / "recipes" / f"{name}.py", *flags])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"nats per {'label' if name == 'image_classification' else 'token'}" in done.stdout
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == 4
        assert ("eval_accuracy" in rows[-1]) == (name == "image_classification")
        assert (output / "loss.png").is_file()
        assert (output / "model" / "model.safetensors").is_file()

    with ThreadPoolExecutor(2) as pool:  # most of it is starting Python
        assert len([*pool.map(run, students)]) == 5
