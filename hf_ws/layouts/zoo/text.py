"""Miniatures of text models: see `hf_ws.layouts.zoo`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_ws.layouts.zoo.draw import Each, Open, floats, ids

_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}

_PAIRS = {"num_attention_heads": Each(18, 16), "num_key_value_heads": Each(6, 4)}
"""Heads that come in pairs, more than two of them to a key/value pair."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "dbrx": {  # what the class reads of it
        "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8, "kv_n_heads": 8},
        "ffn_config": {"moe_top_k": 2},
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},  # else it is no hybrid
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE | {"mrope_section": [24, 20, 20]}}},
}

FIELDS: dict[str, dict[str, Any]] = {
    "zaya": _PAIRS,
    "bailing_hybrid": {
        "linear_head_dim": Each(24, 16)
    },  # a field that its class computes, but does not enforce
    "bamba": {"attn_layer_indices": Open([9, 18, 27])},
    "codegen": {"num_attention_heads": Each(12, 8)},  # its heads come in fours
    "deepseek_v2": {"num_experts_per_tok": Open(2)},
    "diffllama": _PAIRS,
    "dots1": {"num_experts_per_tok": Open(2), "n_routed_experts": Open(8), "n_shared_experts": Open(1)},
    "esm": {"vocab_size": Open(33), "pad_token_id": Open(1), "mask_token_id": Open(32)},
    "hunyuan_vl_text": {"rope_parameters": Open(_ROPE)},
    "jamba": {
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "hrm_text": {"H_cycles": 2, "L_cycles": 1},
    "led": {"attention_window": 4},
    "canine": {"num_hash_buckets": 64},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "blt_local_encoder": {"hidden_size": Each(120, 144), "num_attention_heads": Each(10, 9)},
    "blt_local_decoder": {"num_attention_heads": Each(6, 12)},  # as wide as the encoder
    "bros": {"num_attention_heads": Each(8, 16)},  # hidden must be a multiple of 64
    "kyutai_speech_to_text": {"num_codebooks": 3},
    "zamba": {
        "n_mamba_heads": Each(8, 4),
        "hidden_size": Each(120, 240),
    },  # heads not as wide as hidden by chance
    "convbert": {"num_attention_heads": Each(12, 8)},  # half of them are convolutions
    "nllb-moe": {  # every second layer is sparse; experts have names
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "num_experts": lambda config: config.num_experts,
    },
    "switch_transformers": {  # the same
        "num_experts": lambda config: config.num_experts,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
    },
    "t5gemma": {  # a multiple of its heads, not the same in both miniatures
        "decoder.hidden_size": Each(150, 165),
        "decoder.num_attention_heads": Each(6, 15),
        "decoder.num_key_value_heads": Each(3, 5),
    },
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "xlstm": {
        "num_heads": Each(8, 4),
        "hidden_size": Each(256, 128),  # of which heads and ffn are fractions, rounded up to 64
        "qk_dim_factor": 1.5,
        "v_dim_factor": 2.5,
        "autocast_kernel_dtype": "float32",
        "chunk_size": 16,
    },
    "rwkv": {"attention_hidden_size": Each(110, 126)},  # may differ from hidden, and so shows
    "nemotron": {"num_key_value_heads": Open(8)},
    "ministral": {"head_dim": Open(128)},
    "hunyuan_v1_dense": {"head_dim": Open(128)},
    "hunyuan_v1_moe": {"head_dim": Open(128)},
    "cpmant": {"prompt_length": 4, "prompt_types": 5, "segment_types": 6, "position_bias_num_buckets": 40},
    "deepseek_v4": {
        "compress_rates": lambda config: dict.fromkeys(config.compress_rates, 2),
        "num_attention_heads": Each(15, 21),
        "o_groups": Each(5, 7),
        "o_lora_rank": 20,
    },
    "markuplm": {
        "max_xpath_tag_unit_embeddings": 20,
        "max_xpath_subs_unit_embeddings": 30,
        "tag_pad_id": 19,
        "subs_pad_id": 29,
        "xpath_unit_hidden_size": 6,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": Open(2),
        "indexer_kv_heads": Open(1),
        "indexer_head_dim": Open(256),
        "eos_token_id": Open(2),
        "indexer_budget": Open(4),
        "indexer_compress_ratio": Open(2),
        "ple_layer_ids": lambda config: config.ple_layer_ids or [1],
        "ple_embed_dim": Each(48, 60),
        "ngram_vocab_size_base": 40,
        "make_ngram_vocab_size_divisible_by": 2,
        "heads_per_ngram": 2,
        "split_ngram_parts": 2,
    },
    "lfm2_moe": {"layer_types": Open(["conv", "full_attention"] * 16)},
    "longformer": {"attention_window": 4},
    "pegasus_x": {"block_size": 4, "num_global_tokens": 3},
    "reformer": {
        "hidden_size": Each(135, 147),
        "axial_pos_embds_dim": Each((50, 85), (60, 87)),
        "axial_pos_shape": (8, 9),
        "max_position_embeddings": 72,
    },
    "mimo_v2_flash": {
        "num_attention_heads": Each(12, 8),
        "num_key_value_heads": Each(3, 2),
    },  # windows: twice
    "squeezebert": {
        "hidden_size": Each(240, 288),
        "embedding_size": Each(240, 288),
        "num_attention_heads": Each(20, 12),  # as many in each group
    },
    "xmod": {"default_language": Open("en_XX")},
}

TIGHT: dict[str, int] = {
    "helium": 1,  # its output projection is hidden x hidden
    "funnel": 1,  # positions are sine and cosine halves: hidden must be even
    "zamba": 1,  # its heads share twice the hidden units out among them
}


def _plain(model: PreTrainedModel) -> dict[str, Tensor]:
    text = ids(getattr(model.config, "vocab_size", 211))
    return {"input_ids": text, "attention_mask": torch.ones_like(text)}


def _softly_masked(model: PreTrainedModel) -> dict[str, Tensor]:
    """Characters, and a mask in float64: what a class derives from it shall not be narrower than its scores."""
    text = ids(211)
    return {"input_ids": text, "attention_mask": torch.ones(text.shape, dtype=torch.float64)}


def _one_for_all(model: PreTrainedModel) -> dict[str, Tensor]:
    """The first token attends to all others and they to it."""
    made = _plain(model)
    if model.config.is_encoder_decoder:
        made["decoder_input_ids"] = ids(model.config.vocab_size, seed=2)
    made["global_attention_mask"] = (torch.arange(9) == 0).long().expand(2, -1)
    return made


def _sentences(model: PreTrainedModel) -> dict[str, Tensor]:
    return _plain(model) | {"token_type_ids": (torch.arange(9) > 4).long().expand(2, -1)}


def _two_texts(model: PreTrainedModel) -> dict[str, Tensor]:
    config = model.config
    return {
        "input_ids": ids(config.encoder.vocab_size),
        "decoder_input_ids": ids(config.decoder.vocab_size, seed=2),
    }


def _boxes(model: PreTrainedModel) -> dict[str, Tensor]:
    corners = ids(30, 2, 9, 4, low=0).sort(dim=-1).values[..., [0, 1, 2, 3]]
    return _plain(model) | {"bbox": corners}


def _float_boxes(model: PreTrainedModel) -> dict[str, Tensor]:
    return _plain(model) | {"bbox": floats(2, 9, 4).sigmoid()}


def _entities(model: PreTrainedModel) -> dict[str, Tensor]:
    entities = ids(model.config.entity_vocab_size, 2, 3)
    positions = torch.tensor([[[1, 2, -1, -1], [3, -1, -1, -1], [5, 6, 7, -1]]] * 2)
    return _plain(model) | {
        "entity_ids": entities,
        "entity_attention_mask": torch.ones_like(entities),
        "entity_position_ids": positions,
        "entity_token_type_ids": torch.ones_like(entities),
    }


def _regions(model: PreTrainedModel) -> dict[str, Tensor]:
    seen = torch.ones(2, 4, dtype=torch.long)
    features = floats(2, 4, model.config.visual_embedding_dim)
    return _plain(model) | {
        "visual_embeds": features,
        "visual_attention_mask": seen,
        "visual_token_type_ids": seen,
    }


def _located_regions(model: PreTrainedModel) -> dict[str, Tensor]:
    features = floats(2, 4, model.config.visual_feat_dim)
    return _plain(model) | {"visual_feats": features, "visual_pos": floats(2, 4, 4).sigmoid()}


def _shapes_and_sounds(model: PreTrainedModel) -> dict[str, Tensor]:
    config = model.config
    return _plain(model) | {
        "input_shape_ids": ids(config.shape_vocab_size),
        "input_pronunciation_ids": ids(config.pronunciation_vocab_size),
    }


def _paths(model: PreTrainedModel) -> dict[str, Tensor]:
    depth = model.config.max_depth
    return _plain(model) | {
        "xpath_tags_seq": ids(20, 2, 9, depth, low=0),
        "xpath_subs_seq": ids(30, 2, 9, depth, low=0),
    }


def _cells(model: PreTrainedModel) -> dict[str, Tensor]:
    return _plain(model) | {"token_type_ids": ids(2, 2, 9, 7, low=0)}


def _proteins(model: PreTrainedModel) -> dict[str, Tensor]:
    vocab = model.config.protein_encoder_config.vocab_size
    protein = ids(vocab, 2, 7)
    return _plain(model) | {"protein_input_ids": protein, "protein_attention_mask": torch.ones_like(protein)}


def _frames(model: PreTrainedModel) -> dict[str, Tensor]:
    config = model.config
    audio = ids(config.codebook_vocab_size, 2, 9, config.num_codebooks)
    return {"input_ids": torch.cat([ids(config.vocab_size)[..., None], audio], dim=-1)}


def _codes(model: PreTrainedModel) -> dict[str, Tensor]:
    config = model.config
    return {"input_ids": ids(config.vocab_size, 2 * config.num_codebooks, 9)}


def _codes_and_states(model: PreTrainedModel) -> dict[str, Tensor]:
    return _codes(model) | {"encoder_hidden_states": floats(2, 5, model.config.hidden_size)}


INPUTS: dict[str, Callable[[PreTrainedModel], Mapping[str, Tensor]]] = {
    "blt": _plain,
    "bros": _float_boxes,
    "canine": _softly_masked,
    "encoder-decoder": _two_texts,
    "evolla": _proteins,
    "kyutai_speech_to_text": _frames,
    "layoutlm": _boxes,
    "led": _one_for_all,
    "lilt": _boxes,
    "longformer": _one_for_all,
    "luke": _entities,
    "lxmert": _located_regions,
    "markuplm": _paths,
    "musicgen_decoder": _codes_and_states,
    "musicgen_melody_decoder": _codes,
    "roc_bert": _shapes_and_sounds,
    "tapas": _cells,
    "visual_bert": _regions,
    "xlnet": _sentences,
}
