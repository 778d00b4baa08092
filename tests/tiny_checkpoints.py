"""Tiny random checkpoints, and ways to damage them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from hf_ws.store.shards import INDEX, SINGLE

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def llama(**fields: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **fields}))


def gpt2() -> GPT2Config:
    return GPT2Config(
        vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )


def bert() -> BertConfig:
    return BertConfig(
        vocab_size=61,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2))


def without_prefix(folder: Path) -> Path:
    save(GPT2LMHeadModel(gpt2()), folder)
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(folder / SINGLE).items()}
    # The oldest checkpoints also carry the causal mask, which the class ignores.
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


# Saved as Transformers saves them: plain, sharded, tied, with old names, converted on the way in.
MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: save(llama(), folder),
    "llama_bf16": lambda folder: save(llama().bfloat16(), folder),
    "llama_sharded": lambda folder: save(llama(), folder, max_shard_size="20KB"),
    "llama_tied": lambda folder: save(llama(tie_word_embeddings=True), folder),
    "gpt2": lambda folder: save(GPT2LMHeadModel(gpt2()), folder),
    "gpt2_without_prefix": without_prefix,
    "bert": lambda folder: save(BertForMaskedLM(bert()), folder),
    "mixtral": lambda folder: save(mixtral(), folder),
}


def edit_config(folder: Path, **fields: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make(name: str, folder: Path) -> Path:
    """Save one of MODELS below `folder`, the same weights each time, and return where."""
    torch.manual_seed(0)
    return MODELS[name](folder / name)
