"""Comparing starts: fair, resumable, and honest about the speed-up."""

import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ws.compare import Arm, Comparison, compare
from hf_ws.compare.report import tokens_to
from hf_ws.errors import DataError, DivergenceError, OutputError, PlanError

VOCAB = 40


def blocks(seed: int, count: int = 64) -> torch.Tensor:
    """A language in which each token decides the next: learnable in few steps."""
    starts = torch.randint(0, VOCAB, (count, 1), generator=torch.Generator().manual_seed(seed))
    return (starts + torch.arange(16) * 7) % VOCAB


def fresh(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=16, **sizes))


class Counted:
    """A start that counts how often it is asked for."""

    def __init__(self, make=fresh) -> None:
        self.make, self.calls = make, 0

    def __call__(self, seed: int) -> LlamaForCausalLM:
        self.calls += 1
        return self.make(seed)


@pytest.fixture(scope="module")
def learned() -> LlamaForCausalLM:
    """A start that has seen the language already."""
    from hf_ws.training import TrainConfig, train

    model = fresh(3)
    train(TrainConfig(steps=25, learning_rate=1e-2, progress=False), model=model, train_blocks=blocks(5))
    return model


def run(output, starts, **changes) -> Comparison:
    settings = {"steps": 40, "batch_size": 8, "learning_rates": [1e-2], "progress": False}
    settings |= {"data": blocks(0), "held_out": blocks(1, 16), "methods": []}
    return compare("not read", output=output, starts=starts, **(settings | changes))


def test_a_learned_start_is_faster_and_the_same_start_is_not(tmp_path, learned) -> None:
    result = run(tmp_path, {"random": fresh, "twin": fresh, "learned": lambda _: learned}, seeds=[0, 1, 2])
    assert [(arm.method, arm.seed) for arm in result.arms[:4]] == [
        *(("random", s) for s in (0, 1, 2)),
        ("twin", 0),
    ]
    # The same weights on the same batches: the same run, so order and schedule do not depend on the arm.
    assert [arm.evaluations for arm in result.of("twin")] == [arm.evaluations for arm in result.of("random")]
    assert result.speed_up("twin") == pytest.approx(1, rel=0.05)
    assert result.speed_up("learned") > 1.5
    assert result.of("learned")[0].first_loss < result.of("random")[0].first_loss - 1

    saved = json.loads((tmp_path / "compare.json").read_text())
    assert saved["methods"]["learned"]["speed_up"] == pytest.approx(result.speed_up("learned"))
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "compare.md").read_text()
    assert table.count("\n| ") == 4
    assert "5,120 training tokens a run. Learning rate 0.01 for every start." in table
    assert " to " in table.splitlines()[-3]


def test_each_arm_gets_its_own_learning_rate(tmp_path) -> None:
    result = run(
        tmp_path, {"random": fresh, "other": fresh}, learning_rates=[1e-5, 1e-2], seeds=[0, 1], steps=10
    )
    assert {arm.learning_rate for arm in result.arms} == {1e-2}
    assert "the one of 1e-05, 0.01 with the lowest held-out loss on the full run (seed 0)" in str(result)
    assert len(list((tmp_path / "arms").iterdir())) == 2 * (2 + 1)


def test_the_grid_may_be_searched_on_a_short_run(tmp_path) -> None:
    start = Counted()
    result = run(tmp_path, {"random": start}, learning_rates=[1e-5, 1e-2], search_steps=5, steps=10)
    assert result.arms[0].learning_rate == 1e-2
    assert result.arms[0].tokens == 10 * 8 * 16
    assert "on a run of 5 steps" in str(result)
    assert start.calls == 3


def test_what_was_run_is_not_run_again(tmp_path) -> None:
    first, second = Counted(), Counted()
    before = run(tmp_path, {"random": first}, steps=5)
    after = run(tmp_path, {"random": second, "new": fresh}, steps=5)
    assert (first.calls, second.calls) == (1, 0)
    assert before.arms[0] == after.arms[0]
    run(tmp_path, {"random": second}, steps=6)
    run(tmp_path, {"random": second}, steps=6, data=blocks(2))
    assert second.calls == 2


def test_arms_are_distilled_and_their_models_kept_if_asked(tmp_path, learned) -> None:
    result = run(tmp_path, {"random": fresh}, steps=5, teacher=learned, kd_weight=0.9, save_models=True)
    folder = result.arms[0].model_folder
    assert LlamaForCausalLM.from_pretrained(folder).config.hidden_size == 24
    assert "kd_loss" in (folder.parent / "metrics.jsonl").read_text()


def test_a_learning_rate_that_diverges_loses_and_all_of_them_is_an_error(tmp_path) -> None:
    settings = {"steps": 8, "max_grad_norm": 0.0, "log_every": 1}
    result = run(tmp_path / "a", {"random": fresh}, learning_rates=[1e30, 1e-2], **settings)
    assert result.arms[0].learning_rate == 1e-2
    with pytest.raises(DivergenceError):
        run(tmp_path / "b", {"random": fresh}, learning_rates=[1e30], **settings)
    with pytest.raises(DivergenceError, match="random diverges at every learning rate"):
        run(tmp_path / "c", {"random": fresh}, learning_rates=[1e30, 1e31], **settings)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seeds": []}, PlanError, r"seeds=\[\]; give at least one"),
        ({"learning_rates": [1.0, 1.0]}, PlanError, "each once"),
        ({"held_out": None}, DataError, "blocks came without held-out blocks"),
        ({"data": ["some text"]}, DataError, "text came without a tokenizer"),
        ({"steps": 0}, PlanError, "steps=0; at least 1"),
        ({"output": "full"}, OutputError, "exists and is not empty"),
    ],
)
def test_bad_requests_are_refused_before_work(tmp_path, changes, error, message) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    start = Counted()
    with pytest.raises(error, match=message):
        run(tmp_path / changes.pop("output", "new"), {"random": start}, **changes)
    assert start.calls == 0
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("loss", "tokens"), [(5.0, 0), (4.0, 0), (3.0, 50), (2.0, 100), (1.5, 250), (1.0, 400), (0.9, None)]
)
def test_tokens_to_a_loss_lie_on_the_line_between_evaluations(loss: float, tokens: float | None) -> None:
    assert tokens_to([(0, 4.0), (100, 2.0), (400, 1.0)], loss) == tokens


def test_the_table_tells_median_range_and_what_was_never_reached(tmp_path) -> None:
    def arm(method: str, seed: int, *losses: float) -> Arm:
        return Arm(method, seed, 0.1, [(100 * i, loss) for i, loss in enumerate(losses)], None, 1.0)

    result = Comparison(tmp_path, "random", "")
    result.arms += [arm("random", seed, 4.0, 3.0, 2.0) for seed in (0, 1, 2)]
    result.arms += [
        arm("good", 0, 3.0, 2.0, 1.0),
        arm("good", 1, 3.0, 1.0, 1.0),
        arm("good", 2, 2.0, 1.0, 1.0),
    ]
    result.arms += [arm("bad", 0, 4.0, 4.0, 3.0), arm("bad", 1, 4.0, 4.0, 3.0), arm("bad", 2, 4.0, 2.0, 2.0)]
    assert result.speed_ups("good") == [2.0, 4.0, math.inf]
    assert (result.speed_up("good"), result.speed_up("random"), result.speed_up("bad")) == (4.0, 1.0, None)
    good, bad = result.table().splitlines()[3:5]
    assert good.endswith("| 50 (0 to 100) | 4.00x (2.00x to at once) |")
    assert bad.endswith("| never (100 to never) | never (never to 2.00x) |")
    result.write()
