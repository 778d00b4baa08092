"""Training from a cache is training from the teacher; a cache that does not fit is refused."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_ws.cli import main
from hf_ws.distill import Favourites
from hf_ws.errors import DistillationError, OutputError, PlanError, ResumeError
from hf_ws.training import TrainConfig, cache_teacher, caching, load_config_file, train
from hf_ws.training.teacher_cache import MANIFEST, Contents, TeacherCache

ROOT = Path(__file__).parents[1]
VOCAB, BLOCK = 61, 12
SHORT = TrainConfig(
    steps=6, batch_size=4, learning_rate=5e-3, kd_weight=0.7, kd_temperature=1.5, log_every=1, progress=False
)
BLOCKS = torch.randint(0, VOCAB, (30, BLOCK), generator=torch.Generator().manual_seed(0))


def model(seed: int, vocab: int = VOCAB) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=32, **sizes))
    with torch.no_grad():  # far from uniform, so that which tokens are likeliest is no matter of rounding
        made.lm_head.weight *= 20
    return made


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    return model(5).eval()


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "cache"
    cache_teacher(SHORT, folder, k=8, model=model(0), teacher=teacher, train_blocks=BLOCKS)
    return folder


def run(config: TrainConfig, **given) -> tuple[list[dict], dict[str, torch.Tensor]]:
    student = model(0)
    history = train(config, model=student, train_blocks=BLOCKS, **given)
    return history.rows, student.state_dict()


@pytest.mark.parametrize(
    "losses", [{"forward_kl": 1.0}, {"reverse_kl": 0.5, "total_variation": 2.0}], ids=str
)
def test_a_cache_of_the_whole_vocabulary_is_the_live_teacher(tmp_path, teacher, losses) -> None:
    config = replace(SHORT, kd_losses=losses)
    cache_teacher(
        config,
        tmp_path / "cache",
        k=VOCAB,
        dtype="float32",
        model=model(0),
        teacher=teacher,
        train_blocks=BLOCKS,
    )
    rows, weights = run(replace(config, teacher_cache=str(tmp_path / "cache")))
    live, expected = run(config, teacher=teacher)
    assert len(rows) == len(live) == 6
    for row, other in zip(rows, live, strict=True):
        for name in ("loss", "ce_loss", "kd_loss", "grad_norm"):
            assert row[name] == pytest.approx(other[name], rel=1e-5), name
    assert all(torch.allclose(weights[name], expected[name], atol=1e-5) for name in expected)


def test_a_small_cache_is_the_live_teachers_likeliest_tokens(cache, teacher) -> None:
    rows, _ = run(replace(SHORT, teacher_cache=str(cache)))
    live, _ = run(replace(SHORT, kd_top_k=8), teacher=teacher)
    whole, _ = run(SHORT, teacher=teacher)
    for row, other in zip(rows, live, strict=True):
        assert row["kd_loss"] == pytest.approx(other["kd_loss"], rel=2e-3)
        assert row["loss"] == pytest.approx(other["loss"], rel=2e-3)
    assert rows[-1]["kd_loss"] < 0.9 * rows[0]["kd_loss"]
    assert whole[0]["kd_loss"] > 1.02 * live[0]["kd_loss"]  # or the test could not tell the two apart
    fewer, _ = run(replace(SHORT, teacher_cache=str(cache), kd_top_k=3))
    three, _ = run(replace(SHORT, kd_top_k=3), teacher=teacher)
    assert fewer[0]["kd_loss"] == pytest.approx(three[0]["kd_loss"], rel=2e-3)


def test_it_holds_what_the_teacher_says_of_the_next_token(cache, teacher) -> None:
    opened = TeacherCache(cache)
    assert len(opened) == 24
    number = max(n for n in range(len(BLOCKS)) if n in opened)
    found = opened[number]
    with torch.no_grad():
        log_p = (teacher(BLOCKS[number][None]).logits[0].double() / 1.5).log_softmax(-1)
    for t in range(BLOCK):
        best = log_p[t].sort(descending=True)
        assert found["teacher_ids"][t].tolist() == best.indices[:8].tolist()
        assert torch.allclose(found["teacher_log_probs"][t].double(), best.values[:8], rtol=1e-3, atol=1e-4)
        assert found["teacher_rest"][t].item() == pytest.approx(best.values[8:].logsumexp(0).item(), rel=1e-3)


def test_its_size_is_what_it_says(cache) -> None:
    contents = TeacherCache(cache).contents
    assert contents.bytes_per_token == 8 * (1 + 2) + 2
    size = sum(file.stat().st_size for file in cache.glob("*.safetensors"))
    assert 0 <= size - 24 * (BLOCK * contents.bytes_per_token + 8) < 1000
    assert sorted(file.name for file in cache.parent.iterdir()) == ["cache"]


@pytest.mark.parametrize(
    ("vocabulary", "width"), [(2, 1), (256, 1), (257, 2), (65536, 2), (65537, 3), (2**24 + 1, 4)]
)
def test_ids_come_back_from_as_few_bytes_as_they_need(vocabulary: int, width: int) -> None:
    contents = Contents(
        teacher="t", tokenizer=None, data="d", block=5, temperature=1.0, vocabulary=vocabulary, k=2
    )
    ids = torch.randint(0, vocabulary, (15, 2), generator=torch.Generator().manual_seed(0))
    ids[0, 0], ids[1, 1] = vocabulary - 1, 0
    packed = contents.pack([4, 7, 9], Favourites(ids, torch.zeros(15, 2), torch.zeros(15)))
    assert packed["ids"].shape == (3, 5, 2, width)
    assert torch.equal(contents.unpack_ids(packed["ids"]).view(15, 2), ids)


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"kd_temperature": 2.0}, {}, r"made at kd_temperature=1\.5, and the run's is 2"),
        ({"kd_losses": {"logit_mse": 1.0}}, {}, "logit_mse in kd_losses: it holds likeliest tokens"),
        ({"kd_losses": {"hidden_mse": 1.0}}, {}, "hidden_mse in kd_losses: .*nor inner states"),
        ({"kd_top_k": 9}, {}, "holds 8 tokens, and kd_top_k=9"),
        ({}, {"teacher": model(5)}, "a teacher and teacher_cache=.* both given; drop one"),
        ({"teacher": "teacher"}, {}, "a teacher and teacher_cache=.* both given; drop one"),
        ({}, {"train_blocks": BLOCKS[:, :-1]}, "made for block=12, and the run's is 11"),
        ({}, {"train_blocks": BLOCKS.flip(0)}, r"made of other data \(30 blocks, input_ids, "),
        ({}, {"train_blocks": BLOCKS[:-1]}, "made of other data"),
        ({"steps": 7}, {}, "4 of the 28 blocks that this run takes are not in it"),
        ({"seed": 1}, {}, r"of the 24 blocks that this run takes are not in it"),
        ({}, {"model": model(0, 62)}, "made for a vocabulary of 61, and the student's has 62"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(cache, tmp_path, changes, given, message) -> None:
    config = replace(SHORT, teacher_cache=str(cache), output=str(tmp_path / "run"), **changes)
    with pytest.raises(DistillationError, match=message):
        train(config, **{"model": model(0), "train_blocks": BLOCKS} | given)
    assert not (tmp_path / "run").exists()


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])


def _forget(file: Path) -> None:
    found = json.loads(file.read_text())
    del found["vocabulary"]
    file.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: shutil.rmtree(c), "holds no cache.json, so it is no finished cache"),
        (lambda c: (c / MANIFEST).unlink(), "holds no cache.json, so it is no finished cache"),
        (lambda c: _cut(c / MANIFEST), "cache.json cannot be read"),
        (lambda c: (c / MANIFEST).write_text("[]"), "cache.json cannot be read"),
        (lambda c: _forget(c / MANIFEST), "cache.json cannot be read .*vocabulary"),
        (lambda c: (c / "shard-00000.safetensors").unlink(), "shard-00000.safetensors is missing"),
        (lambda c: _cut(c / "shard-00000.safetensors"), r"shard-00000.safetensors has \d+ bytes, not \d+"),
        (lambda c: _zero(c / "shard-00000.safetensors", 0), "shard-00000.safetensors: .*eader"),
        (lambda c: _zero(c / "shard-00000.safetensors", -3000), r"is damaged at block \d+"),
    ],
    ids=["no folder", "no manifest", "cut manifest", "no object", "no key", "no shard", "cut", "header", "bytes"],
)  # fmt: skip
def test_a_cache_that_is_not_whole_is_refused(cache, tmp_path, damage, message) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    damage(copy)
    with pytest.raises(DistillationError, match=message):
        train(replace(SHORT, teacher_cache=str(copy)), model=model(0), train_blocks=BLOCKS)


def _zero(file: Path, at: int) -> None:
    """Overwrite some bytes, the size staying as it was."""
    content = bytearray(file.read_bytes())
    at %= len(content)
    content[at : at + 64] = b"\xff" * len(content[at : at + 64])
    file.write_bytes(bytes(content))


def test_interrupted_work_goes_on_where_it_stopped(tmp_path, teacher, monkeypatch, caplog) -> None:
    monkeypatch.setattr(caching, "SHARD", 8 * BLOCK * 26)  # 8 blocks to a shard
    asked: list[int] = []
    forward = LlamaForCausalLM.forward

    def counting(self, *args, **kwargs):
        asked.append(len(kwargs["input_ids"]))
        if sum(asked) == stop:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    make = {"k": 8, "model": model(0), "teacher": teacher, "train_blocks": BLOCKS}
    expected = cache_teacher(SHORT, tmp_path / "whole", **make)
    assert len(expected.shards) == 3
    monkeypatch.setattr(LlamaForCausalLM, "forward", counting)
    stop = 2 + 16 + 4  # in the last shard; the first 2 show how the head is made
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(SHORT, tmp_path / "cache", **make)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(DistillationError, match="no finished cache"):
        TeacherCache(tmp_path / ".cache.partial")
    stop, asked[:] = -1, []
    cache_teacher(SHORT, tmp_path / "cache", **make)
    assert sum(asked) == 8 + 2
    assert "2 of 3 shards are there already" in caplog.text
    for name in (*expected.shards, MANIFEST):
        assert (tmp_path / "cache" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "whole"]


def test_what_another_attempt_left_is_not_taken(tmp_path, teacher, monkeypatch) -> None:
    left = tmp_path / ".cache.partial"
    left.mkdir()
    (left / "made_of.json").write_text("{}")
    (left / "shard-00000.safetensors").write_bytes(b"something else")
    made = cache_teacher(SHORT, tmp_path / "cache", k=2, model=model(0), teacher=teacher, train_blocks=BLOCKS)
    assert made[0 if 0 in made else 1]["teacher_ids"].shape == (BLOCK, 2)


def test_every_block_serves_every_run(tmp_path, teacher) -> None:
    make = {"k": 2, "model": model(0), "teacher": teacher, "train_blocks": BLOCKS, "every_block": True}
    made = cache_teacher(SHORT, tmp_path / "cache", **make)
    assert len(made) == len(BLOCKS)
    run(replace(SHORT, steps=9, seed=3, teacher_cache=str(tmp_path / "cache")))


def test_another_cache_is_another_run(tmp_path, cache, teacher) -> None:
    config = replace(SHORT, output=str(tmp_path / "run"), teacher_cache=str(cache))
    run(config)
    cache_teacher(SHORT, tmp_path / "other", k=4, model=model(0), teacher=teacher, train_blocks=BLOCKS)
    with pytest.raises(ResumeError, match=r"teacher_cache was .*'k': 8.* is .*'k': 4"):
        run(replace(config, teacher_cache=str(tmp_path / "other"), resume=True))
    shutil.move(cache, tmp_path / "moved")
    try:
        run(replace(config, teacher_cache=str(tmp_path / "moved"), resume=True))
    finally:
        shutil.move(tmp_path / "moved", cache)


def test_without_weight_the_cache_is_not_even_looked_for() -> None:
    rows, _ = run(replace(SHORT, kd_weight=0.0, teacher_cache="nowhere"))
    assert all("kd_loss" not in row for row in rows)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"k": 0}, PlanError, "k=0"),
        ({"dtype": "int8"}, PlanError, "dtype='int8'"),
        ({"teacher": None}, PlanError, "no teacher to ask"),
        ({"teacher": model(5, 62)}, DistillationError, "vocabulary has 62 entries"),
        ({"model": None}, PlanError, "no model to train"),
    ],
)
def test_what_cannot_be_cached_is_refused(tmp_path, teacher, given, error, message) -> None:
    with pytest.raises(error, match=message):
        cache_teacher(
            SHORT,
            tmp_path / "cache",
            **{"model": model(0), "teacher": teacher, "train_blocks": BLOCKS} | given,
        )
    assert not list(tmp_path.iterdir())


def test_other_tasks_are_refused(cache) -> None:
    with pytest.raises(DistillationError, match="is for the task clm, and this one is mlm"):
        train(replace(SHORT, teacher_cache=str(cache)), task="mlm", model=model(0), train_blocks=BLOCKS)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, teacher) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(OutputError, match="not empty"):
        cache_teacher(SHORT, tmp_path, model=model(0), teacher=teacher, train_blocks=BLOCKS)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A student and a teacher with a tokenizer, a stranger with another, text, and the settings of a run."""
    folder = tmp_path_factory.mktemp("folders")
    for name, seed, shift in (("student", 0, 0), ("teacher", 5, 0), ("stranger", 6, 1)):
        model(seed).save_pretrained(folder / name)
        words = Tokenizer(
            models.WordLevel({f"w{(i + shift) % VOCAB}": i for i in range(VOCAB)}, unk_token="w0")
        )
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", unk_token="w0")
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("\n".join(f"w{i * i % VOCAB} w{i % 7}" for i in range(400)))
    settings = {"train_files": folder / "text.txt", "model": folder / "student", "steps": 4, "batch_size": 4}
    settings |= {"block": 12, "progress": "false"}
    (folder / "run.yaml").write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    return folder


def test_the_command_writes_what_the_run_takes(folders, tmp_path, capsys) -> None:
    cache, teacher = tmp_path / "cache", str(folders / "teacher")
    given = ["--config", folders / "run.yaml", "--teacher", teacher, "--k", VOCAB, "--json"]
    assert main(["cache-teacher", str(cache), *map(str, given)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["tokens"] == 16 * 12
    assert said["bytes"] == sum(file.stat().st_size for file in cache.glob("*.safetensors"))
    assert str(folders) not in (cache / MANIFEST).read_text()
    config = TrainConfig(**load_config_file(folders / "run.yaml"))
    live, cached = train(replace(config, teacher=teacher)), train(replace(config, teacher_cache=str(cache)))
    losses = [[row["kd_loss"] for row in run.rows if "kd_loss" in row] for run in (live, cached)]
    assert losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    with pytest.raises(DistillationError, match="made with a tokenizer that gives other ids"):
        train(replace(config, model=str(folders / "stranger"), teacher_cache=str(cache)))
    assert main(["cache-teacher", str(tmp_path / "all"), *map(str, given[:-1]), "--every-block"]) == 0
    assert "Train from it: the same settings and --teacher-cache" in capsys.readouterr().out
    assert len(TeacherCache(tmp_path / "all")) > 16


def test_two_processes_share_the_work(folders, tmp_path, monkeypatch) -> None:
    """Half the batch each, so that the run takes the same blocks; the shards differ, what they hold does not."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--no_python"]
    launch += ["--config_file", str(ROOT / "recipes" / "accelerate" / "cpu2.yaml")]
    script = (
        "import sys; from hf_ws.training import caching; from hf_ws.cli import main;"
        "caching.SHARD = 2000; sys.exit(main(sys.argv[1:]))"
    )
    given = [
        "cache-teacher",
        str(tmp_path / "two"),
        "--config",
        str(folders / "run.yaml"),
        "--batch-size",
        "2",
    ]
    given += ["--teacher", str(folders / "teacher"), "--k", "8"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, sys.executable, "-c", script, *given],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Written to") == 1
    config = TrainConfig(**load_config_file(folders / "run.yaml"), teacher=str(folders / "teacher"))
    one, two = cache_teacher(config, tmp_path / "one", k=8), TeacherCache(tmp_path / "two")
    assert one.contents == two.contents
    assert len(one.shards) == 1 < len(two.shards)
    numbers = [number for number in range(200) if number in one]
    assert [number for number in range(200) if number in two] == numbers
    for number in numbers:
        for name, value in one[number].items():
            assert torch.allclose(two[number][name].double(), value.double(), atol=2e-3), name
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--config", "FOLDER/run.yaml"], "no teacher to ask"),
        (["--config", "FOLDER/run.yaml", "--teacher", "FOLDER/stranger"], "gives other ids to 61 tokens"),
        (["--model", "FOLDER/student", "--teacher", "FOLDER/teacher"], "no text to train on"),
        (["--teacher", "FOLDER/teacher", "--train", "sede=1"], "--train sede: no such setting"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(folders, tmp_path, capsys, given, message) -> None:
    code = main(
        ["cache-teacher", str(tmp_path / "cache"), *(one.replace("FOLDER", str(folders)) for one in given)]
    )
    error = capsys.readouterr().err
    assert code in (2, 3)
    assert message in error
    assert error.startswith("hf-ws: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
