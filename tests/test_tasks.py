"""The tasks besides causal language modelling: their batches, and that they train, distil and resume."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_ws.errors import DataError, PlanError
from hf_ws.training import TrainConfig, train
from hf_ws.training.data import pack
from hf_ws.training.job import prepare
from hf_ws.training.tasks import TASKS
from hf_ws.training.tasks.causal_lm import keeps_apart
from hf_ws.training.tasks.seq2seq import _spans

TEXTS = [
    f"def f{i}(x):\n    return x * {i} + {i % 7}\n\n\nclass C{i}(Base):\n    value = {i}\n"
    for i in range(120)
]
BLOCK = 32
SHORT = TrainConfig(
    steps=8, batch_size=4, learning_rate=5e-3, log_every=1, eval_every=4, block=BLOCK, progress=False
)
SENTINELS = [f"<extra_id_{i}>" for i in range(6)]


def speaker(**special) -> PreTrainedTokenizerFast:
    extra = [*special.values(), *SENTINELS]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        TEXTS, vocab_size=300, special_tokens=["<pad>", "</s>", *extra], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="</s>", **special
    )


@pytest.fixture(scope="module")
def masking() -> PreTrainedTokenizerFast:
    return speaker(mask_token="<mask>")


@pytest.fixture(scope="module")
def blocks(masking) -> SimpleNamespace:
    return SimpleNamespace(
        train_blocks=pack(TEXTS[:100], masking, BLOCK), eval_blocks=pack(TEXTS[100:], masking, BLOCK)
    )


def bert(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForMaskedLM(BertConfig(vocab_size=310, max_position_embeddings=64, **sizes))


def t5(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=310, decoder_start_token_id=0, **sizes))


def bart(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    both = {"layers": 1, "ffn_dim": 48, "attention_heads": 4}
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in both.items()}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "decoder_start_token_id": 1}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=310, d_model=32, max_position_embeddings=64, **sizes, **ids)
    )


def rows(blocks: SimpleNamespace, count: int = 8) -> list[dict]:
    return [{**blocks.train_blocks.dataset[i], "place": i} for i in range(count)]


class TestMasked:
    def test_a_fixed_share_is_hidden_as_bert_hides_it(self, masking, blocks) -> None:
        task = TASKS["mlm"](replace(SHORT, mask_probability=0.25), bert().config, masking)
        many = [{**row, "place": place} for place in range(60) for row in rows(blocks)]
        made, before = task.batch(many), torch.stack([row["input_ids"] for row in many])
        hidden = made["labels"] != -100
        special = torch.isin(before, torch.tensor(masking.all_special_ids))
        assert torch.equal(hidden.sum(1), ((~special).sum(1) * 0.25).round().long())
        assert not (hidden & special).any()
        assert torch.equal(made["labels"][hidden], before[hidden])
        assert torch.equal(made["input_ids"][~hidden], before[~hidden])
        now, was = made["input_ids"][hidden], before[hidden]
        masked = (now == masking.mask_token_id).float().mean()
        assert masked == pytest.approx(0.8, abs=0.03)
        assert (now == was).float().mean() == pytest.approx(0.1, abs=0.02)

    def test_what_is_hidden_follows_from_seed_and_place(self, masking, blocks) -> None:
        task = TASKS["mlm"](SHORT, bert().config, masking)
        first = task.batch(rows(blocks))
        assert torch.equal(task.batch(rows(blocks)[3:4])["labels"][0], first["labels"][3])
        moved = task.batch([row | {"place": row["place"] + 100} for row in rows(blocks)])
        assert not torch.equal(moved["labels"], first["labels"])
        other = TASKS["mlm"](replace(SHORT, seed=1), bert().config, masking).batch(rows(blocks))
        assert not torch.equal(other["labels"], first["labels"])

    def test_it_wants_a_mask_token(self, blocks) -> None:
        with pytest.raises(DataError, match="tokenizer with a mask token"):
            TASKS["mlm"](SHORT, bert().config, speaker()).batch(rows(blocks))


class TestSpans:
    @pytest.mark.parametrize(
        ("length", "share", "mean"), [(32, 0.15, 3.0), (7, 0.5, 1.0), (100, 0.9, 5.0), (2, 0.15, 3.0)]
    )
    def test_are_always_as_many_and_apart(self, length: int, share: float, mean: float) -> None:
        counts = set()
        for seed in range(50):
            spans = _spans(length, share, mean, torch.Generator().manual_seed(seed))
            assert all(start < end for start, end in spans)
            assert all(end < start for (_, end), (start, _) in pairwise(spans))
            assert spans[0][0] > 0
            assert spans[-1][1] <= length
            counts.add((len(spans), sum(end - start for start, end in spans)))
        assert counts == {(len(spans), min(max(round(length * share), 1), length - 1))}

    def test_with_sentinels_the_text_can_be_put_together_again(self, blocks) -> None:
        tokenizer = speaker()
        made = TASKS["seq2seq"](SHORT, t5().config, tokenizer).batch(rows(blocks))
        marks = tokenizer.convert_tokens_to_ids(SENTINELS)
        for source, labels, decoder, row in zip(
            *(made[n].tolist() for n in ("input_ids", "labels", "decoder_input_ids")),
            rows(blocks),
            strict=True,
        ):
            cut: dict[int, list[int]] = {}
            for token in labels[:-1]:
                if token in marks:
                    cut[token] = []
                else:
                    cut[list(cut)[-1]].append(token)
            whole = [token for one in source[:-1] for token in cut.get(one, [one])]
            assert whole == row["input_ids"].tolist()
            assert source[-1] == labels[-1] == tokenizer.eos_token_id
            assert decoder == [0, *labels[:-1]]
        assert made["attention_mask"].all()

    def test_with_a_mask_token_the_whole_text_is_predicted(self, masking, blocks) -> None:
        plain = speaker(mask_token="<mask>")
        known = {name: i for name, i in plain.get_vocab().items() if name not in SENTINELS}
        plain.get_vocab = lambda: known
        made = TASKS["seq2seq"](SHORT, bart().config, plain).batch(rows(blocks))
        assert torch.equal(made["labels"][:, :-1], torch.stack([row["input_ids"] for row in rows(blocks)]))
        assert (made["input_ids"] == plain.mask_token_id).sum(1).tolist() == [2] * 8
        known.clear()
        plain.mask_token = None
        with pytest.raises(DataError, match="neither sentinels"):
            TASKS["seq2seq"](SHORT, bart().config, plain).batch(rows(blocks))

    def test_too_few_sentinels_are_named(self, blocks) -> None:
        config = replace(SHORT, mask_probability=0.5, mean_span=1.0)
        with pytest.raises(DataError, match="loses 16 spans and the tokenizer has 6"):
            TASKS["seq2seq"](config, t5().config, speaker()).batch(rows(blocks))


MAKERS = {"mlm": bert, "seq2seq": t5}


@pytest.mark.parametrize("task", MAKERS)
class TestTraining:
    def test_learns_from_text_and_a_teacher(self, task: str, masking, blocks) -> None:
        history = train(replace(SHORT, steps=40, eval_every=20, kd_weight=0.5), task=task, model=MAKERS[task](),
                        teacher=MAKERS[task](5), tokenizer=masking, **vars(blocks))  # fmt: skip
        assert history.final_loss < history.evaluations[0][1] - 0.5
        assert {"ce_loss", "kd_loss"} <= history.rows[1].keys()

    def test_resumes_bit_for_bit(self, task: str, tmp_path: Path, masking, blocks) -> None:
        def run(folder: str, **changes):
            config = replace(SHORT, output=str(tmp_path / folder), save_every=3, **changes)
            return train(config, task=task, model=MAKERS[task](), tokenizer=masking, **vars(blocks))

        whole = run("whole")
        again = run("again")
        folder = tmp_path / "again"
        for part in ("model", "checkpoint-8", "checkpoint-6"):
            target = folder / part
            if target.exists():
                for file in sorted(target.rglob("*"), reverse=True):
                    file.unlink()
                target.rmdir()
        resumed = run("again", resume=True)
        keys = ("step", "loss", "eval_loss")
        assert [[row.get(k) for k in keys] for row in resumed.rows] == [
            [row.get(k) for k in keys] for row in whole.rows
        ]
        assert [row.get("loss") for row in again.rows] == [row.get("loss") for row in whole.rows]

    def test_batches_do_not_depend_on_how_they_are_cut(self, task: str, masking, blocks) -> None:
        def losses(size: int) -> list[float | None]:
            model, config = (
                MAKERS[task](),
                replace(SHORT, batch_size=size, grad_accum=4 // size, eval_every=0),
            )
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                elif isinstance(getattr(module, "dropout", None), float):
                    module.dropout = 0.0
            return [
                row.get("loss")
                for row in train(config, task=task, model=model, tokenizer=masking, **vars(blocks)).rows
            ]

        assert losses(4) == pytest.approx(losses(2), abs=2e-4)


def test_pairs_are_learned(tmp_path: Path, masking) -> None:
    file = tmp_path / "pairs.jsonl"
    pairs = [{"of": f"return x * {i}", "to": f"value = {i}", "more": 1} for i in range(200)] + [
        {"of": "", "to": "x", "more": 1}
    ]
    file.write_text("\n".join(map(json.dumps, pairs)))
    config = replace(
        SHORT, steps=60, train_files=[str(file)], source_column="of", target_column="to", eval_every=30
    )
    history = train(config, task="seq2seq", model=t5(), tokenizer=masking)
    assert history.final_loss < history.evaluations[0][1] - 1
    with pytest.raises(DataError, match="no column 'from', only of, to, more"):
        train(replace(config, source_column="from"), task="seq2seq", model=t5(), tokenizer=masking)
    with pytest.raises(PlanError, match="pairs want both"):
        train(replace(config, target_column=None), task="seq2seq", model=t5(), tokenizer=masking)


def test_pairs_without_text_on_a_side_are_left_out_and_counted(tmp_path: Path, caplog) -> None:
    """Also where the tokenizer makes a token of no text at all, as T5's does."""
    ending = speaker(mask_token="<mask>")
    ending._tokenizer.post_processor = TemplateProcessing(
        single=f"$A {ending.eos_token}", special_tokens=[(ending.eos_token, ending.eos_token_id)]
    )
    assert len(ending("")["input_ids"]) == 1
    file = tmp_path / "pairs.jsonl"
    pairs = [{"of": f"return {i}", "to": f"value = {i}"} for i in range(60)]
    pairs += [{"of": " \n", "to": "a"}, {"of": "a", "to": None}, {"of": "", "to": ""}]
    file.write_text("\n".join(map(json.dumps, pairs)))
    config = replace(
        SHORT, train_files=[str(file)], eval_files=[str(file)], source_column="of", target_column="to"
    )
    job = prepare(config, task="seq2seq", model=t5(), tokenizer=ending)
    assert len(job.blocks) == 60
    assert caplog.text.count("3 of 63 pairs lack text on a side; they are left out") == 2
    file.write_text("\n".join(map(json.dumps, pairs[60:])))
    with pytest.raises(DataError, match="3 pairs came and none has text on both sides"):
        prepare(config, task="seq2seq", model=t5(), tokenizer=ending)
    file.write_text(json.dumps({"of": 7, "to": "a"}))
    with pytest.raises(DataError, match="row 0: column 'of' holds int, not text; name another"):
        prepare(config, task="seq2seq", model=t5(), tokenizer=ending)


def test_a_dataset_that_is_a_script_is_refused_with_advice(monkeypatch, masking) -> None:
    """Whether its rows are texts or pairs."""

    def scripted(*_, **__) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found script.py")

    monkeypatch.setattr("datasets.load_dataset", scripted)
    for columns in ({}, {"source_column": "of", "target_column": "to"}):
        config = replace(SHORT, dataset="owner/name", **columns)
        with pytest.raises(
            DataError, match="it is made by a script, which is not run: take its Parquet copy"
        ):
            prepare(config, task="seq2seq", model=t5(), tokenizer=masking)


class TestDocuments:
    """What is packed into one block, each as if it stood alone."""

    def test_positions_begin_anew_with_every_text_and_block(self, masking) -> None:
        texts = ["a = 1", "def f(x):\n    return x", "b = 22\nc = 333\n"] * 3
        packed = pack(texts, masking, 8, apart=True)
        lengths = [len(masking(text)["input_ids"]) + 1 for text in texts]
        each = [place for length in lengths for place in range(length)][: len(packed) * 8]
        expected = []
        for at, place in enumerate(each):
            expected.append(0 if place == 0 or at % 8 == 0 else expected[-1] + 1)
        assert torch.equal(packed.dataset[:]["position_ids"].flatten(), torch.tensor(expected))
        assert torch.equal(packed.dataset[:]["input_ids"], pack(texts, masking, 8).dataset[:]["input_ids"])

    @pytest.mark.parametrize("config", [LlamaConfig, GPT2Config, Qwen3Config, BloomConfig, MambaConfig])
    def test_a_model_that_can_keeps_them_apart(self, config, masking, caplog) -> None:
        """Against each document alone; who cannot (positions from elsewhere, a state) is told so."""
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 310,
            "num_key_value_heads": 4,
        }
        model = AutoModelForCausalLM.from_config(config(**sizes)).eval()
        one, other = torch.randint(310, (1, 7)), torch.randint(310, (1, 5))
        able = config not in (BloomConfig, MambaConfig)
        assert keeps_apart(model) == able
        if able:
            places = torch.cat([torch.arange(7), torch.arange(5)])[None]
            both = model(torch.cat([one, other], 1), position_ids=places, use_cache=False)
            alone = torch.cat([model(one).logits, model(other).logits], 1)
            assert torch.allclose(both.logits, alone, atol=1e-5)
        blocks = pack(TEXTS, masking, BLOCK, apart=True)
        job = prepare(SHORT, model=model, tokenizer=masking, train_blocks=blocks, eval_blocks=blocks)
        assert all(("position_ids" in rows.column_names) == able for rows in (job.blocks, job.held_out))
        assert ("does not keep documents apart" in caplog.text) != able

    def test_the_task_asks_for_it(self, tmp_path: Path, masking) -> None:
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
        for wanted in (True, False):
            config = replace(SHORT, train_files=[str(tmp_path)], documents_apart=wanted)
            rows = TASKS["clm"](config, LlamaConfig(), masking).read()
            assert ("position_ids" in rows.train.column_names) == wanted
            assert (
                "position_ids" not in TASKS["mlm"](config, bert().config, masking).read().train.column_names
            )


def test_a_mixture_takes_from_each_source_by_its_weight(tmp_path: Path, masking) -> None:
    for name, word in (("a", "alpha"), ("b", "beta")):
        rows = [json.dumps({"text": f"{word} {i} {text}"}) for i, text in enumerate(TEXTS)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    mixture = {str(tmp_path / "a.jsonl"): 3.0, str(tmp_path / "b.jsonl"): 1.0}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=310, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    )
    jobs = [
        prepare(replace(SHORT, steps=n, mixture=mixture), model=model, tokenizer=masking) for n in (10, 400)
    ]
    (first, _), (_, weight) = jobs[0].parts
    assert weight == 1.0
    short, long = (job.order() for job in jobs)
    assert torch.equal(long[:40], short)
    for end in (4, 40, 1600):
        assert int((long[:end] >= first).sum()) == end // 4
    own = long[long < first]
    assert sorted(own[:first].tolist()) == list(range(first))
    assert sorted(own[first : 2 * first].tolist()) == list(range(first))
    assert not torch.equal(own[:first], own[first : 2 * first])
    assert len(jobs[0].held_out) > 0

    (tmp_path / "own.txt").write_text("gamma 7 " * 400)
    config = replace(SHORT, mixture=mixture, eval_files=[str(tmp_path / "own.txt")], max_eval_blocks=0)
    (whole, _), _ = (job := prepare(config, model=model, tokenizer=masking)).parts
    assert whole > first  # nothing of the sources is held out
    alone = prepare(
        replace(config, mixture={}, train_files=[str(tmp_path / "a.jsonl")]), model=model, tokenizer=masking
    )
    assert whole == len(alone.blocks)
    assert torch.equal(job.held_out[:]["input_ids"], alone.held_out[:]["input_ids"])
    assert job.bytes_per_token == alone.bytes_per_token
