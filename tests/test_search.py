"""Sizes from a number of parameters: legal shapes only, counted exactly, the best by a score that can be checked."""

import json
import math

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_ws import AutoSubclone, Plan, calibrate
from hf_ws.derive import derive_config
from hf_ws.errors import CalibrationError, PlanError, SizeError
from hf_ws.layouts import certify
from hf_ws.layouts.census import census
from hf_ws.search import Goal, Space, nearest, parted, table
from hf_ws.sizes import sizes_of
from hf_ws.vocabulary import Vocabulary

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
}
TEXT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}

SOURCES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=61, n_positions=32, n_embd=48, n_layer=3, n_head=6, bos_token_id=0, eos_token_id=0
        )
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=61, d_model=48, d_ff=96, d_kv=8, num_heads=6, num_layers=4, num_decoder_layers=2)
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=61,
            d_model=48,
            encoder_ffn_dim=96,
            decoder_ffn_dim=64,
            encoder_attention_heads=6,
            decoder_attention_heads=6,
            encoder_layers=5,
            decoder_layers=5,
            max_position_embeddings=32,
        )
    ),
    "clip": lambda: CLIPModel(
        CLIPConfig(
            text_config=TEXT | {"vocab_size": 61, "eos_token_id": 2},
            vision_config=TEXT | {"image_size": 8, "patch_size": 4},
        )
    ),
}


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return SOURCES["llama"]()


def space(model, asked=None) -> Space:
    cls, config = type(model), model.config
    return Space(config, certify(cls, config), census(cls, config), asked or {}, {})


def ids(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 61, (rows, 16), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", SOURCES)
def test_every_shape_is_legal_and_has_the_parameters_that_the_model_has(family: str) -> None:
    """Against the class itself, built with the config that `derive_config` gives of the sizes."""
    source = SOURCES[family]()
    found = space(source).near(Goal(ratio=0.8))
    before = sizes_of(source.config)
    for shape in nearest(found, 6):
        config = derive_config(source.config, **shape.asked)
        made = type(source)(config)
        stored = {tensor.data_ptr(): tensor.numel() for tensor in made.state_dict().values()}  # ties once
        assert shape.parameters == sum(stored.values())
        assert {axis: sizes_of(config)[axis] for axis in shape.sizes} == shape.sizes
        assert all(size <= before[axis] for axis, size in shape.sizes.items())
        assert abs(math.log(shape.parameters / 0.8 / source.num_parameters())) <= math.log(1.1)


def test_an_encoder_and_its_decoder_shrink_in_proportion() -> None:
    shapes = space(SOURCES["t5"]()).near(Goal(ratio=0.4))
    depths = {(shape.asked["encoder.layers"], shape.asked["decoder.layers"]) for shape in shapes}
    assert depths <= {(1, 1), (2, 1), (3, 2), (4, 2)}


def test_heads_stay_whole_with_their_groups() -> None:
    for shape in space(SOURCES["llama"]()).near(Goal(ratio=0.5)):
        assert shape.sizes["head_dim"] == 6
        assert shape.sizes["heads"] <= 2 * shape.sizes["kv_heads"]


def test_without_data_the_nearest_is_taken(llama) -> None:
    plan = AutoSubclone.plan(llama, ratio=0.5)
    rows, chosen = plan.search["shapes"], plan.search["chosen"]
    wanted = round(llama.num_parameters() * 0.5)
    before = {"hidden": 48, "layers": 4, "ffn": 96}

    def apart(row) -> float:  # the rule as the documentation has it
        part = {name: row["sizes"][name] / before[name] for name in before}
        proportions = math.log(part["hidden"] / part["layers"]), math.log(part["ffn"] / part["hidden"])
        return 10 * abs(math.log(row["parameters"] / wanted)) + sum(map(abs, proportions))

    assert [row["distance"] for row in rows] == pytest.approx([apart(row) for row in rows], abs=1e-4)
    assert chosen == min(range(len(rows)), key=lambda i: apart(rows[i]))
    assert plan.parameters[1] == rows[chosen]["parameters"]
    assert plan.search["goal"] == "ratio=0.5"
    assert len(rows) > 2
    text = table(plan.search)
    assert f"*  {plan.parameters[1]:>10,}"[3:].strip() in text
    assert sum(line.startswith("*") for line in text.splitlines()) == 1


def test_sizes_that_are_given_hold(llama) -> None:
    plan = AutoSubclone.plan(llama, params=20_000, layers=2, kv_heads=2)
    assert (plan.target_sizes["layers"], plan.target_sizes["kv_heads"]) == (2, 2)
    assert all(row["sizes"]["layers"] == 2 for row in plan.search["shapes"])
    named = AutoSubclone.plan(llama, params=20_000, layer_policy=[0, 3])
    assert named.layers["layers"] == (0, 3)
    own = AutoSubclone.plan(llama, params=20_000, num_hidden_layers=2)
    assert own.target_sizes["layers"] == 2


def test_the_whole_is_the_source(llama) -> None:
    plan = AutoSubclone.plan(llama, ratio=1.0)
    assert plan.target_sizes == plan.source_sizes


def test_with_data_the_best_start_is_taken_on_what_it_has_not_seen(llama) -> None:
    """The losses are Transformers' own of models made by the sizes in the table."""
    data = ids(12)
    counted, kept = data[[i for i in range(12) if i % 4 != 3]], data[3::4]
    plan = AutoSubclone.plan(llama, params="20K", calibration=data)
    assert plan.is_settled
    assert len({row["sizes"]["layers"] for row in plan.search["shapes"]}) > 1
    scores = []
    for row in plan.search["shapes"]:
        model = AutoSubclone.from_pretrained(llama, calibration=counted, **row["sizes"])
        assert model.num_parameters() == row["parameters"]
        with torch.no_grad():
            scores.append(float(model(kept, labels=kept).loss))
    assert [row["score"] for row in plan.search["shapes"]] == pytest.approx(scores, abs=2e-5)
    assert plan.search["chosen"] == min(range(len(scores)), key=scores.__getitem__)
    again = AutoSubclone.from_pretrained(llama, params="20K", calibration=data)
    assert again.hf_ws_plan == plan
    best = AutoSubclone.from_pretrained(
        llama, calibration=counted, **plan.search["shapes"][plan.search["chosen"]]["sizes"]
    )
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), best.parameters(), strict=True))


def test_a_saved_plan_keeps_the_table(llama, tmp_path) -> None:
    plan = AutoSubclone.plan(llama, params="20K", calibration=ids(4))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["search"]["shapes"][0]["score"] > 0


def test_padding_and_labels_are_scored_as_the_model_scores_them(llama) -> None:
    rows = ids(8)
    mask = torch.ones_like(rows)
    mask[:, 10:] = 0
    batches = [{"input_ids": row[None], "attention_mask": m[None]} for row, m in zip(rows, mask, strict=True)]
    plan = AutoSubclone.plan(llama, params="20K", calibration=batches)
    labelled = [b | {"labels": b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)} for b in batches]
    other = AutoSubclone.plan(llama, params="20K", calibration=labelled)
    ours, theirs = ([row["score"] for row in p.search["shapes"]] for p in (plan, other))
    assert ours == pytest.approx(theirs, abs=2e-5)


def test_a_model_without_a_loss_of_its_own_is_compared_with_its_source() -> None:
    torch.manual_seed(0)
    bert = BertForMaskedLM(BertConfig(vocab_size=61, max_position_embeddings=32, **TEXT))
    plan = AutoSubclone.plan(bert, ratio=0.5, calibration=ids(8))
    assert "KL from the source" in plan.search["by"]
    row = plan.search["shapes"][0]
    kept = ids(8)[3::4]
    counted = ids(8)[[0, 1, 2, 4, 5, 6]]
    model = AutoSubclone.from_pretrained(bert, calibration=counted, **row["sizes"])
    with torch.no_grad():
        p, q = (one.eval()(kept).logits.double().log_softmax(-1) for one in (bert, model))
    assert row["score"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    with pytest.raises(PlanError, match="BertModel gives no logits"):
        AutoSubclone.plan(BertModel(bert.config), ratio=0.5, calibration=ids(8))


def test_an_unreachable_goal_names_what_can_be_reached(llama) -> None:
    with pytest.raises(
        SizeError, match=r"params=100: no shape .* within a tenth .* nearest reachable: "
    ) as told:
        AutoSubclone.plan(llama, params=100)
    reachable = int(str(told.value).split("nearest reachable: ")[1].split(" ")[0].replace(",", ""))
    assert AutoSubclone.plan(llama, params=reachable).parameters[1] == reachable
    with pytest.raises(SizeError, match=f"nearest reachable: {llama.num_parameters():,}"):
        AutoSubclone.plan(llama, params="1M")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"params": "125M", "ratio": 0.4}, "both given"),
        ({"params": "many"}, "params='many': wanted is a number of parameters"),
        ({"params": True}, "params=True"),
        ({"params": 0}, "params=0"),
        ({"ratio": 1.5}, r"ratio=1.5: wanted is a part of the source's parameters, above 0, up to 1"),
        ({"ratio": "half"}, "ratio='half'"),
        ({"ratio": 0.5, "hidden": 48, "layers": 4, "ffn": 96}, "none of them is open"),
        ({"ratio": 0.5, "heads": 3, "kv_heads": 2}, "no width below the source's goes with what is asked: "),
        ({"ratio": 0.5, "hiden": 3}, "did you mean 'hidden'"),
    ],
)
def test_a_goal_that_cannot_be_is_refused(llama, asked, message) -> None:
    with pytest.raises(PlanError, match=message):
        AutoSubclone.plan(llama, **asked)


def test_a_net_of_stages_is_refused_by_name() -> None:
    net = ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]))
    with pytest.raises(
        PlanError, match="ConvNextForImageClassification: a goal searches hidden, ffn and layers"
    ):
        AutoSubclone.plan(net, ratio=0.5)


def test_a_policy_that_looks_at_data_sees_what_is_not_scored_on(llama) -> None:
    plan = AutoSubclone.plan(llama, params="20K", calibration=ids(8), layer_policy="block_influence")
    sizes = plan.search["shapes"][plan.search["chosen"]]["sizes"]
    counted = ids(8)[[0, 1, 2, 4, 5, 6]]
    own = AutoSubclone.plan(llama, calibration=counted, layer_policy="block_influence", **sizes)
    assert own.layers == plan.layers


def test_evidence_cannot_score_a_start(llama) -> None:
    with pytest.raises(CalibrationError, match="params=20,000 scores starts on calibration data"):
        AutoSubclone.plan(llama, params="20K", calibration=calibrate(llama, ids(8)))


def test_a_chosen_vocabulary_counts_and_is_not_scored(llama) -> None:
    chosen = Vocabulary(tuple(range(0, 60, 2)), 61)
    plan = AutoSubclone.plan(llama, ratio=0.5, vocab=chosen)
    assert plan.target_sizes["vocab"] == 30
    assert plan.parameters[1] == plan.apply(llama).num_parameters()
    assert abs(math.log(plan.parameters[1] / 0.5 / llama.num_parameters())) <= math.log(1.1)
    with pytest.raises(PlanError, match=r"ratio=0\.5 scores starts on the source's token ids"):
        AutoSubclone.plan(llama, ratio=0.5, vocab=chosen, calibration=ids(8))


def test_one_sequence_is_too_little_to_count_and_to_score_on(llama) -> None:
    with pytest.raises(CalibrationError, match="one sequence in four to score on"):
        AutoSubclone.plan(llama, ratio=0.5, calibration=ids(1))
    counted, kept = parted([{"input_ids": ids(2)}])
    assert [len(part[0]["input_ids"]) for part in (counted, kept)] == [1, 1]


def test_sequences_of_one_batch_are_parted_with_all_that_is_theirs() -> None:
    rows = ids(11)
    batches = [
        {"input_ids": rows[:8], "labels": rows[:8] + 1},
        {"labels": rows[8:] + 1, "input_ids": rows[8:]},
    ]
    one, other = parted(batches)
    assert [len(batch["labels"]) for batch in one] == [8, 1]
    assert torch.equal(other[0]["input_ids"], rows[3::4])
    assert all(torch.equal(batch["labels"], batch["input_ids"] + 1) for batch in one + other)
    ragged = [{"input_ids": torch.zeros(2, n, dtype=torch.long)} for n in (3, 4, 5, 6)]
    assert parted(ragged) == (ragged[:3], ragged[3:])
    with pytest.raises(CalibrationError, match="keeps one batch in four"):
        parted([{"input_ids": ids(2), "grid": torch.zeros(3)}])


@pytest.mark.parametrize(
    ("said", "meant"),
    [("125M", 125 * 10**6), ("1.5b", 1_500_000_000), ("350k", 350_000), ("12_000", 12_000), (7, 7)],
)
def test_numbers_as_people_write_them(said, meant) -> None:
    assert Goal.of(said, None) == Goal(params=meant)
