"""Word error rate: cases counted by hand, laws of a distance, and what a model writes by itself."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin

from hf_ws.training import TrainConfig, train
from hf_ws.training import job as training_job
from hf_ws.training.corpora import dialtones
from hf_ws.training.word_errors import distance, word_error_rate
from tests.test_tasks_media import listener, whisper


@pytest.mark.parametrize(
    ("written", "said", "edits"),
    [
        ("the cat sat", "the cat sat", 0),
        ("the cat sat", "the bat sat", 1),
        ("cat sat", "the cat sat", 1),
        ("the big cat sat", "the cat sat", 1),
        ("", "the cat sat", 3),
        ("a b c", "", 3),
        ("cat the sat", "the cat sat", 2),
        ("one two three four", "two three five", 2),
        ("kitten", "sitting", 1),
    ],
)
def test_edits_counted_by_hand(written: str, said: str, edits: int) -> None:
    assert distance(written.split(), said.split()) == edits
    assert distance(said.split(), written.split()) == edits


def test_letters_as_in_the_textbook() -> None:
    assert distance("kitten", "sitting") == 3
    assert distance("intention", "execution") == 5


def test_it_is_a_distance() -> None:
    dice = random.Random(0)
    for _ in range(200):
        one, other, third = ([dice.choice("ab") for _ in range(dice.randrange(7))] for _ in range(3))
        assert (distance(one, other) == 0) == (one == other)
        assert distance(one, third) <= distance(one, other) + distance(other, third)
        assert abs(len(one) - len(other)) <= distance(one, other) <= max(len(one), len(other))


def test_the_rate_counts_words_of_all_texts_alike() -> None:
    assert word_error_rate([("a b", "a b c d"), ("x", "x")]) == 2 / 5
    assert word_error_rate([("a b c", "d")]) == 3.0
    assert word_error_rate([("", "")]) == 0.0


CONFIG = TrainConfig(
    train_files=["dialtones"], steps=2, batch_size=4, eval_every=2, max_eval_blocks=8, progress=False, word_errors=True,
)  # fmt: skip


def test_what_is_written_is_what_generate_writes() -> None:
    """Transformers' own greedy search, up to the end of each text."""
    model, words = whisper().eval(), listener()
    rows = dialtones(words.feature_extractor.sampling_rate, 8)
    job = training_job.prepare(CONFIG, task="speech", model=model, tokenizer=words, train_blocks=rows)
    batch = job.task.batch([job.blocks[i] | {"place": i} for i in range(4)])
    ours = job.task.written(model, batch)
    prefix = words.tokenizer.prefix_tokens[1:]
    begin = torch.tensor([[model.config.decoder_start_token_id, *prefix]] * 4)
    length = batch["labels"].shape[1] - len(prefix)
    model.generation_config = GenerationConfig(
        eos_token_id=256, pad_token_id=256, decoder_start_token_id=257, max_new_tokens=length
    )
    theirs = GenerationMixin.generate(
        model,
        batch["input_features"],
        decoder_input_ids=begin,
        decoder_attention_mask=torch.ones_like(begin),
    )[:, 1:]
    for one, other in zip(ours.tolist(), theirs.tolist(), strict=True):
        kept = [token for token in one if token >= 0]
        assert kept == other[: len(kept)]
        assert set(other[len(kept) :]) <= {256}


def test_wrong_words_are_recorded_at_every_evaluation(tmp_path) -> None:
    """Of a model that never ends, and of one that says what is to be said."""
    words = listener()
    model, config = whisper(), replace(CONFIG, output=str(tmp_path / "run"))
    history = train(config, task="speech", model=model, tokenizer=words)
    rates = [row["eval_word_error_rate"] for row in history.rows if "eval_loss" in row]
    assert len(rates) == 2
    assert all(rate > 0 for rate in rates)
    assert "| wrong words for each that was said |" in (tmp_path / "run" / "train.md").read_text()
    job = training_job.prepare(config, task="speech", model=model, tokenizer=words)
    labels = job.task.batch([job.held_out[i] | {"place": i} for i in range(4)])["labels"].numpy()
    assert job.task.metrics(labels, labels) == {"word_error_rate": 0.0}
