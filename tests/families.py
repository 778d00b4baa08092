"""A tiny random model of every family that the laws are tested on."""

from __future__ import annotations

from functools import cache

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

DECODERS = [
    *("gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "bloom", "falcon", "mpt", "codegen"),
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo", "olmo2"),
    *("stablelm", "starcoder2", "cohere", "granite", "smollm3", "mixtral", "qwen3_moe"),
]
ENCODERS = ["bert", "roberta", "distilbert", "electra"]
VARIANTS = {
    "falcon_40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4}),
    "falcon_1b": ("falcon", {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}),
    "opt_350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "gpt2_untied": ("gpt2", {"tie_word_embeddings": False}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen3_moe_mixed": ("qwen3_moe", {"decoder_sparse_step": 2}),
}
"""The same class with other flags, where the flags change how parameters lie."""

FAMILIES = [*DECODERS, *VARIANTS, *ENCODERS]

VOCAB, LAYERS = 160, 4

# Every spelling of every size, in one heap; a config takes those it has.
_SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 8),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim"), 96),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "word_embed_proj_dim": 64,
    "embedding_size": 24,
    "moe_intermediate_size": 48,
    "num_local_experts": 6,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "rotary_dim": 4,
    "sliding_window": 8,
    "window_size": 8,
    "max_window_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "query_pre_attn_scalar": 16,
}


@cache
def _defaults(model_type: str) -> dict:
    return CONFIG_MAPPING[model_type]().to_dict()


def config(family: str, **changes: object) -> PreTrainedConfig:
    """The tiny config of a family."""
    model_type, flags = VARIANTS.get(family, (family, {}))
    values = {
        name: size for name, size in _SIZES.items() if _defaults(model_type).get(name, "absent") != "absent"
    }
    if model_type in ("phi", "stablelm", "gpt_neox"):
        values["hidden_size"] = 128  # a quarter or half of each head turns: heads of 16
    if model_type == "gpt_neo":
        values["attention_types"] = [[["global", "local"], LAYERS // 2]]
    if model_type == "falcon":
        values["ffn_hidden_size"] = 96
    return CONFIG_MAPPING[model_type](**(values | flags | changes))


def model_class(family: str) -> type[PreTrainedModel]:
    """The class with the language-model head."""
    mapping = MODEL_FOR_MASKED_LM_MAPPING if family in ENCODERS else MODEL_FOR_CAUSAL_LM_MAPPING
    return mapping[type(config(family))]


def model(family: str, **changes: object) -> PreTrainedModel:
    """A random model in which every parameter counts, gains and biases too."""
    torch.manual_seed(1)
    made = model_class(family)(config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2 if parameter.ndim < 2 else 0.1)
    return made


def tokens(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, length] without special ones."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(made: PreTrainedModel, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Logits in float64 arithmetic wherever the class allows."""
    ids = tokens() if ids is None else ids
    made.config._experts_implementation = "eager"  # the grouped product has no float64
    return made.double()(input_ids=ids, attention_mask=torch.ones_like(ids), **_no_cache(made)).logits


def _no_cache(made: PreTrainedModel) -> dict[str, bool]:
    return {"use_cache": False} if made.can_generate() else {}
