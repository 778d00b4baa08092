"""Adapters: nothing changes until they are trained, then only they do; saved, merged and resumed as other weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from hf_ws import AutoSubclone
from hf_ws.errors import PlanError
from hf_ws.plan import Plan
from hf_ws.training import TrainConfig, train
from hf_ws.training.adapters import merged, merged_apart, wrapped
from hf_ws.training.blocks import Lora
from hf_ws.training.job import Job, prepare
from hf_ws.training.objective import Objective

# peft asks Transformers by a name that is about to go.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ROWS = torch.arange(24 * 16).view(24, 16) * 7 % 61
LORA = Lora(r=2, alpha=8.0)
SHORT = TrainConfig(steps=4, batch_size=2, learning_rate=1e-2, log_every=1, progress=False, lora=LORA)


def llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {
        "vocab_size": 61,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61,
        "n_positions": 32,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": 0.2,
    }
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **drop, bos_token_id=0, eos_token_id=0)).eval()


def job(config: TrainConfig, model: PreTrainedModel) -> Job:
    return prepare(config, model=model, train_blocks=ROWS)


def copies(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


STATES = {"forward_kl": 1.0, "hidden_mse": 0.5, "hidden_cosine": 0.5, "attention_relation": 0.5}


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_loss_is_that_of_the_unwrapped_student_at_the_start(make) -> None:
    """Every part of it, with a teacher of another size; and no logits are made whole for its sake."""
    teacher = make()
    student = AutoSubclone.from_pretrained(teacher, hidden=16, heads=2, layers=2).float()
    plan, batch = student.hf_ws_plan, {"input_ids": ROWS[:2], "labels": ROWS[:2]}
    config = replace(SHORT, kd_weight=0.5, kd_losses=STATES)
    plain, parts, _ = Objective(config, student, teacher, plan, batch=batch)(student, batch, progress=0.0)
    adapted = wrapped(job(config, student))
    objective = Objective(config, student, teacher, plan, batch=batch)
    assert objective.apart
    loss, adapted_parts, _ = objective(adapted, batch, progress=0.0)
    assert torch.equal(loss, plain)
    assert parts.keys() == adapted_parts.keys() >= {"hidden_mse", "attention_relation"}
    loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    for (
        name,
        module,
    ) in student.named_modules():  # the last thing anything of theirs flows through is the head
        if "lora_B" in name and isinstance(module, nn.Linear):
            assert module.weight.grad.any(), name


@pytest.mark.parametrize("make", [llama, gpt2])
def test_only_adapters_are_trained_and_merging_changes_nothing(make, tmp_path) -> None:
    model, run = make(), tmp_path / "run"
    before = copies(model)
    config = replace(SHORT, steps=20, learning_rate=3e-2, output=str(run), lora=replace(LORA, merge=True))
    history = train(config, model=model, train_blocks=ROWS, eval_blocks=ROWS[:4])
    assert history.final_loss < history.evaluations[0][1] - 0.1
    assert history.model_folder == run / "model"
    stock, found = type(model).from_pretrained(run / "model", output_loading_info=True)
    assert not any(found.values())
    assert same(stock.state_dict(), model.state_dict())  # the live model is merged too, and stock again
    base = make()
    assert same(base.state_dict(), before)
    apart = PeftModel.from_pretrained(base, run / "adapter").eval()
    assert all(torch.equal(before[name], after) for name, after in make().state_dict().items())
    with torch.no_grad():
        assert torch.allclose(apart(ROWS[:3]).logits, stock(ROWS[:3]).logits, atol=1e-5)
    changed = {name for name, tensor in stock.state_dict().items() if not torch.equal(tensor, before[name])}
    linear = {
        f"{name}.weight" for name, one in make().named_modules()
        if type(one).__name__ in ("Linear", "Conv1D") and name != "lm_head"
    }  # fmt: skip
    assert changed == linear


def test_merged_weights_are_the_formulas() -> None:
    """W + (alpha / r) B A, written out."""
    made = job(SHORT, llama())
    before = copies(made.model)
    adapted = wrapped(made)
    name = "model.layers.1.mlp.up_proj"
    module = made.model.get_submodule(name)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        delta = 8.0 / 2 * module.lora_B["default"].weight @ module.lora_A["default"].weight
    assert torch.allclose(
        merged(adapted).get_submodule(name).weight, before[f"{name}.weight"] + delta, atol=1e-5
    )


@pytest.mark.parametrize("make", [llama, gpt2, lambda: llama(tie_word_embeddings=True)])
def test_weights_gathered_from_processes_are_merged_alike(make, tmp_path) -> None:
    """Into a model of its own, ties kept: what a student split over processes is saved as."""
    made = job(SHORT, make())
    adapted = wrapped(made)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    apart = merged_apart(made, copies(adapted))
    assert any("lora_" in name for name, _ in made.model.named_parameters())
    apart.save_pretrained(tmp_path)
    stock, found = type(apart).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert same(stock.state_dict(), merged(adapted).state_dict())


def test_what_an_adapter_belongs_to_is_recorded(tmp_path) -> None:
    llama().save_pretrained(tmp_path / "source")
    asked = {"source": str(tmp_path / "source"), "hidden": 16, "heads": 2, "calibration": 4}
    run = tmp_path / "run"
    config = replace(SHORT, output=str(run), subclone=asked, kd_weight=0.0)
    history = train(config, train_blocks=ROWS)
    assert history.model_folder == run / "adapter"
    assert not (run / "model").exists()
    record = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == str(run / "start")
    assert Plan.load(run / "adapter" / "hf_ws_plan.json") == Plan.load(run / "start" / "hf_ws_plan.json")
    start = AutoModelForCausalLM.from_pretrained(record["base_model_name_or_path"], dtype=torch.float32)
    expected = AutoSubclone.from_pretrained(
        tmp_path / "source", hidden=16, heads=2, dtype="float32", calibration=ROWS[[0, 6, 12, 18]]
    )
    assert same(start.state_dict(), expected.state_dict())
    assert PeftModel.from_pretrained(start, run / "adapter").active_adapters == ["default"]

    again = train(replace(config, resume=True), train_blocks=ROWS)  # finished: the adapters are put in place
    assert again.model_folder == run / "adapter"


@pytest.mark.parametrize("merge", [False, True])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path, merge) -> None:
    lora = replace(LORA, merge=merge, dropout=0.2)
    config = replace(SHORT, lora=lora, save_every=2, keep_checkpoints=3)
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(replace(config, output=str(whole)), model=llama(attention_dropout=0.1), train_blocks=ROWS)
    shutil.copytree(whole, run)
    for name in ("checkpoint-4", "model"):  # as if it had been killed after the adapter was written
        shutil.rmtree(run / name, ignore_errors=True)
    if not merge:
        shutil.rmtree(run / "adapter")
    model = llama(attention_dropout=0.1)
    train(replace(config, output=str(run), resume=True), model=model, train_blocks=ROWS)
    for file in ("adapter/adapter_model.safetensors", *(["model/model.safetensors"] if merge else [])):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file
    rows = [
        [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
        for one in (run, whole)
    ]
    ours, theirs = ([{k: v for k, v in row.items() if k != "seconds"} for row in one] for one in rows)
    assert ours == theirs

    done = llama(attention_dropout=0.1)
    train(replace(config, output=str(run), resume=True), model=done, train_blocks=ROWS)
    with torch.no_grad():
        assert torch.equal(done(ROWS[:2]).logits, model(ROWS[:2]).logits)


@pytest.mark.parametrize(
    ("lora", "model", "message"),
    [
        (
            {"targets": ["q_proj", "k_porj"]},
            llama,
            r"'k_porj', which is no linear .* did you mean 'k_proj'\?; it has",
        ),
        ({"targets": "embed_tokens"}, llama, "'embed_tokens', which is no linear module"),
        ({"targets": "lm_head"}, gpt2, "the head, whose weight is the embedding's too"),
        ({"targets": "layers.7.mlp.up_proj"}, llama, r"'layers.7.mlp.up_proj', which is no linear module"),
    ],
)
def test_unknown_targets_are_refused_by_name(tmp_path, lora, model, message) -> None:
    with pytest.raises(PlanError, match=message):
        train(
            replace(SHORT, lora=Lora(**lora), output=str(tmp_path / "run")), model=model(), train_blocks=ROWS
        )
    assert not (tmp_path / "run").exists()


def test_deepspeed_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(
        PlanError, match=r"lora under DeepSpeed: .* launch with recipes/accelerate/fsdp2.yaml"
    ):
        job(SHORT, llama())


def test_a_model_with_adapters_is_refused() -> None:
    made = job(SHORT, llama())
    wrapped(made)
    with pytest.raises(PlanError, match="has adapters already; merge them first"):
        train(SHORT, model=made.model, train_blocks=ROWS)


def test_named_targets_get_adapters_and_no_others() -> None:
    made = job(replace(SHORT, lora=Lora(r=2, targets=["q_proj", "layers.0.mlp.up_proj"])), llama())
    adapted = wrapped(made)
    names = {
        name.split(".lora_")[0].removeprefix("base_model.model.")
        for name, p in adapted.named_parameters()
        if p.requires_grad
    }
    assert names == {*(f"model.layers.{i}.self_attn.q_proj" for i in range(3)), "model.layers.0.mlp.up_proj"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"lora.r=0; at least 1"),
        ({"alpha": 0.0, "dropout": 1.0}, r"lora.alpha=0.0; above 0; and lora.dropout=1.0; from 0 to below 1"),
        ({"targets": []}, r"lora.targets=\[\]; all-linear, or names"),
        ({"rank": 4}, "unknown key 'lora.rank'"),
    ],
)
def test_bad_settings_are_listed(settings: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        TrainConfig(steps=1, lora=settings)


def test_the_record_of_a_live_model_names_no_base(tmp_path) -> None:
    run = tmp_path / "run"
    train(replace(SHORT, output=str(run)), model=llama(), train_blocks=ROWS)
    assert not json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(run / "adapter" / "adapter_model.safetensors").is_file()
