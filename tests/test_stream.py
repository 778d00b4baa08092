"""Streams: every text once a round, the same blocks wherever they are picked up again, memory that does not grow."""

import json
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_ws.errors import DataError, PlanError, ResumeError
from hf_ws.training import TrainConfig, config_from_flags, stream, train
from hf_ws.training import job as training_job
from hf_ws.training.caching import cache_teacher
from hf_ws.training.data import is_held_out, load_text, pack, split_held_out
from hf_ws.training.stream import Source, Stream
from hf_ws.training.tasks import TASKS
from tests.forked_runs import Forked, wait_for_rows

ROOT = Path(__file__).parents[1]
END = "<|endoftext|>"
TEXTS = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" * (1 + i % 4) for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=300, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """Two hundred texts: rows of JSON, of Parquet, and files of their own."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(3):
        rows = [json.dumps({"text": text}) for text in TEXTS[number * 40 : number * 40 + 40]]
        (folder / f"{number}.jsonl").write_text("\n".join(rows) + "\n")
    datasets.Dataset.from_dict({"text": TEXTS[120:160], "n": range(40)}).to_parquet(folder / "rows.parquet")
    for number in range(160, 200):
        (folder / f"{number}.py").write_text(TEXTS[number])
    return [str(folder)]


def of(files: list[str], tokenizer, **options) -> Stream:
    return Stream((Source.of_files(files),), tokenizer, block=16, **{"window": 30, **options})


def documents(blocks, tokenizer, count: int) -> list[str]:
    """The texts that so many blocks hold, the first and the last of which may be cut."""
    ids = [int(i) for _ in range(count) for i in next(blocks)["input_ids"]]
    return tokenizer.decode(ids).split(END)


@pytest.mark.parametrize("window", [1, 7, 30, 10_000])
def test_a_round_is_every_text_once_but_those_held_out(files, tokenizer, window) -> None:
    kept, held_out = split_held_out(load_text(files[0]))
    wanted = Counter(document.text for document in kept)
    tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in wanted.elements())
    blocks = of(files, tokenizer, window=window).blocks()
    texts = documents(blocks, tokenizer, 2 * tokens // 16 + 1)
    for start in (0, len(kept)):
        assert Counter(texts[start : start + len(kept)]) == wanted
    in_order = [document.text for document in kept]
    assert (texts[: len(kept)] == in_order) == (window == 1)
    assert (texts[: len(kept)] == texts[len(kept) : 2 * len(kept)]) == (window == 1)
    found = of(files, tokenizer).held_out(10**9)
    assert Counter(document.text for document in found) == Counter(one.text for one in held_out)
    assert all(is_held_out(document.name) for document in found)


def test_blocks_are_those_that_packing_makes(files, tokenizer) -> None:
    kept, _ = split_held_out(load_text(files[0]))
    packed = pack(kept, tokenizer, 16, apart=True, progress=False).dataset.with_format("numpy")
    blocks = of(files, tokenizer, window=1, apart=True).blocks()
    for number in range(len(packed)):
        row = next(blocks)
        assert row.keys() == packed[number].keys()
        assert all((row[name] == packed[number][name]).all() for name in row), number


def test_a_stream_goes_on_from_any_state_as_if_it_had_not_stopped(files, tokenizer) -> None:
    read = of(files, tokenizer)
    blocks, rows, states = read.blocks(), [], []
    for _ in range(1100):  # beyond the second round
        states.append(json.dumps(blocks.state()))
        rows.append(next(blocks)["input_ids"].tolist())
    assert json.loads(states[-1])["parts"][0]["place"]["round"] >= 2
    assert max(map(len, states)) < 400
    for at in [*random.Random(0).sample(range(1095), 40), 0, 1]:
        again = of(files, tokenizer).blocks(json.loads(states[at]))
        for number in range(at, at + 5):
            assert again.state() == json.loads(states[number])
            assert next(again)["input_ids"].tolist() == rows[number]


def test_the_seed_decides_the_order(files, tokenizer) -> None:
    first, same, other = (
        next(of(files, tokenizer, seed=seed).blocks())["input_ids"].tolist() for seed in (0, 0, 1)
    )
    assert first == same != other


def test_sources_come_by_their_weights(tokenizer) -> None:
    """Also after a stop, and whatever their lengths."""

    def source(word: str, count: int, weight: float) -> Source:
        rows = datasets.Dataset.from_dict({"text": [f"{word} {i}" for i in range(count)]})
        return Source(word, rows.to_iterable_dataset(num_shards=2), weight=weight)

    sources = (source("aaa", 7, 3.0), source("bbb", 90, 1.0))
    mixed = Stream(sources, tokenizer, block=16, window=5, holds_out=False)
    blocks = mixed.blocks()
    texts = [tokenizer.decode(next(blocks)["input_ids"]) for _ in range(40)]
    assert [("bbb" in text) for text in texts].count(True) == 10
    assert all(("aaa" in text) != ("bbb" in text) for text in texts)
    state = blocks.state()
    assert state["taken"] == [30, 10]
    again = mixed.blocks(state)
    for _ in range(20):
        assert (next(again)["input_ids"] == next(blocks)["input_ids"]).all()


def broken(times: int, at: int = 100) -> tuple[datasets.IterableDataset, list[int]]:
    """Rows that break off at one of them, so many times over; and how often they did."""
    left = [times]

    def rows(shards):
        for number in (int(one) for shard in shards for one in shard):
            if number == at and left[0]:
                left[0] -= 1
                raise ConnectionResetError("the line is dead")
            yield {"text": TEXTS[number]}

    shards = [[*range(100)], [*range(100, 200)]]
    return datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": shards}), left


def test_a_source_that_breaks_off_is_taken_up_where_it_was(tokenizer, monkeypatch, caplog) -> None:
    monkeypatch.setattr(stream, "WAITS", (0.0, 0.0))
    whole, interrupted = (
        Stream((Source("rows", broken(times, 130)[0]),), tokenizer, block=16, window=20) for times in (0, 2)
    )
    one, other = whole.blocks(), interrupted.blocks()
    for _ in range(600):
        assert (next(one)["input_ids"] == next(other)["input_ids"]).all()
    assert (
        caplog.text.count("rows: reading broke off (ConnectionResetError: the line is dead); trying again")
        == 2
    )


def test_a_source_that_stays_away_ends_the_run_with_a_word(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(stream, "WAITS", (0.0, 0.0))
    rows, left = broken(10)
    blocks = Stream((Source("rows", rows),), tokenizer, block=16, window=20).blocks()
    message = (
        r"rows: reading broke off \(ConnectionResetError: the line is dead\), also after 2 further .*--resume"
    )
    with pytest.raises(DataError, match=message):
        [next(blocks) for _ in range(600)]
    assert left == [7]


def test_a_dataset_of_the_hub_is_opened_by_name(tokenizer, monkeypatch) -> None:
    """The client of `datasets` itself, which is stood in for here, gives rows by name, split and configuration."""
    asked = []

    def opened(*arguments, **options) -> datasets.IterableDataset:
        asked.append((arguments, options))
        if "script" in arguments[0]:
            raise RuntimeError("Dataset scripts are no longer supported, but found script.py")
        return datasets.Dataset.from_dict({"body": TEXTS}).to_iterable_dataset(num_shards=4)

    monkeypatch.setattr(datasets, "load_dataset", opened)
    config = TrainConfig(
        dataset="owner/name", dataset_config="en", dataset_split="validation", text_column="body", streaming=True,
        steps=2, block=16, max_eval_blocks=4, batch_size=2,
    )  # fmt: skip
    rows = TASKS["clm"](config, LlamaConfig(vocab_size=300), tokenizer).read()
    assert asked == [(("owner/name", "en"), {"split": "validation", "streaming": True})]
    held_out = [text for text in TEXTS if is_held_out(text)]
    assert tokenizer.decode(rows.held_out[0]["input_ids"]) in END.join(held_out)
    texts = documents(rows.stream.blocks(), tokenizer, 600)
    assert not {*texts} & {*held_out}
    with pytest.raises(DataError, match=r"it is made by a script, which is not run: take its Parquet copy"):
        Source.of_hub("owner/script")


def test_memory_does_not_grow_with_the_text(tokenizer, tmp_path, monkeypatch) -> None:
    """A file that is one text of 6 MB is never whole in memory."""
    monkeypatch.setattr(stream, "_LONGEST", 2**14)
    line = "a line of thirty characters..\n"
    (tmp_path / "long.txt").write_text(line * 200_000)
    read = of([str(tmp_path / "long.txt")], tokenizer, window=2, holds_out=False)
    tracemalloc.start()
    rows = [next(read.blocks())["input_ids"]]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e6
    assert line.startswith(tokenizer.decode(rows[0])[:20])
    whole = [document["text"] for document in read.sources[0].rows]
    assert "".join(whole) == line * 200_000
    assert max(map(len, whole)) <= 2**14
    assert all(text.endswith("\n") for text in whole)


class TestRefusals:
    def test_what_a_source_lacks(self, tokenizer, tmp_path) -> None:
        (tmp_path / "empty.jsonl").write_text('{"text": " "}\n{"text": null}\n')
        with pytest.raises(DataError, match=r"empty.jsonl: no text in it to train on"):
            next(of([str(tmp_path / "empty.jsonl")], tokenizer).blocks())
        (tmp_path / "short.jsonl").write_text('{"text": "a"}\n')
        with pytest.raises(DataError, match="less text than one block of 16 tokens"):
            of([str(tmp_path / "short.jsonl")], tokenizer, holds_out=False).sample(3)
        with pytest.raises(DataError, match="too few texts to hold some out"):
            of([str(tmp_path / "short.jsonl")], tokenizer).held_out(100)
        with pytest.raises(DataError, match=r"nowhere\.txt does not exist"):
            of([str(tmp_path / "nowhere.txt")], tokenizer)

    def test_bad_rows_are_named_or_skipped_and_counted(self, tokenizer, tmp_path, caplog) -> None:
        file = tmp_path / "x.jsonl"
        file.write_text(
            '{"text": "good enough for a block or two of text"}\n{"text": \n{"txt": 1}\n{"text": 5}\n'
        )
        with pytest.raises(DataError, match=r"x.jsonl, line 2: not JSON.*skip_bad_rows"):
            of([str(file)], tokenizer, holds_out=False).sample(1)
        source = Source.of_files([str(file)], skip_bad=True)
        Stream((source,), tokenizer, block=4, holds_out=False).sample(1)
        assert f"3 bad rows are skipped, the first: {file}, line 2: not JSON" in caplog.text

    def test_a_column_that_is_not_there(self, tokenizer) -> None:
        rows = datasets.Dataset.from_dict({"body": TEXTS, "n": range(200)}).to_iterable_dataset()
        for column, message in (
            ("text", "column 'text' is not there, only body, n"),
            ("n", "column 'n' holds int"),
        ):
            with pytest.raises(DataError, match=f"rows: {message}"):
                next(Stream((Source("rows", rows, column),), tokenizer, block=16).blocks())
        assert next(Stream((Source("rows", rows, "body"),), tokenizer, block=16).blocks())

    def test_ids_beyond_the_vocabulary(self, files, tokenizer) -> None:
        with pytest.raises(DataError, match=r"holds token id \d+, but the model's vocabulary has 100"):
            next(of(files, tokenizer, vocabulary=100).blocks())

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"workers": 2}, "workers=2 with streaming"),
            ({"teacher_cache": "cache"}, "teacher_cache with streaming"),
            ({"max_eval_blocks": 0}, "max_eval_blocks=0 with streaming, which has no end"),
            (
                {"source_column": "a", "target_column": "b"},
                "streaming reads text that is packed, and no pairs",
            ),
            ({"shuffle_buffer": 0}, "shuffle_buffer=0; at least 1"),
        ],
    )
    def test_settings_that_exclude_each_other(self, settings, message) -> None:
        with pytest.raises(PlanError, match=message):
            TrainConfig(steps=1, streaming=True, **settings)

    def test_other_data_and_caches(self, files) -> None:
        with pytest.raises(PlanError, match="the task image_classification takes other data"):
            train(TrainConfig(steps=1, streaming=True, model="m"), task="image_classification")
        config = TrainConfig(steps=1, streaming=True, model="m", teacher="t", train_files=files)
        with pytest.raises(PlanError, match="a cache is of data in memory"):
            cache_teacher(config, "cache")


STEPS = 24


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer) -> Path:
    """A student with dropout."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, max_position_embeddings=32, attention_dropout=0.2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def flags(start: Path, files: list[str], **changes) -> list[str]:
    rows, plain = f"{files[0]}/*.jsonl", f"{files[0]}/*.py"
    settings = {"model": start, "steps": STEPS, "block": 32, "batch-size": 3, "grad-accum": 2, "log-every": 1}
    settings |= {
        "learning-rate": "5e-3",
        "eval-every": 10,
        "max-eval-blocks": 6,
        "shuffle-buffer": 20,
        **changes,
    }
    found = ["--streaming", "--no-progress", "--mixture", f"{rows}=1", f"{plain}=3"]
    return [*found, *(str(part) for name, value in settings.items() for part in (f"--{name}", value))]


def recorded(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_killed_and_resumed_a_run_on_a_stream_is_the_uninterrupted_one(start, files, tmp_path) -> None:
    """Bit for bit, over rounds, windows, a mixture and accumulation."""
    forked, dice = Forked(), random.Random(0)
    whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    command = [*flags(start, files, **{"save-every": 1}), "--resume"]
    try:
        assert forked.run(*command, "--output", whole, log=log) == 0, log.read_text()
        for _ in range(4):
            before = len(recorded(run)) if (run / "metrics.jsonl").is_file() else 0
            pid = forked.start(*command, "--output", run, log=log)
            wait_for_rows(run, before + 1 + dice.randrange(4))
            os.kill(pid, signal.SIGKILL)
            assert forked.end() == 128 + signal.SIGKILL, log.read_text()
        assert not (run / "model").exists()
        assert forked.run(*command, "--output", run, log=log) == 0, log.read_text()
    finally:
        forked.close()
    saved = [folder / "model" / "model.safetensors" for folder in (run, whole)]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    assert recorded(run) == recorded(whole)
    state = json.loads((whole / f"checkpoint-{STEPS}" / "stream.json").read_text())
    assert sum(state["taken"]) == STEPS * 6
    assert [part["place"]["round"] for part in state["parts"]] != [0, 0]
    assert "a stream of rows of 32 tokens" in (whole / "train.md").read_text()


def test_of_two_processes_each_takes_its_share(start, files, tmp_path) -> None:
    """So the curve is that of one process: no row is seen twice, and none is left out."""
    model = LlamaForCausalLM.from_pretrained(start, attention_dropout=0.0)
    model.save_pretrained(tmp_path / "start")
    PreTrainedTokenizerFast.from_pretrained(start).save_pretrained(tmp_path / "start")
    given = flags(tmp_path / "start", files, steps=6, **{"save-every": 3})
    one = [*given, "--batch-size", "4", "--output", str(tmp_path / "one")]
    two = [*given, "--batch-size", "2", "--output", str(tmp_path / "two")]
    train(config_from_flags(one, ""))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "recipes" / "accelerate" / "cpu2.yaml"), str(ROOT / "recipes" / "clm.py"), *two]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [recorded(tmp_path / name) for name in ("one", "two")]
    losses = [[row[key] for row in run for key in ("loss", "eval_loss") if key in row] for run in runs]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    states = [
        json.loads((tmp_path / name / "checkpoint-6" / "stream.json").read_text()) for name in ("one", "two")
    ]
    assert states[0] == states[1]


def test_resuming_on_other_text_is_refused(start, files, tmp_path) -> None:
    config = TrainConfig(
        model=str(start), output=str(tmp_path / "run"), train_files=files, streaming=True, block=32, steps=2,
        batch_size=2, save_every=1, max_eval_blocks=4, progress=False, resume=True,
    )  # fmt: skip
    train(config)
    (tmp_path / "other.txt").write_text("something else\n" * 400)
    for other in ({"train_files": [str(tmp_path / "other.txt")], "eval_files": files}, {"shuffle_buffer": 3}):
        with pytest.raises(ResumeError, match=r"the run in .* was started otherwise: .*data was "):
            train(replace(config, **other))


def test_what_is_held_out_is_what_is_held_out_in_memory(start, files) -> None:
    config = TrainConfig(
        model=str(start), train_files=files, block=16, steps=2, batch_size=2, max_eval_blocks=500
    )
    one, other = (
        training_job.prepare(replace(config, streaming=streaming)).held_out[:]["input_ids"].tolist()
        for streaming in (False, True)
    )
    assert one == other
