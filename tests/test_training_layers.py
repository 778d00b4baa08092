"""Rates by layer, the preset for inherited starts, recomputed activations and compiled layers."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_ws.errors import PlanError
from hf_ws.training import TrainConfig, config_from_flags, layers, train
from hf_ws.training.blocks import Lora
from hf_ws.training.job import prepare
from hf_ws.training.objective import Objective
from hf_ws.training.run_folder import read_metrics

ROWS = torch.arange(24 * 16).view(24, 16) * 7 % 61
SHORT = TrainConfig(steps=3, batch_size=2, learning_rate=1e-2, log_every=1, progress=False)
SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
POSITIONS = {"max_position_embeddings": 32}


def llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SMALL | POSITIONS | {"num_hidden_layers": 3} | changes)).eval()


def bart() -> BartForConditionalGeneration:
    sizes = {"vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 48}
    sizes |= {"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    ids = {
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }
    return BartForConditionalGeneration(BartConfig(**sizes, **ids, max_position_embeddings=32)).eval()


def t5() -> T5ForConditionalGeneration:
    sizes = {
        "vocab_size": 61,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
    }
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes, **ids)).eval()


def gpt2() -> GPT2LMHeadModel:
    sizes = {"vocab_size": 61, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def bert() -> BertForMaskedLM:
    return BertForMaskedLM(BertConfig(**SMALL | POSITIONS | {"num_hidden_layers": 3})).eval()


PAIR = {"input_ids": ROWS[:1], "decoder_input_ids": ROWS[:1]}
# By hand: how many steps each parameter is from the end.
EXPECTED = {
    llama: {"model.embed_tokens.weight": 4, "model.layers.0.": 3, "model.layers.1.": 2, "model.layers.2.": 1,
            "model.norm.weight": 0, "lm_head.weight": 0},
    gpt2: {"transformer.wte.": 4, "transformer.wpe.": 4, "transformer.h.0.": 3, "transformer.h.1.": 2,
           "transformer.h.2.": 1, "transformer.ln_f.": 0},
    bert: {"bert.embeddings.": 4, "bert.encoder.layer.0.": 3, "bert.encoder.layer.1.": 2, "bert.encoder.layer.2.": 1,
           "cls.": 0},
    bart: {"model.shared.": 4, "model.encoder.embed_positions.": 3, "model.encoder.layernorm_embedding.": 3,
           "model.encoder.layers.0.": 2, "model.encoder.layers.1.": 1, "model.decoder.embed_positions.": 4,
           "model.decoder.layernorm_embedding.": 4, "model.decoder.layers.0.": 3, "model.decoder.layers.1.": 2,
           "model.decoder.layers.2.": 1},
    t5: {"shared.": 4, "encoder.block.0.": 2, "encoder.block.1.": 1, "encoder.final_layer_norm.": 0,
         "decoder.block.0.": 3, "decoder.block.1.": 2, "decoder.block.2.": 1, "decoder.final_layer_norm.": 0,
         "lm_head.": 0},
}  # fmt: skip


@pytest.mark.parametrize("make", EXPECTED, ids=lambda make: make.__name__)
def test_rates_fall_towards_the_input(make) -> None:
    model = make()
    rates = layers.rates(
        model, PAIR if make in (bart, t5) else {"input_ids": ROWS[:1], "labels": ROWS[:1]}, 0.5
    )
    assert rates.keys() == {name for name, _ in model.named_parameters()}
    for name, rate in rates.items():
        away = [steps for start, steps in EXPECTED[make].items() if name.startswith(start)]
        assert [rate] == [0.5**steps for steps in away], name


def updates(model: PreTrainedModel, **changes) -> dict[str, float]:
    """How far the first step of Adam moves each parameter: its rate, wherever there is a gradient."""
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    config = replace(SHORT, steps=1, weight_decay=0.0, warmup_steps=0, schedule="constant", max_grad_norm=0.0)
    train(replace(config, adam_epsilon=1e-30, **changes), model=model, train_blocks=ROWS)
    return {
        name: float((tensor.detach() - before[name]).abs().max()) for name, tensor in model.named_parameters()
    }


def test_every_layer_moves_at_its_rate() -> None:
    moved = updates(llama(), layer_lr_decay=0.5)
    for name, far in moved.items():
        away = next(steps for start, steps in EXPECTED[llama].items() if name.startswith(start))
        assert far == pytest.approx(1e-2 * 0.5**away, rel=1e-3), name
    assert list(updates(llama()).values()) == pytest.approx([1e-2] * len(moved), rel=1e-3)


def test_rates_by_layer_are_resumed_and_logged(tmp_path) -> None:
    config = replace(SHORT, layer_lr_decay=0.5, save_every=1, keep_checkpoints=3)
    for run in ("whole", "run"):
        train(
            replace(config, output=str(tmp_path / run), save_model=run == "whole"),
            model=llama(),
            train_blocks=ROWS,
        )
    (tmp_path / "run" / "checkpoint-3" / "whole.json").unlink()
    train(replace(config, output=str(tmp_path / "run"), resume=True), model=llama(), train_blocks=ROWS)
    one, other = ((tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("run", "whole"))
    assert one == other
    plain = train(replace(SHORT), model=llama(), train_blocks=ROWS)
    logged = [row["learning_rate"] for row in read_metrics(tmp_path / "run")]
    assert logged == [row["learning_rate"] for row in plain.rows]


def test_adapters_have_the_rate_of_their_layer() -> None:
    made = prepare(replace(SHORT, lora=Lora(r=2)), model=llama(), train_blocks=ROWS)
    from hf_ws.training.adapters import wrapped

    wrapped(made)
    rates = layers.rates(made.model, {"input_ids": ROWS[:1]}, 0.5)
    assert rates["model.layers.1.mlp.up_proj.lora_A.default.weight"] == 0.25


def test_a_preset_fills_what_was_not_given(tmp_path) -> None:
    config = TrainConfig(steps=1, preset="inherited")
    assert (config.learning_rate, config.weight_decay, config.schedule) == (1e-4, 1e-3, "cosine")
    given = TrainConfig(steps=1, preset="inherited", learning_rate=3e-4)  # the default, and meant
    assert (given.learning_rate, given.weight_decay) == (3e-4, 1e-3)
    assert replace(given, weight_decay=0.5).weight_decay == 0.5
    assert TrainConfig(steps=1).weight_decay == 0.1
    file = tmp_path / "x.yaml"
    file.write_text("steps: 1\nweight_decay: 0.1\npreset: inherited\n")
    read = config_from_flags(["--config", str(file), "--schedule", "constant"], "about")
    assert (read.learning_rate, read.weight_decay, read.schedule) == (1e-4, 0.1, "constant")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_lr_decay": 0.0}, "layer_lr_decay=0.0; above 0, up to 1"),
        ({"layer_lr_decay": 1.5}, "layer_lr_decay=1.5; above 0, up to 1"),
        ({"preset": "inherit"}, "preset='inherit'; allowed: inherited or nothing"),
        ({"compile": True, "kd_losses": {"attention_relation": 1.0}}, "compile and attention_relation"),
    ],
)
def test_bad_settings_are_listed(settings: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        TrainConfig(steps=1, **settings)


STATES = {"forward_kl": 1.0, "hidden_mse": 0.5, "attention_relation": 0.5}


def test_recomputed_activations_change_nothing() -> None:
    """Nor do they lose the gradient of states that are looked at inside a layer."""
    batch = {"input_ids": ROWS[:2], "labels": ROWS[:2]}
    config, grads = replace(SHORT, kd_losses=STATES), []
    for recomputes in (False, True):
        student, teacher = llama(), llama(1)
        if recomputes:
            student.activation_checkpointing_enable({"use_reentrant": False})
        student.train()
        loss, *_ = Objective(config, student, teacher, batch=batch)(student, batch, progress=0.0)
        loss.backward()
        grads.append([parameter.grad for parameter in student.parameters()])
    assert all(torch.allclose(one, other, atol=1e-7) for one, other in zip(*grads, strict=True))
    ran = [0]
    model = llama()
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: ran.__setitem__(0, ran[0] + 1))
    runs = {}
    for flag in (False, True):
        ran[0] = 0
        train(replace(SHORT, gradient_checkpointing=flag), model=model, train_blocks=ROWS)
        runs[flag] = ran[0]
    assert runs[True] == runs[False] + SHORT.steps
    plain, again = (
        train(replace(SHORT, gradient_checkpointing=flag, lora=lora), model=llama(), train_blocks=ROWS).rows
        for flag, lora in ((False, Lora(r=2)), (True, Lora(r=2)))
    )
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in plain], abs=1e-6)


@pytest.mark.filterwarnings("ignore")  # of torch's own, on the way
def test_compiled_layers_compute_the_same_from_one_graph(monkeypatch) -> None:
    """With a teacher whose states are compared between the layers. Graphs are run as they were caught: no C++."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = replace(SHORT, steps=2, kd_losses={"forward_kl": 1.0, "hidden_mse": 0.5})
    plain, fast = (
        train(replace(config, compile=flag), model=llama(), teacher=llama(1), train_blocks=ROWS)
        for flag in (False, True)
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert [row["loss"] for row in fast.rows] == pytest.approx([row["loss"] for row in plain.rows], abs=1e-4)
