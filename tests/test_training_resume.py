"""Runs that are killed, told to end, or meet a broken checkpoint go on as if nothing had been."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_ws.training.run_folder import last_whole_checkpoint, why_broken
from hf_ws.training.stop import Stopper
from tests.forked_runs import Forked, wait_for_rows

END = "<|endoftext|>"
TEXTS = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" for i in range(200)]
STEPS = 45


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    server = Forked()
    yield server
    server.close()


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """Of a run with dropout and accumulation, in which every epoch ends inside a step."""
    folder = tmp_path_factory.mktemp("resume")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=300, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, max_position_embeddings=32, attention_dropout=0.2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    (folder / "text.py").write_text("".join(TEXTS[:40]))
    (folder / "eval.py").write_text("".join(TEXTS[150:]))
    found = [
        "--model",
        folder / "start",
        "--train-files",
        folder / "text.py",
        "--eval-files",
        folder / "eval.py",
    ]
    found += [
        "--steps",
        STEPS,
        "--block",
        32,
        "--batch-size",
        3,
        "--grad-accum",
        2,
        "--learning-rate",
        "5e-3",
    ]
    found += ["--log-every", 1, "--eval-every", 20, "--max-eval-blocks", 6, "--no-progress"]
    return [str(one) for one in found]


@pytest.fixture(scope="module")
def uninterrupted(forked, flags, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert forked.run(*flags, "--save-every", 1, "--output", run, log=run.with_name("log")) == 0
    return run


def rows(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def test_killed_at_ten_random_points_a_run_ends_as_if_it_never_was(
    forked, flags, uninterrupted, tmp_path
) -> None:
    """At the start, inside a step, while a checkpoint is written: wherever ten kills happen to fall."""
    run, log, dice = tmp_path / "run", tmp_path / "log", random.Random(0)
    command = [*flags, "--save-every", 1, "--output", run, "--resume"]
    for _ in range(10):
        before = len(rows(run)) if (run / "metrics.jsonl").is_file() else 0
        pid = forked.start(*command, log=log)
        wait_for_rows(run, before + dice.randrange(4))
        time.sleep(dice.random() * 0.06)
        os.kill(pid, signal.SIGKILL)
        assert forked.end() == 128 + signal.SIGKILL, log.read_text()
    assert not (run / "model").exists()
    assert forked.run(*command, log=log) == 0, log.read_text()
    assert weights(run) == weights(uninterrupted)
    assert rows(run) == rows(uninterrupted)
    last = torch.load(run / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
    expected = torch.load(uninterrupted / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
    for one, other in zip(last["state"].values(), expected["state"].values(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_told_to_end_a_run_writes_a_checkpoint_and_goes_on_from_it(
    forked, flags, uninterrupted, tmp_path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    pid = forked.start(*flags, "--output", run, log=log)
    wait_for_rows(run, 6)
    os.kill(pid, signal.SIGTERM)
    assert forked.end() == 143, log.read_text()
    checkpoint, skipped = last_whole_checkpoint(run)
    assert checkpoint is not None
    assert not skipped
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 5 <= step < STEPS
    assert f"stopped by SIGTERM at step {step} of {STEPS}; checkpoint-{step} is whole" in log.read_text()
    assert not (run / "model").exists()
    assert forked.run(*flags, "--output", run, "--resume", log=log) == 0, log.read_text()
    assert weights(run) == weights(uninterrupted)
    assert rows(run) == rows(uninterrupted)


def test_the_second_signal_does_what_it_always_did() -> None:
    """Which is to end the process, where nobody said otherwise."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("once more"))
    stopper = Stopper()
    try:
        with stopper.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            assert (stopper.told, heard) == (True, [])
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == ["once more"]
    finally:
        assert signal.signal(signal.SIGTERM, before) not in (before, stopper._catch)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"]
)
def test_a_checkpoint_that_lacks_a_part_is_never_continued(uninterrupted, tmp_path, name) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    for checkpoint in run.glob("checkpoint-*"):
        file = checkpoint / name
        file.write_bytes(file.read_bytes()[:-1])
        assert f"{name} has" in (why_broken(checkpoint) or "")
        file.unlink()
        assert why_broken(checkpoint) == f"{name} is missing"
    assert last_whole_checkpoint(run)[0] is None
