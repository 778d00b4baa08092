"""A start that is made inside the run: the start that `AutoSubclone` makes, recorded, and made but once."""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_ws import AutoSubclone
from hf_ws.errors import CheckpointError, DistillationError, PlanError, ResumeError, SizeError
from hf_ws.plan import Plan
from hf_ws.training import TrainConfig, config_from_flags, load_config_file, recipe, train
from hf_ws.training.blocks import Lora, Subclone
from hf_ws.training.job import prepare

END = "<|endoftext|>"
TEXTS = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" for i in range(120)]
SIZES = {"hidden": 16, "layers": 2, "heads": 2, "ffn": 24}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "big"
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=300, special_tokens=[END], show_progress=False)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, num_key_value_heads=4, max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END).save_pretrained(
        folder
    )
    (folder.parent / "text.py").write_text("".join(TEXTS))
    return folder


def settings(source: Path, **changes) -> TrainConfig:
    asked = {"source": str(source), "calibration": 5, **SIZES}
    given = {"train_files": [str(source.parent / "text.py")], "steps": 3, "block": 16, "batch_size": 2}
    given |= {"eval_every": 0, "progress": False, "kd_weight": 0.0, "subclone": asked}
    return TrainConfig(**{**given, **changes})


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("calibration", [0, 5])
def test_the_start_is_what_autosubclone_makes_of_the_training_blocks(source, calibration) -> None:
    asked = Subclone(source=str(source), calibration=calibration, **SIZES)
    job = prepare(settings(source, subclone=asked))
    rows = [i * len(job.blocks) // 5 for i in range(5)]
    data = torch.stack([job.blocks[i]["input_ids"] for i in rows]) if calibration else None
    expected = AutoSubclone.from_pretrained(source, calibration=data, dtype="float32", **SIZES)
    assert same(job.model.state_dict(), expected.state_dict())
    assert job.plan.maps == expected.hf_ws_plan.maps
    assert all(parameter.dtype == torch.float32 for parameter in job.model.parameters())
    assert job.plan.method == ("rotation" if calibration else "subclone")


@pytest.mark.parametrize("compensation", [None, [], ["mean_bias", "rms"]], ids=["default", "none", "named"])
def test_what_is_lost_is_made_up_for_as_autosubclone_does(source, tmp_path, compensation) -> None:
    """Of a tied source, whose default has an option of its own."""
    tied = tmp_path / "tied"
    shutil.copytree(source, tied)
    config = AutoConfig.from_pretrained(source, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tied)
    asked = {"compensation": compensation, **SIZES}
    job = prepare(settings(source, subclone={"source": str(tied), "calibration": 5, **asked}))
    data = torch.stack([job.blocks[i * len(job.blocks) // 5]["input_ids"] for i in range(5)])
    expected = AutoSubclone.from_pretrained(tied, calibration=data, dtype="float32", **asked)
    assert bool(expected.hf_ws_plan.refits) == (compensation is None)
    assert same(job.model.state_dict(), expected.state_dict())


def test_the_start_may_be_searched_for_by_its_parameters(source) -> None:
    asked = Subclone(source=str(source), calibration=8, ratio=0.5)
    job = prepare(settings(source, subclone=asked))
    rows = [i * len(job.blocks) // 8 for i in range(8)]
    data = torch.stack([job.blocks[i]["input_ids"] for i in rows])
    expected = AutoSubclone.from_pretrained(source, calibration=data, dtype="float32", ratio=0.5)
    assert same(job.model.state_dict(), expected.state_dict())
    assert job.plan.search == expected.hf_ws_plan.search
    assert "score" in job.plan.search["shapes"][0]
    flags = config_from_flags(["--subclone", f"source={source}", "params=10K", "--steps", "1"], "")
    assert flags.subclone is not None
    assert flags.subclone.params == "10K"


def test_one_command_goes_from_the_source_to_a_trained_student(source, tmp_path, monkeypatch, capsys) -> None:
    run = tmp_path / "run"
    file = tmp_path / "run.yaml"
    file.write_text(
        f"subclone:\n  source: {source}\n  hidden: 32\n  layers: 2\n  heads: 2\n  ffn: 24\n  calibration: 5\n"
        f"train_files: {source.parent / 'text.py'}\nsteps: 3\nblock: 16\nbatch_size: 2\neval_every: 3\n"
    )
    flags = [
        "--config",
        str(file),
        "--subclone",
        "hidden=16",
        "seed=3",
        "--output",
        str(run),
        "--no-progress",
    ]
    monkeypatch.setattr(sys, "argv", ["clm.py", *flags])
    assert recipe.run("clm", "about") == 0
    assert "held-out loss" in capsys.readouterr().out
    trained = AutoModelForCausalLM.from_pretrained(run / "model")
    assert (trained.config.hidden_size, trained.config.num_hidden_layers) == (16, 2)
    plan = Plan.load(run / "model" / "hf_ws_plan.json")
    assert plan == Plan.load(run / "hf_ws_plan.json")
    assert (plan.source, plan.seed, plan.is_settled) == ("big", 3, True)
    assert PreTrainedTokenizerFast.from_pretrained(run / "model").eos_token == END
    assert '"kd_loss"' in (run / "metrics.jsonl").read_text()  # its source taught
    told, card = ((run / name).read_text() for name in ("train.md", "model/README.md"))
    assert told.strip() in card
    assert "forward_kl 1.0" in told
    assert "It was trained on since." in card
    assert "Untrained" not in card
    assert str(tmp_path) not in told + card
    assert str(source.parent) not in told + card


def test_the_source_teaches_if_nobody_else_does(source, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_ws"):
        job = prepare(settings(source, kd_weight=0.5))
    assert "the teacher is" in caplog.text
    assert same(job.teacher.state_dict(), AutoModelForCausalLM.from_pretrained(source).state_dict())
    assert prepare(settings(source)).teacher is None
    with pytest.raises(DistillationError, match="teacher cannot be used"):
        prepare(settings(source, kd_weight=0.5, teacher="./nowhere"))


def test_a_resumed_run_makes_the_same_start(source, tmp_path, monkeypatch) -> None:
    config = settings(source, save_every=1, kd_weight=0.5, kd_losses={"hidden_mse": 1.0})
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(replace(config, output=str(whole)))
    monkeypatch.setattr("hf_ws.training.result.save", lambda *_: None)  # ends before anything is left
    train(replace(config, output=str(run)))
    monkeypatch.undo()
    assert not (run / "model").exists()
    (run / "checkpoint-3" / "whole.json").unlink()
    again = replace(config, output=str(run), resume=True)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the source was ranked again")

    monkeypatch.setattr("hf_ws.evidence.observation.calibrate", forbidden)
    train(again)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(one / "model").state_dict() for one in (run, whole))
    assert same(ours, theirs)
    with pytest.raises(ResumeError, match=r"subclone was .*'hidden': 16.*, is .*'hidden': 8"):
        train(replace(again, subclone=replace(again.subclone, hidden=8)))


def test_two_processes_make_one_start(source, tmp_path) -> None:
    """Each calibrates on its share; they choose as one process does, and train as one."""
    root = Path(__file__).parents[1]
    one, two = tmp_path / "one", tmp_path / "two"
    config = settings(source, batch_size=4, kd_weight=0.5, log_every=1, output=str(one))
    train(config)
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += [
        "--config_file",
        str(root / "recipes" / "accelerate" / "cpu2.yaml"),
        str(root / "recipes" / "clm.py"),
    ]
    command += ["--subclone", f"source={source}", "calibration=5", *(f"{k}={v}" for k, v in SIZES.items())]
    command += ["--train-files", *config.train_files, "--steps", "3", "--block", "16", "--batch-size", "2"]
    command += ["--eval-every", "0", "--log-every", "1", "--no-progress", "--output", str(two)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (two / "hf_ws_plan.json").read_bytes() == (one / "hf_ws_plan.json").read_bytes()
    ours, theirs = (
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (two, one)
    )
    assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": 15}, SizeError, "hidden"),
        ({"hiden": 16}, PlanError, r"unknown key 'subclone.hiden'; did you mean 'subclone.hidden'\?"),
        ({"hidden": "16"}, PlanError, r"subclone.hidden='16'; allowed: whole number or nothing"),
        (
            {"calibration": -1, "source": ""},
            PlanError,
            r"source is empty.*subclone.calibration=-1; at least 0",
        ),
        ({"set": {"layers": 3}}, PlanError, r"subclone.set.layers; that is a key of subclone itself"),
        ({"method": "subclones"}, PlanError, "did you mean 'subclone'"),
        ({"compensation": ["least_square"]}, PlanError, "did you mean 'least_squares'"),
        ({"source": "./nowhere"}, CheckpointError, "nowhere is not a folder"),
    ],
)
def test_what_cannot_be_made_is_refused_before_work(source, tmp_path, changes, error, message) -> None:
    run = tmp_path / "run"
    asked = {"source": str(source), **SIZES, **changes}
    with pytest.raises(error, match=message):
        train(settings(source, subclone=asked, output=str(run)))
    assert not run.exists()


def test_a_start_and_a_model_exclude_each_other(source) -> None:
    with pytest.raises(PlanError, match="model='x' and subclone both given"):
        settings(source, model="x")
    with pytest.raises(PlanError, match="subclone has no 'source'"):
        settings(source, subclone={"hidden": 8})
    with pytest.raises(PlanError, match="a live model and subclone= both given"):
        train(settings(source), model=AutoModelForCausalLM.from_pretrained(source))


def test_blocks_in_a_settings_file_are_checked_key_by_key(tmp_path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "steps: 1\nsubclone:\n  source: gpt2\n  method: subclone\n  method_args: {rescale: false}\n"
        "lora: {r: 4, alpha: 8}\n"
    )
    config = TrainConfig(**load_config_file(file))
    assert config.subclone == Subclone(source="gpt2", method="subclone", method_args={"rescale": False})
    assert config.lora == Lora(r=4, alpha=8.0)
    for text, message in (
        (
            "steps: 1\nlora:\n  r: 4\n  targetss: x\n",
            r"line 4: unknown key 'lora.targetss'; did you mean 'lora.targets'",
        ),
        ("lora:\n  r: 4\n  r: 5\n", r"line 3: 'lora.r' is set a second time"),
        ("\nlora: {r: four}\n", r"line 2: lora.r='four'; allowed: whole number"),
        ("lora: 16\n", r"line 1: lora=16; allowed: a mapping with r, alpha, .* or nothing"),
    ):
        file.write_text(text)
        with pytest.raises(PlanError, match=message):
            load_config_file(file)


def test_flags_name_the_keys_of_a_block() -> None:
    flags = ["--steps", "1", "--lora", "r=4", "alpha=1e1", "targets=[q_proj, v_proj]", "merge=true"]
    config = config_from_flags(flags, "about")
    assert config.lora == Lora(r=4, alpha=10.0, targets=["q_proj", "v_proj"], merge=True)
