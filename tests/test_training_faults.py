"""What goes wrong while a run goes on: a full disk, a gradient that is no number, a dying process, a tracker away."""

import contextlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.integrations import integration_utils

from hf_ws.errors import DataError, DistillationError, DivergenceError, HfWsError, PlanError, ResumeError
from hf_ws.training import TrainConfig, run_folder, train
from hf_ws.training.data import pack
from hf_ws.training.guard import SCALED, Guard
from hf_ws.training.run_folder import last_whole_checkpoint
from hf_ws.training.trackers import trackers
from tests.forked_runs import wait_for_rows

ROOT = Path(__file__).parents[1]
END = "<|endoftext|>"
TEXTS = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" for i in range(150)]
SHORT = TrainConfig(
    steps=6, batch_size=4, learning_rate=5e-3, log_every=1, eval_every=0, schedule="constant", warmup_steps=0,
    progress=False,
)  # fmt: skip


def speaking(count: int, more: int = 0) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=count, special_tokens=[END], show_progress=False)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)
    made.add_tokens([f"<more {i}>" for i in range(more)])
    return made


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return speaking(300)


@pytest.fixture(scope="module")
def blocks(tokenizer) -> SimpleNamespace:
    return SimpleNamespace(train_blocks=pack(TEXTS, tokenizer, 16))


def student(vocab: int = 300, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=64, **sizes))


@pytest.mark.parametrize(
    "limit", [200, 2_000, 50_000, 250_000], ids=["metrics", "card", "weights", "optimizer"]
)
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoints_before(tmp_path, blocks, limit: int) -> None:
    """Files of over `limit` bytes cannot be written from the third checkpoint on, in a process of its own."""
    run, said = tmp_path / "run", tmp_path / "said"
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            done, mark_whole = [], run_folder.mark_whole

            def then_full(checkpoint: Path) -> None:
                mark_whole(checkpoint)
                done.append(checkpoint)
                if len(done) == 2:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

            run_folder.mark_whole = then_full
            try:
                train(replace(SHORT, output=str(run), save_every=1), model=student(), **vars(blocks))
            except HfWsError as error:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                said.write_text(f"{type(error).__name__}: {error}")
        os._exit(0)
    os.waitpid(pid, 0)
    assert said.is_file()
    what = "metrics.jsonl" if limit < 1_000 else "checkpoint-3"
    assert re.match(rf"OutputError: .*{what}.* could not be written: .*--resume", said.read_text())
    checkpoint, skipped = last_whole_checkpoint(run)
    assert checkpoint.name == "checkpoint-2"
    assert [one.name for one in skipped] == ["checkpoint-3"] * (limit >= 1_000)
    resumed = train(
        replace(SHORT, output=str(run), save_every=1, resume=True), model=student(), **vars(blocks)
    )
    whole = student()
    train(SHORT, model=whole, **vars(blocks))
    saved = LlamaForCausalLM.from_pretrained(resumed.model_folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in whole.state_dict().items())


class TestGuard:
    @staticmethod
    def broken(model: LlamaForCausalLM, steps: set[int], value: float) -> LlamaForCausalLM:
        """The model, with one number of its gradient put to `value` at these steps."""
        count = [0]

        def spoilt(gradient: torch.Tensor) -> torch.Tensor:
            count[0] += 1
            if count[0] in steps:
                gradient = gradient.clone()
                gradient[0, 0] = value
            return gradient

        model.model.layers[0].mlp.up_proj.weight.register_hook(spoilt)
        return model

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_step_left_out_changes_no_weight_and_no_moment(self, tmp_path, blocks, value) -> None:
        run = tmp_path / "run"
        model = self.broken(student(), {3, 4}, value)
        config = replace(SHORT, output=str(run), nonfinite_steps=2, steps=4, save_every=1, keep_checkpoints=4)
        history = train(config, model=model, **vars(blocks))
        moments = [
            torch.load(run / f"checkpoint-{n}" / "optimizer.pt", weights_only=True)["state"] for n in (2, 4)
        ]
        for one, other in zip(*(state.values() for state in moments), strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
        weights = [
            LlamaForCausalLM.from_pretrained(run / f"checkpoint-{n}", dtype=torch.float32).state_dict()
            for n in (2, 4)
        ]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        assert [row.get("left_out") for row in history.rows] == [None, None, 1, 1]

    @pytest.mark.parametrize("log_every", [1, 2])
    def test_the_figures_after_a_loss_that_is_no_number_are_as_without_it(self, blocks, log_every) -> None:
        """It is in those of its own row, and in no later one."""

        def losses(model: LlamaForCausalLM, nth: int) -> dict[int, float]:
            config = replace(SHORT, nonfinite_steps=1, log_every=log_every, learning_rate=1e-30)
            seen = [0]

            def spoilt(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
                seen[0] += module.training
                return output * float("nan") if seen[0] == nth else None

            model.model.norm.register_forward_hook(spoilt)
            return {row["step"]: row["loss"] for row in train(config, model=model, **vars(blocks)).rows}

        whole, spoilt = losses(student(), 0), losses(student(), 3)
        its_row = -(-3 // log_every) * log_every
        assert not math.isfinite(spoilt.pop(its_row))
        del whole[its_row]
        assert len(whole) >= 2
        assert spoilt == whole

    def test_too_many_in_a_row_end_the_run(self, tmp_path, blocks) -> None:
        run = tmp_path / "run"
        config = replace(SHORT, output=str(run), nonfinite_steps=2, steps=9, save_every=1)
        model = self.broken(student(), {2, 4, 5, 6}, float("nan"))
        message = (
            "3 steps in a row had gradients that are not finite, the last at step 6, and 2 are allowed; lower"
        )
        with pytest.raises(DivergenceError, match=message):
            train(config, model=model, **vars(blocks))
        assert last_whole_checkpoint(run)[0].name == "checkpoint-5"
        assert all(value.isfinite().all() for value in model.state_dict().values())

    def test_without_leave_the_first_one_ends_it(self, blocks) -> None:
        with pytest.raises(DivergenceError, match="grad_norm is nan at step 2"):
            train(SHORT, model=self.broken(student(), {2}, float("nan")), **vars(blocks))

    def test_the_steps_that_a_loss_scaler_leaves_out_are_counted(self) -> None:
        """As under fp16, which wants a GPU."""
        guard, arguments = Guard(0), SimpleNamespace(fp16=True, learning_rate=1.0)
        guard.accelerator = SimpleNamespace(optimizer_step_was_skipped=True)
        at = SimpleNamespace(global_step=0)
        for _ in range(SCALED):
            guard.on_optimizer_step(arguments, at, None)
        guard.accelerator.optimizer_step_was_skipped = False
        guard.on_optimizer_step(arguments, at, None)
        assert guard.told() == SCALED
        guard.accelerator.optimizer_step_was_skipped = True
        for _ in range(SCALED):
            guard.on_optimizer_step(arguments, at, None)
        with pytest.raises(DivergenceError, match=f"{SCALED + 1} steps in a row"):
            guard.on_optimizer_step(arguments, at, None)


class TestTrackers:
    """Of which none is installed here: a stand-in takes the name of one."""

    class Flaky(TrainerCallback):
        heard: tuple[str, ...] = ()

        def on_train_begin(self, *_, **__) -> None:
            type(self).heard += ("begin",)

        def on_log(self, *_, **__) -> None:
            type(self).heard += ("log",)
            raise ConnectionError("no route to host")

    def test_one_that_fails_is_left_out_and_training_goes_on(
        self, tmp_path, blocks, monkeypatch, caplog
    ) -> None:
        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", self.Flaky)
        config = replace(SHORT, output=str(tmp_path / "run"), report_to=["wandb"])
        history = train(config, model=student(), **vars(blocks))
        assert [row["step"] for row in history.rows] == [1, 2, 3, 4, 5, 6]
        assert self.Flaky.heard == ("begin", "log")
        assert caplog.text.count("wandb is left out from here on (ConnectionError: no route to host)") == 1

    def test_one_that_is_not_installed_is_left_out(self, monkeypatch, caplog) -> None:
        def missing() -> None:
            raise RuntimeError("needs wandb; run pip install wandb")

        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", missing)
        assert trackers(["wandb"]) == []
        assert (
            "wandb is left out from here on (RuntimeError: needs wandb; run pip install wandb)" in caplog.text
        )

    def test_all_are_those_installed(self, monkeypatch) -> None:
        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", self.Flaky)
        monkeypatch.setattr("hf_ws.training.trackers.get_available_reporting_integrations", lambda: ["wandb"])
        assert [one.name for one in trackers(["all", "wandb"])] == ["wandb"]

    def test_an_unknown_one_is_refused(self, blocks) -> None:
        with pytest.raises(PlanError, match=r"report_to has 'wandbb'; allowed: .*trackio"):
            train(replace(SHORT, report_to=["wandbb"]), model=student(), **vars(blocks))


class Planted:
    """What runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_code_in_it_is_refused(tmp_path, blocks, name: str) -> None:
    """Though its manifest says that all is as it was written."""
    run = tmp_path / "run"
    config = replace(SHORT, output=str(run), save_every=1, resume=True)
    train(config, model=student(), **vars(blocks))
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoint-6")
    torch.save({"state": Planted(f"touch {tmp_path / 'planted'}")}, run / "checkpoint-5" / name)
    run_folder.mark_whole(run / "checkpoint-5")
    with pytest.raises(ResumeError, match=r"checkpoint-5 holds more than numbers, and is not opened"):
        train(config, model=student(), **vars(blocks))
    assert not (tmp_path / "planted").exists()


def test_settings_that_the_trainer_pickled_are_never_opened(tmp_path, blocks) -> None:
    run = tmp_path / "run"
    config = replace(SHORT, output=str(run), save_every=1, resume=True)
    train(config, model=student(), **vars(blocks))
    shutil.rmtree(run / "model")
    torch.save(Planted(f"touch {tmp_path / 'planted'}"), run / "checkpoint-6" / "training_args.bin")
    run_folder.mark_whole(run / "checkpoint-6")
    train(config, model=student(), **vars(blocks))
    assert (run / "model").is_dir()
    assert not (tmp_path / "planted").exists()


def test_a_finished_run_is_not_run_again(tmp_path, blocks, caplog) -> None:
    run = tmp_path / "run"
    config = replace(SHORT, output=str(run), resume=True)
    first = train(config, model=student(), **vars(blocks))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    model = student(seed=1)
    with pytest.raises(ResumeError, match="start was"):
        train(config, model=model, **vars(blocks))
    model = student()
    again = train(config, model=model, **vars(blocks))
    assert "is finished; nothing to do" in caplog.text
    assert again.rows == first.rows
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    saved = LlamaForCausalLM.from_pretrained(run / "model", dtype=torch.float32).state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())


def test_memory_that_runs_out_is_said_to_have_run_out_where(blocks, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("hf_ws.training.trainer.Trainer.evaluate", full)
    config = replace(SHORT, eval_every=2)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as met:
        train(config, model=student(), **vars(blocks), eval_blocks=blocks.train_blocks)
    assert met.value.__notes__[0].startswith(
        "memory ran out at step 0 while evaluating; checkpoints written before"
    )


class TestVocabularies:
    """A teacher whose table or tokenizer is longer or shorter than the student's."""

    @staticmethod
    def saved(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    def padded(self, by: int) -> LlamaForCausalLM:
        """The student with rows of zeros after its vocabulary, which the padding of its table never says."""
        made, whole = student(300 + by), student()
        for name, value in whole.state_dict().items():
            own = made.state_dict()[name]
            own[: len(value)] = value
            own[len(value) :] = 0.0
        return made

    @pytest.mark.parametrize("longer", ["teacher", "student"])
    def test_a_padded_table_is_no_other_vocabulary(self, tmp_path, tokenizer, caplog, longer) -> None:
        """At the first step the padded copy says what the other one says, so there is nothing to learn from it."""
        (tmp_path / "text.py").write_text("".join(TEXTS))
        models = {"student": student(), "teacher": student()} | {longer: self.padded(20)}
        folders = {name: self.saved(tmp_path / name, model, tokenizer) for name, model in models.items()}
        config = replace(
            SHORT, model=folders["student"], teacher=folders["teacher"], train_files=[str(tmp_path / "text.py")],
            block=16, kd_weight=1.0, steps=2,
        )  # fmt: skip
        rows = train(config).rows
        assert abs(rows[0]["kd_loss"]) < 1e-6
        assert f"for the same {len(tokenizer)} tokens: 300 are compared" in caplog.text

    def test_the_beginning_of_the_others_vocabulary_is_shared(self, tmp_path, tokenizer, caplog) -> None:
        (tmp_path / "text.py").write_text("".join(TEXTS))
        ours = self.saved(tmp_path / "ours", student(), tokenizer)
        theirs = self.saved(tmp_path / "theirs", student(308, seed=1), speaking(300, more=8))
        config, shared = (
            replace(SHORT, train_files=[str(tmp_path / "text.py")], block=16, steps=1),
            len(tokenizer),
        )
        train(replace(config, model=ours, teacher=theirs))
        assert f"agree on the first {len(tokenizer)} ids, and the teacher's has 8 tokens more" in caplog.text
        train(replace(config, model=theirs, teacher=ours))
        assert "the student's has 8 tokens more" in caplog.text
        (tmp_path / "text.py").write_text("<more 3>" + "".join(TEXTS))
        with pytest.raises(
            DataError,
            match=f"holds token id {shared + 3}, but the vocabulary that the teacher shares has {shared}",
        ):
            train(replace(config, model=theirs, teacher=ours))

    def test_other_tokens_are_refused_whatever_the_lengths(self, tmp_path, tokenizer) -> None:
        ours = self.saved(tmp_path / "ours", student(), tokenizer)
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(
            ["zebra quagga okapi " * 9], vocab_size=270, special_tokens=[END], show_progress=False
        )
        other = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END)
        theirs = self.saved(tmp_path / "theirs", student(310), other)
        config = replace(SHORT, model=ours, teacher=theirs, train_files=["stdlib"])
        with pytest.raises(
            DistillationError, match=r"the teacher's tokenizer gives other ids to \d+ tokens, such as"
        ):
            train(config)
        live = student(310)
        with pytest.raises(
            DistillationError, match="vocabulary has 310 entries, the student's 300; they must agree"
        ):
            train(replace(config, teacher=None), teacher=live)


def test_blocks_of_another_tokenizer_are_refused(tokenizer, blocks) -> None:
    """Ids that the model has, and that mean something else to it."""
    train(replace(SHORT, steps=1), model=student(), tokenizer=tokenizer, **vars(blocks))
    with pytest.raises(DataError, match="packed with a tokenizer that gives other ids than the model's"):
        train(SHORT, model=student(), tokenizer=speaking(270), **vars(blocks))


def test_a_process_that_dies_takes_the_others_with_it(tmp_path, tokenizer) -> None:
    """And leaves a whole checkpoint, from which the run goes on."""
    student().save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    (tmp_path / "text.py").write_text("".join(TEXTS))
    run = tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += [
        "--config_file",
        str(ROOT / "recipes" / "accelerate" / "cpu2.yaml"),
        str(ROOT / "recipes" / "clm.py"),
    ]
    flags = {"model": tmp_path / "start", "train-files": tmp_path / "text.py", "output": run, "steps": 4000}
    flags |= {"block": 16, "batch-size": 2, "log-every": 1, "eval-every": 0, "save-every": 3}
    command += [
        "--no-progress",
        *(str(part) for name, value in flags.items() for part in (f"--{name}", value)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for_rows(run, 5, seconds=180)
        os.kill(_rank(launcher.pid, 1), signal.SIGKILL)
        began = time.monotonic()
        assert launcher.wait(120) != 0, (tmp_path / "log").read_text()
        assert time.monotonic() - began < 60
    finally:
        launcher.kill()
    checkpoint, _ = last_whole_checkpoint(run)
    assert checkpoint is not None
    assert not (run / "model").exists()
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] >= 3


_SPOILT = """
import sys
import time
from pathlib import Path
import torch
from accelerate import PartialState
from transformers import LlamaForCausalLM
from hf_ws.errors import DivergenceError
from hf_ws.training import TrainConfig, train

folder, left_out = sys.argv[1], int(sys.argv[2])
model, seen = LlamaForCausalLM.from_pretrained(f"{folder}/start"), [0]

def spoilt(module, inputs, output):
    seen[0] += model.training
    return output * float("nan") if seen[0] == 4 and PartialState().process_index == 1 else output

model.model.norm.register_forward_hook(spoilt)
rows = torch.arange(16).repeat(64, 1)
config = TrainConfig(
    steps=6, batch_size=2, log_every=1, save_every=1, eval_every=0, output=f"{folder}/run-{left_out}", progress=False,
    nonfinite_steps=left_out, save_model=False,
)
try:
    train(config, model=model, train_blocks=rows)
except DivergenceError as error:
    said = [Path(folder, f"said-{rank}") for rank in (0, 1)]
    said[PartialState().process_index].write_text(str(error))
    for _ in range(300):  # the launcher ends the other one when one has gone
        if all(one.exists() for one in said):
            sys.exit(7)
        time.sleep(0.1)
"""


@pytest.mark.parametrize("left_out", [0, 1])
def test_what_one_process_meets_stops_or_is_left_out_by_all(tmp_path, left_out: int) -> None:
    student().save_pretrained(tmp_path / "start")
    (tmp_path / "spoilt.py").write_text(_SPOILT)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "recipes" / "accelerate" / "cpu2.yaml"), str(tmp_path / "spoilt.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(tmp_path), str(left_out)], env=environment, capture_output=True, text=True, timeout=120
    )
    run = tmp_path / f"run-{left_out}"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = last_whole_checkpoint(run)[0]
    if left_out:
        assert done.returncode == 0, done.stdout + done.stderr
        assert [row.get("left_out") for row in rows] == [None, None, None, 1, None, None]
        assert last.name == "checkpoint-6"
    else:
        assert done.returncode != 0
        for rank in (0, 1):
            said = tmp_path / f"said-{rank}"
            assert said.exists(), done.stdout + done.stderr
            assert "loss is nan and grad_norm is nan at step 4" in said.read_text()
        assert last.name == "checkpoint-3"
    model = LlamaForCausalLM.from_pretrained(last)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def _rank(launcher: int, wanted: int) -> int:
    """The process of a launcher's that has this rank."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                variables = (folder / "environ").read_bytes().split(b"\0")
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent == launcher and f"RANK={wanted}".encode() in variables:
                    return int(folder.name)
    raise LookupError(f"no process of rank {wanted}")
