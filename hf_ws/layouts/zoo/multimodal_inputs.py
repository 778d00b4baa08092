"""What miniatures of multimodal models are called with: see `hf_ws.layouts.zoo`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_ws.layouts.zoo.draw import floats
from hf_ws.layouts.zoo.media import media_and_text, noise, words


def _patches(model: PreTrainedModel) -> dict[str, Tensor]:
    """Fuyu takes an image as the rows of its patches."""
    config = model.config
    return media_and_text(model, pixel_values=noise(2, 4, config.num_channels * config.patch_size**2))


def _square_patches(model: PreTrainedModel) -> dict[str, Tensor]:
    patch = model.config.vision_config.patch_size
    return media_and_text(model, pixel_values=noise(32, 3, patch, patch))


def _two_resolutions(model: PreTrainedModel) -> dict[str, Tensor]:
    side = model.config.high_res_vision_config.image_size
    return media_and_text(model, high_res_pixel_values=noise(2, 3, side, side))


def _question(model: PreTrainedModel) -> dict[str, Tensor]:
    """A question to the Q-Former besides the text."""
    config, many = model.config, model.config.num_query_tokens
    side, video = config.vision_config.image_size, config.model_type == "instructblipvideo"
    question = words(config.qformer_config, [])
    asked = {"qformer_input_ids": question, "qformer_attention_mask": torch.ones_like(question)}
    made = media_and_text(model, pixel_values=noise(2, *([2] if video else []), 3, side, side), **asked)
    made["input_ids"] = words(config, [(5, 2 * many if video else many)])
    made["attention_mask"] = torch.ones_like(made["input_ids"])
    return made


def _queries(model: PreTrainedModel) -> dict[str, Tensor]:
    config = model.config
    return {
        "query_embeds": noise(2, 4, config.hidden_size),
        "encoder_hidden_states": noise(2, 5, config.encoder_hidden_size, seed=2),
    }


def _tiled(model: PreTrainedModel) -> dict[str, Tensor]:
    """Mllama: the text attends to tiles of an image."""
    node = model.config.vision_config
    tiles = node.max_num_tiles
    made = media_and_text(
        model,
        pixel_values=noise(2, 1, tiles, node.num_channels, node.image_size, node.image_size),
        aspect_ratio_ids=torch.tensor([[1], [2]]),
        aspect_ratio_mask=torch.ones(2, 1, tiles, dtype=torch.long),
    )
    made["cross_attention_mask"] = torch.ones(*made["input_ids"].shape, 1, tiles, dtype=torch.long)
    return made


def _trajectory(model: PreTrainedModel) -> dict[str, Tensor]:
    config = model.config
    return {
        "states": noise(2, 5, config.state_dim),
        "actions": noise(2, 5, config.act_dim, seed=2),
        "rewards": noise(2, 5, 1, seed=3),
        "returns_to_go": noise(2, 5, 1, seed=4),
        "timesteps": torch.arange(5).repeat(2, 1),
        "attention_mask": torch.ones(2, 5),
    }


def _places_in_text(model: PreTrainedModel) -> dict[str, Tensor]:
    """Kosmos-2 marks the places of the image's features."""
    made = media_and_text(model)
    mask = torch.zeros_like(made["input_ids"])
    mask[:, 1 : 1 + model.config.latent_query_num] = 1
    return made | {"image_embeds_position_mask": mask}


def _page(model: PreTrainedModel) -> dict[str, Tensor]:
    """Words with their boxes on a page, and the page."""
    side = model.config.input_size
    made = media_and_text(model, pixel_values=noise(2, 3, side, side))
    corner = torch.arange(made["input_ids"].shape[1]).repeat(2, 1)
    return made | {"bbox": torch.stack([corner, corner + 1, corner + 3, corner + 2], dim=-1)}


def _merged_patches(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inkling 2 takes pixels channels last, so many patches a side at once."""
    node = model.config.vision_config
    side = node.spatial_merge_size * node.patch_size
    return media_and_text(model, pixel_values=noise(32, side, side, node.num_channels))


def _one_row(model: PreTrainedModel) -> dict[str, Tensor]:
    """MiniCPM-V lays the patches of all images in a row."""
    patch = model.config.vision_config.patch_size
    return media_and_text(
        model, pixel_values=noise(1, 3, patch, 32 * patch), target_sizes=torch.tensor([[4, 4]] * 2)
    )


def _flat_patches(model: PreTrainedModel) -> dict[str, Tensor]:
    return media_and_text(model, pixel_values=noise(8, 3 * model.config.patch_size**2))


def _several(model: PreTrainedModel) -> dict[str, Tensor]:
    """Idefics: each word says which of the images it sees."""
    side = model.config.vision_config.image_size
    made = media_and_text(model, pixel_values=noise(2, 1, 3, side, side))
    return made | {"image_attention_mask": torch.ones(*made["input_ids"].shape, 1, dtype=torch.long)}


def _pooled(model: PreTrainedModel) -> dict[str, Tensor]:
    """Molmo 2: which four patches make a word, for an image and for no tiles of it."""
    node = model.config.vision_config
    pixels = noise(2, 1, 16, 3 * node.patch_size**2)
    corners = torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])
    return media_and_text(
        model,
        pixel_values=pixels,
        image_token_pooling=torch.cat([corners, 16 + corners]),
        image_grids=torch.tensor([[2, 2, 0, 0]] * 2),
        image_num_crops=torch.ones(2, dtype=torch.long),
    )


def _rows_and_columns(model: PreTrainedModel) -> dict[str, Tensor]:
    """Pix2Struct's patches say first in which row and column they stand."""
    node = model.config.vision_config
    at = torch.stack([torch.arange(9) // 3 + 1, torch.arange(9) % 3 + 1], dim=-1).repeat(2, 1, 1)
    made = torch.cat([at.double(), noise(2, 9, node.patch_embed_hidden_size)], dim=-1)
    return {"flattened_patches": made, "decoder_input_ids": words(model.config, [])}


def _tiles_of_pages(model: PreTrainedModel) -> dict[str, Tensor]:
    """Granite Docling: one tile of each page, none of it padding."""
    side = model.config.vision_config.image_size
    mask = torch.ones(2, 1, dtype=torch.bool)
    return media_and_text(model, pixel_values=noise(2, 1, 3, side, side), pixel_attention_mask=mask)


def _stacked_tiles(model: PreTrainedModel) -> dict[str, Tensor]:
    """Granite 4 Vision: places for the features that each of several layers of the text part gets."""
    made = media_and_text(model)
    features = model.model.get_image_features(made["pixel_values"], made["image_sizes"]).deepstack_features
    made["input_ids"] = words(model.config, [(model.config.image_token_index, features[0][1][0].shape[0])])
    return made | {"attention_mask": torch.ones_like(made["input_ids"])}


def _patches_by_row(model: PreTrainedModel) -> dict[str, Tensor]:
    """Nemotron Omni: the patches of all images, and how many rows and columns of them each has."""
    patch = model.vision_model.patch_size
    pixels, grid = noise(2 * 16, 3 * patch**2), torch.tensor([[4, 4]] * 2)
    text = words(model.config, [(model.config.image_token_id, 4)])  # four patches to a word
    return {"input_ids": text, "pixel_values": pixels, "image_grid_hw": grid}


def _captioned(model: PreTrainedModel) -> dict[str, Tensor]:
    """A vision encoder and a text decoder, each of its own family."""
    node = model.config.encoder
    return {
        "pixel_values": noise(2, node.num_channels, node.image_size, node.image_size),
        "decoder_input_ids": words(model.config, []),
    }


def _boxed(model: PreTrainedModel) -> dict[str, Tensor]:
    """UDOP: where each word stands in the picture, between zero and one."""
    side, text = model.config.image_size, words(model.config, [])
    boxes = floats(*text.shape, 4).sigmoid().sort(dim=-1).values
    return {
        "input_ids": text,
        "bbox": boxes,
        "pixel_values": noise(2, 3, side, side),
        "decoder_input_ids": text,
    }


def _film(model: PreTrainedModel) -> dict[str, Tensor]:
    """TVP: a film and what to look for in it; it does not bear two."""
    side = model.config.max_img_size
    return {
        "input_ids": words(model.config, [])[:1],
        "pixel_values": noise(1, model.config.num_frames, 3, side, side),
    }


def _captioned_film(model: PreTrainedModel) -> dict[str, Tensor]:
    node = model.config.vision_config
    film = noise(2, node.num_frames, 3, node.image_size, node.image_size)
    return {"input_ids": words(model.config, []), "pixel_values_videos": film}


def _merged_by_image(model: PreTrainedModel) -> dict[str, Tensor]:
    """VideoLLaMA 3: each image says how many of its patches go together."""
    return media_and_text(model, image_merge_sizes=torch.tensor([2, 2]))


def _encoded_image(model: PreTrainedModel) -> dict[str, Tensor]:
    """T5Gemma 2: the encoder sees the image, of which its config says how many tokens it becomes."""
    node = model.config.encoder
    side, text = (
        node.vision_config.image_size,
        words(model.config, [(node.image_token_id, node.mm_tokens_per_image)]),
    )
    return {
        "input_ids": text,
        "pixel_values": noise(2, 3, side, side),
        "decoder_input_ids": words(model.config, []),
    }


def _one_sound(model: PreTrainedModel) -> dict[str, Tensor]:
    """Qwen2 Audio puts a sound in the place of one token."""
    made = media_and_text(model)
    made["input_ids"] = words(model.config, [(model.config.audio_token_id, 1)])
    return made | {"attention_mask": torch.ones_like(made["input_ids"])}


def _text(model: PreTrainedModel) -> dict[str, Tensor]:
    """Text alone: the images' codes would go by names in the vocabulary."""
    made = words(model.config, [])
    return {"input_ids": made, "attention_mask": torch.ones_like(made)}


INPUTS: dict[str, Callable[[PreTrainedModel], Mapping[str, Tensor]]] = {
    "neomme": _flat_patches,
    **dict.fromkeys(("chameleon", "emu3"), _text),
    "paddleocr_vl": _square_patches,
    "qwen2_audio": _one_sound,
    "t5gemma2": _encoded_image,
    "tvp": _film,
    "udop": _boxed,
    "video_llama_3": _merged_by_image,
    "videoprism": _captioned_film,
    "blip_2_qformer": _queries,
    "decision_transformer": _trajectory,
    "deepseek_vl_hybrid": _two_resolutions,
    "fuyu": _patches,
    "idefics": _several,
    "inkling2": _merged_patches,
    "instructblip": _question,
    "instructblipvideo": _question,
    "kimi_k25": _square_patches,
    "kosmos-2": _places_in_text,
    "layoutlmv3": _page,
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), _one_row),
    "mllama": _tiled,
    "molmo2": _pooled,
    "pix2struct": _rows_and_columns,
    "nemotron_h_omni": _patches_by_row,
    "granite4_vision": _stacked_tiles,
    "granite_docling": _tiles_of_pages,
    "vision-encoder-decoder": _captioned,
}
