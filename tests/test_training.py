"""Training: it learns, distils, resumes bit for bit, trusts no damaged checkpoint, stops when it diverges."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_ws.errors import DataError, DistillationError, DivergenceError, OutputError, PlanError, ResumeError
from hf_ws.training import TrainConfig, config_from_flags, load_config_file, train
from hf_ws.training import job as training_job
from hf_ws.training.config import _field_comments
from hf_ws.training.data import pack
from hf_ws.training.run_folder import last_whole_checkpoint, why_broken

ROOT = Path(__file__).parents[1]
END = "<|endoftext|>"
TEXTS = [
    f"def f{i}(x):\n    return x * {i} + {i % 7}\n\n\nclass C{i}(Base):\n    value = {i}\n"
    for i in range(120)
]
BLOCK = 16
SHORT = TrainConfig(steps=6, batch_size=4, learning_rate=5e-3, log_every=1, eval_every=3, progress=False)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=300, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)


@pytest.fixture(scope="module")
def blocks(tokenizer) -> SimpleNamespace:
    return SimpleNamespace(
        train_blocks=pack(TEXTS[:100], tokenizer, BLOCK), eval_blocks=pack(TEXTS[100:], tokenizer, BLOCK)
    )


def student(seed: int = 0, vocab: int = 300, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab, num_key_value_heads=2, max_position_embeddings=64, **sizes, **changes)
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_loss_falls_and_the_record_is_kept(tmp_path, tokenizer, blocks) -> None:
    model = student()
    run = tmp_path / "run"
    history = train(
        replace(SHORT, steps=40, eval_every=20, eval_at=[5], output=str(run)),
        model=model,
        tokenizer=tokenizer,
        **vars(blocks),
    )
    assert [tokens // history.tokens_per_step for tokens, _ in history.evaluations] == [0, 5, 20, 40]
    assert history.final_loss < history.evaluations[0][1] - 1

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == history.rows
    last = rows[-1]
    assert last["eval_perplexity"] == pytest.approx(math.exp(last["eval_loss"]))
    bits = last["eval_loss"] / math.log(2) / blocks.eval_blocks.bytes_per_token
    assert last["eval_bits_per_byte"] == pytest.approx(bits)
    assert {"step", "tokens", "loss", "learning_rate", "seconds"} <= rows[1].keys()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")

    left = ["loss.png", "metrics.jsonl", "model", "run.json", "train.md"]
    assert sorted(path.name for path in run.iterdir()) == left
    told = (run / "train.md").read_text()
    assert f"| held-out loss, nats per token | {rows[0]['eval_loss']:.4g} | {last['eval_loss']:.4g} |" in told
    assert "| seen | 2,560 tokens in 40 steps |" in told
    assert "| teacher | no teacher |" in told
    assert not [path.name for path in history.model_folder.iterdir() if path.suffix == ".bin"]
    assert same(weights(history.model_folder), model.state_dict())
    assert json.loads((history.model_folder / "config.json").read_text())["use_cache"] is True
    assert PreTrainedTokenizerFast.from_pretrained(history.model_folder).get_vocab() == tokenizer.get_vocab()

    ids = training_job.prepare(SHORT, model=model, **vars(blocks)).held_out[:]["input_ids"]
    assert len(ids) == len(blocks.eval_blocks) // 4 * 4
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(history.final_loss, abs=1e-5)


def test_accumulation_equals_one_large_batch(blocks) -> None:
    whole, parts = (
        train(replace(SHORT, batch_size=size, grad_accum=8 // size), model=student(), **vars(blocks))
        for size in (8, 2)
    )
    assert [row.get("loss") for row in parts.rows] == pytest.approx(
        [row.get("loss") for row in whole.rows], abs=1e-4
    )


def test_batches_depend_on_the_seed_alone(blocks) -> None:
    def order(config: TrainConfig) -> list[int]:
        return training_job.prepare(config, model=student(1), **vars(blocks)).order().tolist()

    first = order(SHORT)
    assert order(replace(SHORT, steps=3)) == first[:12]
    assert order(replace(SHORT, batch_size=2, grad_accum=2)) == first
    assert order(replace(SHORT, seed=1)) != first
    long = order(replace(SHORT, steps=200))
    assert sorted(long[: len(blocks.train_blocks)]) == list(range(len(blocks.train_blocks)))


def test_distillation_pulls_towards_the_teacher(blocks) -> None:
    teacher = student(seed=5)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    history = train(replace(SHORT, steps=30, kd_weight=1.0), model=student(), teacher=teacher, **vars(blocks))
    rows = [row for row in history.rows if "kd_loss" in row]
    assert rows[-1]["kd_loss"] < rows[0]["kd_loss"] / 2
    assert rows[0]["loss"] == pytest.approx(rows[0]["kd_loss"], rel=1e-5)
    assert same(before, teacher.state_dict())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_parts_of_the_loss_add_up_under_accumulation(blocks) -> None:
    config = replace(SHORT, kd_weight=0.25, batch_size=2, grad_accum=3, log_every=2)
    for row in train(config, model=student(), teacher=student(3), **vars(blocks)).rows:
        if "loss" in row:
            assert row["loss"] == pytest.approx(0.75 * row["ce_loss"] + 0.25 * row["kd_loss"], rel=1e-5)


def test_without_weight_the_teacher_is_not_even_looked_for(blocks) -> None:
    config = replace(SHORT, steps=1, kd_weight=0.0, teacher="no/such-teacher")
    assert all("kd_loss" not in row for row in train(config, model=student(), **vars(blocks)).rows)


def test_bf16_trains_on_a_cpu_and_leaves_no_trace(blocks) -> None:
    plain = train(SHORT, model=student(), **vars(blocks))
    half = train(replace(SHORT, precision="bf16"), model=student().bfloat16(), **vars(blocks))
    again = train(SHORT, model=student(), **vars(blocks))
    assert half.final_loss == pytest.approx(plain.final_loss, abs=0.05)
    assert again.evaluations == plain.evaluations != half.evaluations


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, tokenizer, blocks) -> Path:
    """A run of 6 steps with a checkpoint at 2, 4 and 6 and dropout, stopped before its model was written."""
    run = tmp_path_factory.mktemp("runs") / "run"
    config = replace(SHORT, output=str(run), save_every=2, keep_checkpoints=3, grad_accum=2)
    train(config, model=student(attention_dropout=0.3), tokenizer=tokenizer, **vars(blocks))
    shutil.move(run / "model", run.with_name("model"))
    return run


def resume(run: Path, blocks, inputs: dict | None = None, **changes) -> None:
    config = replace(SHORT, output=str(run), save_every=2, keep_checkpoints=3, grad_accum=2, resume=True)
    given = {"model": student(attention_dropout=0.3), **vars(blocks), **(inputs or {})}
    return train(replace(config, **changes), **given)


def test_resume_equals_the_uninterrupted_run_bit_for_bit(interrupted, tmp_path, blocks) -> None:
    run = tmp_path / "run"
    shutil.copytree(interrupted, run)
    for step in (4, 6):
        shutil.rmtree(run / f"checkpoint-{step}")
    history = resume(run, blocks)
    assert same(weights(run / "model"), weights(interrupted.with_name("model")))
    without_clock = [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]
    before = [json.loads(line) for line in (interrupted / "metrics.jsonl").read_text().splitlines()]
    assert without_clock == [{k: v for k, v in row.items() if k != "seconds"} for row in before]

    finished = (run / "model" / "model.safetensors").stat().st_mtime_ns
    assert resume(run, blocks).evaluations == history.evaluations  # done already: nothing is trained again
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == finished


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda c: (c / "whole.json").unlink(), "never finished"),
        (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda c: (c / "model.safetensors").write_bytes(b"{}"), "model.safetensors has 2 bytes"),
        (lambda c: _flip(c / "scheduler.pt"), "scheduler.pt has changed"),
        (lambda c: _flip(c / "model.safetensors"), "model.safetensors has changed"),
        (lambda c: [shutil.rmtree(c), c.mkdir()], "never finished"),
    ],
    ids=["manifest", "optimizer", "weights", "schedule", "flipped", "empty"],
)
def test_a_damaged_newest_checkpoint_is_skipped_with_a_word(
    interrupted, tmp_path, caplog, damage, reason
) -> None:
    run = tmp_path / "run"
    shutil.copytree(interrupted, run)
    damage(run / "checkpoint-6")
    with caplog.at_level(logging.WARNING, logger="hf_ws"):
        checkpoint, skipped = last_whole_checkpoint(run)
    assert (checkpoint, skipped) == (run / "checkpoint-4", [run / "checkpoint-6"])
    assert f"checkpoint-6 is skipped: {reason}" in caplog.text.replace("it was ", "")


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def test_training_goes_on_from_the_last_whole_checkpoint(interrupted, tmp_path, blocks) -> None:
    run = tmp_path / "run"
    shutil.copytree(interrupted, run)
    _flip(run / "checkpoint-6" / "optimizer.pt")
    resume(run, blocks)
    assert same(weights(run / "model"), weights(interrupted.with_name("model")))
    assert why_broken(run / "checkpoint-6") is None
    assert (run / "damaged-checkpoint-6").is_dir()


def test_resume_with_other_settings_or_data_is_refused(interrupted, blocks) -> None:
    with pytest.raises(ResumeError, match=r"learning_rate was 0.005, is 0.1"):
        resume(interrupted, blocks, learning_rate=0.1)
    other = SimpleNamespace(train_blocks=blocks.eval_blocks, eval_blocks=None)
    with pytest.raises(ResumeError, match=r"data was .* rows"):
        resume(interrupted, other)


@pytest.mark.parametrize(
    ("changes", "inputs", "message"),
    [
        ({"batch_size": 2, "grad_accum": 4}, {}, "batch_size was 4, is 2; grad_accum was 2, is 4"),
        ({"seed": 1}, {}, "seed was 0, is 1"),
        ({"steps": 7}, {}, "steps was 6, is 7"),
        ({}, {"model": student(seed=5, attention_dropout=0.3)}, r"start was 'LlamaForCausalLM, \w+', is"),
        ({}, {"teacher": student(seed=3)}, "teacher was None, is 'LlamaForCausalLM"),
        ({}, {"task": "mlm"}, "task was 'CausalLM', is 'MaskedLM'"),
    ],
    ids=["batch", "seed", "steps", "start", "teacher", "task"],
)
def test_resume_as_another_run_is_refused(interrupted, blocks, changes, inputs, message) -> None:
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    with pytest.raises(ResumeError, match=message):
        resume(interrupted, blocks, **changes, inputs=inputs)
    assert {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()} == before


def test_resume_with_other_processes_or_another_record_is_refused(interrupted, tmp_path, blocks) -> None:
    run = tmp_path / "run"
    shutil.copytree(interrupted, run)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"processes": 2}))
    with pytest.raises(ResumeError, match="processes was 2, is 1"):
        resume(run, blocks)
    (run / "run.json").write_text(json.dumps(record)[:-9])
    with pytest.raises(ResumeError, match=r"run.json cannot be read .*; start in a new folder"):
        resume(run, blocks)


def test_resume_with_another_tokenizer_is_refused(tmp_path, tokenizer) -> None:
    """Of the same size, beside the same weights: the text has other ids."""
    student().save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    (tmp_path / "text.py").write_text("".join(TEXTS))
    config = replace(
        SHORT, model=str(tmp_path / "start"), output=str(tmp_path / "run"), steps=2, block=BLOCK, resume=True,
        train_files=[str(tmp_path / "text.py")], save_model=False,
    )  # fmt: skip
    train(config)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["other text, " * 99], vocab_size=300, special_tokens=[END], show_progress=False)
    other = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)
    other.save_pretrained(tmp_path / "start")
    with pytest.raises(ResumeError, match=r"data was '\d+ rows, \w+', is"):
        train(config)


def test_a_run_begun_before_a_setting_was_known_goes_on(interrupted, tmp_path, blocks) -> None:
    """It went by the default, so that alone resumes it."""
    run = tmp_path / "run"
    shutil.copytree(interrupted, run)
    known = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({key: known[key] for key in known if key != "weight_decay"}))
    with pytest.raises(ResumeError, match=r"weight_decay was 0.1, is 0.2"):
        resume(run, blocks, weight_decay=0.2)
    resume(run, blocks)
    assert same(weights(run / "model"), weights(interrupted.with_name("model")))


def test_an_output_that_is_not_ours_is_refused_before_work(interrupted, tmp_path, blocks) -> None:
    with pytest.raises(OutputError, match=r"holds a run already; --resume \(resume=True\) continues it"):
        resume(interrupted, blocks, resume=False)
    (tmp_path / "mine").write_text("keep")
    for again in (False, True):
        with pytest.raises(OutputError, match="exists and is not empty"):
            resume(tmp_path, blocks, resume=again)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, blocks) -> None:
    run = tmp_path / "run"
    config = replace(SHORT, output=str(run), steps=50, learning_rate=1e30, save_every=1, max_grad_norm=0.0)
    with pytest.raises(DivergenceError, match=r"(loss|grad_norm) is (nan|inf).*lower learning_rate"):
        train(config, model=student(), **vars(blocks))
    assert not (run / "model").exists()
    assert all(why_broken(one) is None for one in run.glob("checkpoint-*"))
    assert (run / "loss.png").exists()
    assert None in json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]).values()


def test_no_checkpoint_is_written_of_a_loss_that_is_not_finite(tmp_path, blocks) -> None:
    """Though losses are recorded less often than checkpoints are written."""
    run = tmp_path / "run"
    model = student()
    spoilt = iter([False] * 4 + [True] * 99)

    def broken(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan if next(spoilt) else gradient

    model.lm_head.weight.register_hook(broken)
    config = replace(SHORT, output=str(run), steps=20, log_every=50, save_every=2, eval_every=0)
    with pytest.raises(DivergenceError, match="is nan at step 6"):
        train(config, model=model, **vars(blocks))
    found = {path.name for path in run.glob("checkpoint-*")}
    assert found == {"checkpoint-2", "checkpoint-4"}
    assert all(tensor.isfinite().all() for name in found for tensor in weights(run / name).values())


def test_a_live_teacher_is_neither_trained_nor_random(blocks) -> None:
    """Also one that comes in training mode, with dropout."""
    rows = []
    for drop in (0.0, 0.5):
        teacher = student(seed=3, attention_dropout=drop).train()
        before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
        history = train(SHORT, model=student(), teacher=teacher, **vars(blocks))
        rows.append([row["kd_loss"] for row in history.rows if "loss" in row])
        assert same(teacher.state_dict(), before)
        assert not any(parameter.grad is not None for parameter in teacher.parameters())
    assert rows[0] == rows[1]


def test_the_teachers_folder_is_no_place_for_the_student(tmp_path, blocks) -> None:
    student(seed=3).save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OutputError, match="exists and is not empty"):
        train(replace(SHORT, output=str(tmp_path)), model=student(), teacher=str(tmp_path), **vars(blocks))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "inputs", "error", "message"),
    [
        ({"batch_size": 4000}, {}, DataError, "one step takes 4000"),
        ({}, {"model": None}, PlanError, "no model to train"),
        ({}, {"model": student(vocab=50)}, DataError, r"token id \d+, but the model's vocabulary has 50"),
        (
            {},
            {"train_blocks": torch.zeros(9, 65, dtype=torch.long)},
            DataError,
            "has 64 positions; set block=64",
        ),
        ({}, {"train_blocks": torch.zeros(9, dtype=torch.long)}, DataError, r"give \[blocks, tokens\]"),
        (
            {},
            {"train_blocks": torch.zeros(9, 1, dtype=torch.long)},
            DataError,
            "in none a label is predicted",
        ),
        ({}, {"train_blocks": None}, DataError, "text came without a tokenizer"),
        (
            {},
            {"train_blocks": datasets.Dataset.from_dict({"input_ids": []})},
            DataError,
            "dataset without rows",
        ),
        ({}, {"teacher": student(vocab=301)}, DistillationError, "vocabulary has 301 entries"),
        ({"teacher": "./nowhere"}, {}, DistillationError, "teacher cannot be used"),
    ],
)
def test_what_does_not_fit_is_refused_before_work(tmp_path, blocks, changes, inputs, error, message) -> None:
    run = tmp_path / "run"
    with pytest.raises(error, match=message):
        train(replace(SHORT, output=str(run), **changes), **{"model": student(), **vars(blocks), **inputs})
    assert not run.exists()


def test_a_teacher_that_is_the_student_is_refused(blocks) -> None:
    model = student()
    with pytest.raises(DistillationError, match="the student itself"):
        train(SHORT, model=model, teacher=model, **vars(blocks))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "steps=None and tokens=None; give one"),
        ({"steps": 1, "kd_weight": 1.5}, r"kd_weight=1.5; from 0 to 1"),
        ({"steps": 1, "kd_temperature": 0}, r"kd_temperature=0.0; above 0"),
        ({"steps": 1, "kd_temperature": -1.0}, r"kd_temperature=-1.0; above 0"),
        ({"steps": 1, "kd_temperature": math.nan}, r"kd_temperature=nan; above 0"),
        ({"steps": 1, "kd_weight": math.nan}, r"kd_weight=nan; from 0 to 1"),
        ({"steps": 0, "batch_size": -1}, r"steps=0; at least 1; and batch_size=-1; at least 1"),
        ({"steps": 1, "learning_rate": "1e-4"}, r"learning_rate='1e-4'; allowed: number"),
        ({"steps": 1, "schedule": "linear"}, r"allowed: cosine, constant"),
        ({"steps": 1, "train_files": ["a"], "dataset": "b"}, "give one of the t(wo|hree)"),
    ],
)
def test_bad_settings_are_listed(settings: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        TrainConfig(**settings)


def test_yaml_numbers_are_numbers(tmp_path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "learning_rate: 1e-4\nweight_decay: 1E-2\nkd_weight: .5e-1\nsteps: 1_000\ntrain_files: stdlib\n"
    )
    expected = {
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "kd_weight": 0.05,
        "steps": 1000,
        "train_files": ["stdlib"],
    }
    assert load_config_file(file) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "steps: 1\nlerning_rate: 1e-4\n",
            r"line 2: unknown key 'lerning_rate'; did you mean 'learning_rate'\?",
        ),
        ("steps: 1\n\nsteps: 2\n", r"line 3: 'steps' is set a second time"),
        ("resume: 3\n", r"line 1: resume=3; allowed: true or false"),
        ("- steps\n", "`key: value` lines"),
        ("steps: [1\n", "is not YAML"),
    ],
)
def test_bad_settings_files_name_the_line(tmp_path, text: str, message: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(PlanError, match=message):
        load_config_file(file)


def test_flags_win_over_the_file_and_the_file_over_the_default(tmp_path, capsys) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("steps: 5\nlearning_rate: 1e-4\nbatch_size: 2\n")
    flags = ["--config", str(file), "--learning_rate", "2e-4", "--batch-size", "3", "--train-files", "a", "b"]
    config = config_from_flags([*flags, "--resume", "--no-progress"], "about")
    assert config == TrainConfig(
        steps=5, learning_rate=2e-4, batch_size=3, train_files=["a", "b"], resume=True, progress=False
    )
    with pytest.raises(SystemExit):
        config_from_flags(["--help"], "about")
    assert "decay of the first moment (default: 0.9)" in " ".join(capsys.readouterr().out.split())
    assert all(_field_comments()[one.name] for one in fields(TrainConfig))


@pytest.mark.parametrize(
    "file", sorted((ROOT / "recipes" / "configs").glob("*.yaml")), ids=lambda file: file.name
)
def test_the_recipes_settings_are_valid(file: Path) -> None:
    TrainConfig(**load_config_file(file))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, tokenizer) -> tuple[Path, list[str]]:
    """The recipe's flags but for the batch, and its run in one process."""
    folder = tmp_path_factory.mktemp("recipe")
    student().save_pretrained(folder / "start")
    student(4).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "teacher")
    (folder / "text.py").write_text("".join(TEXTS))
    settings = {
        "train_files": f"[{folder / 'text.py'}]",
        "model": folder / "start",
        "teacher": folder / "teacher",
    }
    settings |= {"steps": 5, "block": 16, "learning_rate": "5e-3", "log_every": 1, "eval_every": 5}
    settings |= {"max_eval_blocks": 7, "save_every": 3}
    (folder / "run.yaml").write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    flags = ["--config", str(folder / "run.yaml"), "--no-progress"]
    _launch(
        [sys.executable], [*flags, "--batch-size", "4", "--grad-accum", "2", "--output", str(folder / "one")]
    )
    return folder, flags


def _launch(launcher: list[str], flags: list[str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(ROOT / "recipes" / "clm.py"), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_recipe_runs_from_a_settings_file_and_flags(one_process) -> None:
    folder, _ = one_process
    assert {path.name for path in (folder / "one").iterdir()} >= {
        "metrics.jsonl",
        "loss.png",
        "model",
        "checkpoint-5",
    }
    assert AutoModelForCausalLM.from_pretrained(folder / "one" / "model").config.hidden_size == 32


def test_two_processes_agree_with_one(one_process) -> None:
    folder, flags = one_process
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(ROOT / "recipes" / "accelerate" / "cpu2.yaml")]
    _launch(launcher, [*flags, "--batch-size", "2", "--grad-accum", "2", "--output", str(folder / "two")])
    one, two = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for a, b in zip(one, two, strict=True):
        for key in a.keys() & {"loss", "ce_loss", "kd_loss", "eval_loss", "tokens"}:
            assert b[key] == pytest.approx(a[key], abs=1e-3), (a, b)
    assert all(why_broken(one) is None for one in (folder / "two").glob("checkpoint-*"))
