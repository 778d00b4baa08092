"""Figures of an evaluation against the plain formulas in float64."""

import copy
import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from hf_ws.cli import main
from hf_ws.errors import CheckpointError, DataError, DistillationError, PlanError
from hf_ws.evaluation import Evaluation, Figure, evaluate, run_tasks
from hf_ws.training import TrainConfig, train
from hf_ws.training.data import load_text, pack, split_held_out
from tests.tiny_checkpoints import LLAMA, llama

VOCAB, BLOCK = 61, 10
TEXTS = [" ".join(f"w{2 + (i * j * j + i) % (VOCAB - 2)}" for j in range(5 + i % 9)) for i in range(150)]
QUIET = {"progress": False, "batch_size": 4, "block": BLOCK}


def sharper(model: PreTrainedModel) -> PreTrainedModel:
    """Far from uniform, so that models differ by more than rounding."""
    with torch.no_grad():
        model.get_output_embeddings().weight *= 10
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    names = ["<unknown>", "<end>", *(f"w{i}" for i in range(2, VOCAB))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unknown>")


@pytest.fixture(scope="module")
def student() -> PreTrainedModel:
    torch.manual_seed(0)
    return sharper(llama())


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    """Of another make and width, so that nothing fits by chance."""
    torch.manual_seed(1)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    return sharper(GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **sizes, tie_word_embeddings=False)))


def plainly(ids: torch.Tensor, student: PreTrainedModel, teacher: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every figure of every block [blocks], as one writes it down, in float64."""
    with torch.no_grad():
        q, p = (one.double()(ids).logits[:, :-1].log_softmax(-1) for one in (student, teacher))
    student.float(), teacher.float()
    marks = ids[:, 1:, None]
    return {
        "loss": -q.gather(-1, marks)[..., 0].mean(1),
        "teacher_loss": -p.gather(-1, marks)[..., 0].mean(1),
        "kl": (p.exp() * (p - q)).sum(-1).mean(1),
        "agreement": (q.argmax(-1) == p.argmax(-1)).double().mean(1),
    }


@pytest.mark.parametrize("all_text", [False, True])
def test_figures_are_the_plain_formulas(student, teacher, tokenizer, all_text: bool) -> None:
    found = evaluate(student, TEXTS, teacher=teacher, tokenizer=tokenizer, all_text=all_text, **QUIET)
    documents = load_text(TEXTS)
    packed = pack(documents if all_text else split_held_out(documents)[1], tokenizer, BLOCK)
    ids = packed.dataset[:]["input_ids"]
    assert len(ids) % 4  # the last batch is a short one
    expected = plainly(ids, student, teacher)
    for name, blocks in expected.items():
        figure = getattr(found, name)
        assert figure.mean == pytest.approx(blocks.mean().item(), rel=1e-5), name
        variance = ((blocks - blocks.mean()) ** 2).sum().item() / (len(blocks) - 1)
        assert figure.error == pytest.approx(math.sqrt(variance / len(blocks)), rel=1e-4), name
    assert 0 < found.agreement.mean < 1 or not all_text
    assert found.kl.mean > 0.1
    assert found.perplexity == pytest.approx(math.exp(expected["loss"].mean()), rel=1e-5)
    size = len("".join(TEXTS)) / sum(len(text.split()) + 1 for text in TEXTS)
    if all_text:
        assert found.bits_per_byte == pytest.approx(
            expected["loss"].mean().item() / math.log(2) / size, rel=1e-5
        )
    assert (found.blocks, found.block, found.tokens) == (len(ids), BLOCK, len(ids) * (BLOCK - 1))


def test_a_model_agrees_with_itself(student, tokenizer) -> None:
    found = evaluate(student, TEXTS, teacher=student, tokenizer=tokenizer, **QUIET)
    assert found.kl.mean == pytest.approx(0, abs=1e-7)
    assert found.agreement == Figure(1.0, 0.0)
    assert found.teacher_loss == found.loss


def test_it_is_what_training_records(student, tokenizer) -> None:
    held_out = pack(TEXTS[:20], tokenizer, BLOCK)
    config = TrainConfig(steps=1, batch_size=1, learning_rate=1e-9, max_eval_blocks=0, progress=False)
    blocks = {"train_blocks": pack(TEXTS, tokenizer, BLOCK), "eval_blocks": held_out}
    recorded = train(config, model=copy.deepcopy(student), **blocks).rows[0]
    found = evaluate(student, held_out, progress=False)
    assert found.loss.mean == pytest.approx(recorded["eval_loss"], rel=1e-5)
    assert found.bits_per_byte == pytest.approx(recorded["eval_bits_per_byte"], rel=1e-5)


def test_documents_apart_see_nothing_of_each_other(student, teacher, tokenizer) -> None:
    """Each document, or what of it is in a block, by itself."""
    packed = pack(TEXTS, tokenizer, BLOCK, apart=True)
    found = evaluate(student, TEXTS, tokenizer=tokenizer, all_text=True, documents_apart=True, **QUIET)
    losses = []
    for row in packed.dataset:
        starts = [i for i, place in enumerate(row["position_ids"].tolist()) if place == 0]
        for start, end in zip(starts, [*starts[1:], BLOCK], strict=True):
            with torch.no_grad():
                log_q = student(row["input_ids"][None, start:end]).logits[0].log_softmax(-1)
            following = row["input_ids"][start + 1 : end + 1]
            losses += [-log_q[i, token].item() for i, token in enumerate(following)]
    assert len(losses) == found.tokens
    assert found.loss.mean == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    whole = evaluate(student, TEXTS, tokenizer=tokenizer, all_text=True, **QUIET)
    assert abs(whole.loss.mean - found.loss.mean) > 1e-4
    with pytest.raises(PlanError, match=r"the teacher \(Unable\) cannot keep documents apart"):
        evaluate(student, packed, teacher=Unable(teacher.config).eval(), progress=False)


class Unable(GPT2LMHeadModel):
    """Takes no positions."""

    def forward(self, input_ids=None, use_cache=None):
        return super().forward(input_ids=input_ids, use_cache=use_cache)


def test_fewer_blocks_are_spread_evenly(student, teacher, tokenizer) -> None:
    packed = pack(TEXTS, tokenizer, BLOCK)
    found = evaluate(student, packed, teacher=teacher, max_blocks=4, progress=False)
    chosen = [i * len(packed) // 4 for i in range(4)]
    expected = plainly(packed.dataset[chosen]["input_ids"], student, teacher)
    assert found.blocks == 4
    assert found.loss.mean == pytest.approx(expected["loss"].mean().item(), rel=1e-5)
    one = evaluate(student, packed, max_blocks=1, progress=False)
    assert math.isnan(one.loss.error)
    assert "+-" not in str(one)
    assert one.as_dict()["loss_error"] is None


def test_likelihoods_of_nought_are_no_trouble(student, tokenizer) -> None:
    torch.manual_seed(2)
    never = llama()
    never.lm_head = torch.nn.Linear(24, VOCAB)
    with torch.no_grad():
        never.lm_head.bias[7] = -math.inf
    ids = pack([" ".join(f"w{2 + i % 7}" for i in range(50))], tokenizer, BLOCK)
    found = evaluate(student, ids, teacher=never, progress=False)
    assert math.isfinite(found.kl.mean)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"block": 100}, DataError, "blocks of 100 tokens came and the model has 32 positions; set block=32"),
        ({"data": ["w2"]}, DataError, "the held-out part of the text .*: 1 texts? .*less than one block|no text"),
        ({"tokenizer": None}, DataError, "text came without a tokenizer"),
        ({"model": "./nowhere"}, CheckpointError, "nowhere could not be loaded"),
        ({"teacher": "./nowhere"}, DistillationError, "the teacher cannot be used: .*nowhere"),
        ({"teacher": llama(vocab_size=62)}, DistillationError, "vocabulary has 62 entries"),
        ({"model": llama(vocab_size=30)}, DataError, "holds token id"),
        ({"batch_size": 0}, PlanError, "batch_size=0"),
        ({"max_blocks": -1}, PlanError, "max_blocks=-1"),
        ({"model": "./nowhere", "dtype": "int8"}, PlanError, "dtype='int8'; float32, bfloat16"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(student, tokenizer, given, error, message) -> None:
    options = {"data": TEXTS * 10, "tokenizer": tokenizer, **QUIET} | given
    with pytest.raises(error, match=message):
        evaluate(options.pop("model", student), options.pop("data"), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, student, teacher, tokenizer) -> Path:
    place = tmp_path_factory.mktemp("models")
    for name, one in (("student", student), ("teacher", teacher)):
        one.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    (place / "text.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    return place


def test_the_command_prints_a_table_and_json(folder, student, teacher, tokenizer, capsys) -> None:
    given = [
        "eval",
        str(folder / "student"),
        "--data",
        str(folder / "text.jsonl"),
        "--column",
        "body",
        "--all-text",
    ]
    given += ["--block", str(BLOCK), "--teacher", str(folder / "teacher")]
    assert main([*given, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    ids = pack(TEXTS, tokenizer, BLOCK).dataset[:]["input_ids"]
    for name, blocks in plainly(ids, student, teacher).items():
        assert said[name] == pytest.approx(blocks.mean().item(), rel=1e-5)
        assert said[f"{name}_error"] == pytest.approx((blocks.std() / len(blocks) ** 0.5).item(), rel=1e-4)
    assert said["tokens"] == len(ids) * (BLOCK - 1)
    assert main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "loss,",
        "nats",
        "per",
        "token",
        f"{said['loss']:.4f}",
        "+-",
        f"{said['loss_error']:.4f}",
    ]
    assert lines[-1].endswith(f"{said['tokens']:,} in {len(ids):,} blocks of {BLOCK}")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tasks", "a", "--teacher", "x"], "leave out --data and --teacher"),
        (["--limit", "3"], "--limit is of --tasks"),
        (["--tasks", "a"], "pip install 'lm_eval[hf]'"),
        (["--data", "no/such/file.txt"], "neither a file or folder here nor a dataset"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(folder, capsys, monkeypatch, given, message) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # importing it now raises
    assert main(["eval", str(folder / "student"), *given]) in (2, 3)
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("hf-ws: ")
    assert error.count("\n") == 1


def test_tasks_are_handed_to_lm_eval(folder, capsys, monkeypatch) -> None:
    """Against a stand-in with the package's signatures: it is no dependency."""
    asked = {}

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size) -> None:
            asked["model"], asked["tokenizer"], asked["batch_size"] = pretrained, tokenizer, batch_size

    def simple_evaluate(model, tasks, limit, log_samples) -> dict:
        asked["given"] = model, tasks, limit, log_samples
        if "unknown" in tasks:
            raise KeyError("unknown")
        metrics = {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.125, "f1,strict": 0.5}
        return {"results": dict.fromkeys(tasks, metrics)}

    package, module = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.models.huggingface")
    package.simple_evaluate, module.HFLM = simple_evaluate, HFLM
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.models", types.ModuleType("lm_eval.models"))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", module)
    given = ["eval", str(folder / "student"), "--tasks", "arc, boolq", "--limit", "5", "--batch-size", "2"]
    assert main([*given, "--json"]) == 0
    expected = {"acc": 0.25, "acc_stderr": 0.125, "f1,strict": 0.5}
    assert json.loads(capsys.readouterr().out) == {"arc": expected, "boolq": expected}
    assert asked["given"][1:] == (["arc", "boolq"], 5, False)
    assert asked["batch_size"] == 2
    assert asked["model"].config.vocab_size == LLAMA["vocab_size"]
    assert main(given) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["arc", "acc", "0.2500", "+-", "0.1250"]
    with pytest.raises(PlanError, match="lm_eval refuses the tasks: unknown"):
        run_tasks(str(folder / "student"), ["unknown"])


def test_a_figure_of_one_block_has_no_error() -> None:
    assert str(Figure.of(torch.tensor([2.0], dtype=torch.float64))) == "2.0000"
    found = Evaluation(blocks=1, block=2, bytes_per_token=2.0, loss=Figure(math.log(4), math.nan))
    assert found.perplexity == pytest.approx(4)
    assert found.bits_per_byte == pytest.approx(1)
