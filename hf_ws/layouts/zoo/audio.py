"""Miniatures of audio models and of time series: see `hf_ws.layouts.zoo`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_ws.layouts.zoo.draw import RESERVED, Each, Open, floats, ids
from hf_ws.layouts.zoo.media import media_and_text, words

_WAVE = (
    "data2vec-audio",
    "hubert",
    "sew",
    "sew-d",
    "unispeech",
    "unispeech-sat",
    "wav2vec2",
    "wav2vec2-conformer",
)
_GROUPED = {"num_conv_pos_embedding_groups": 8}  # divides every hidden size of a miniature
_CODEC = {"num_filters": 4}
_FORECAST = {"prediction_length": Open(6), "context_length": Open(12)}
_BLOCKS = {"hidden_size": Each(96, 160), "num_attention_heads": Each(6, 10), "num_key_value_heads": Each(6, 10),
           "head_dim": 16, "encoder_hidden_size": 4}  # fmt: skip # the norm has 32 groups
_NO_VOCABULARY = {"vocab_size": Open(53)}

ATTENTION = {"nemotron_asr_streaming_encoder": "sdpa"}  # it takes the eager mask for its opposite

FIELDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys((*_WAVE, "wavlm", "speecht5"), _GROUPED),
    **dict.fromkeys(
        ("encodec", "mimi", "pocket_tts_audio_tokenizer", "mimi_encoder", "mimi_decoder"), _CODEC
    ),
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), _FORECAST),
    **dict.fromkeys(("neucodec", "xcodec2"), _BLOCKS),
    "fun_asr_nano": {
        "text_config.hidden_size": Each(144, 176),
        "adaptor_config.num_attention_heads": Each(8, 16),
    },
    "canary_decoder": {"num_attention_heads": Each(4, 8)},  # divides the encoder's hidden size
    "moonshine_streaming": {"num_key_value_heads": Open(8)},
    "kyutai_speech_to_text": {"codebook_vocab_size": RESERVED, "num_codebooks": 2},
    "voxtral_realtime_text": {"hidden_size": Each(144, 176)},  # even
    "voxtral": {"audio_token_id": 5},
    "musicflamingo": {"audio_config.hidden_size": Each(150, 180)},  # of which a fifth is even
    "moss_transcribe_diarize_audio": {"max_source_positions": Each(72, 96)},  # four frames side by side
    "voxtral_encoder": {"max_source_positions": Each(72, 96)},  # four frames side by side
    "audio-spectrogram-transformer": {"max_length": 36},
    "csm": {"text_vocab_size": 251},
    "fastspeech2_conformer_hifigan": {"upsample_initial_channel": 32},
    "dac": {"encoder_hidden_size": 8, "decoder_hidden_size": Each(96, 160)},
    "granite_speech5_encoder": {"context_size": 12},
    "wav2vec2-bert": _NO_VOCABULARY,
    "wav2vec2-conformer": _GROUPED | _NO_VOCABULARY,
    **dict.fromkeys(  # noise would be drawn for the first channel, whichever that is
        (
            "vibevoice_acoustic_tokenizer",
            "vibevoice_acoustic_tokenizer_encoder",
            "vibevoice_acoustic_tokenizer_decoder",
        ),
        {"num_filters": 2, "vae_std": 0.0},
    ),
}

Shape = Callable[[Any], tuple[int, ...]]
Inputs = Callable[[PreTrainedModel], Mapping[str, Tensor]]


def _heard(shape: Shape, name: str = "input_features", mask: str = "", time: int = 0) -> Inputs:
    """Sound of this shape, a mask of this name over its time, and text where a decoder reads it."""

    def inputs(model: PreTrainedModel) -> Mapping[str, Tensor]:
        wanted = signature(model.forward).parameters
        if name not in wanted:  # the decoder alone
            return {"input_ids": ids(model.config.vocab_size)}
        part = getattr(model.config, "encoder_config", model.config)
        made = {name: floats(2, *shape(part))}
        if mask:
            made[mask] = torch.ones(2, shape(part)[time], dtype=torch.long)
        if "decoder_input_ids" in wanted:
            made["decoder_input_ids"] = ids(model.config.vocab_size)
        return made

    return inputs


def _wave(config: Any) -> tuple[int, ...]:
    return (3200,)


def _mono(config: Any) -> tuple[int, ...]:
    return 1, 5760


def _frames(config: Any) -> tuple[int, ...]:
    return 160, config.num_mel_bins


def _bands(config: Any) -> tuple[int, ...]:
    return config.num_mel_bins, 2 * getattr(config, "max_source_positions", 20)


def _history(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """A series, what is known of it and of its time."""
    c = model.config
    past, channels = c.context_length + max(c.lags_sequence), () if c.input_size == 1 else (c.input_size,)
    features = c.num_time_features + c.num_dynamic_real_features
    categories = c.num_static_categorical_features
    known = {"static_categorical_features": torch.ones(2, categories, dtype=torch.long)} if categories else {}
    return known | {
        "past_values": floats(2, past, *channels).abs(),
        "past_time_features": floats(2, past, features),
        "past_observed_mask": torch.ones(2, past, *channels, dtype=torch.float64),
        "future_values": floats(2, c.prediction_length, *channels, seed=2).abs(),
        "future_time_features": floats(2, c.prediction_length, features, seed=2),
        "static_real_features": floats(2, c.num_static_real_features, seed=3),
    }


def _one_history(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Autoformer gives the delays of one series to the heads of another: it does not bear two."""
    return {name: tensor[:1] for name, tensor in _history(model).items()}


def _series(config: Any) -> tuple[int, ...]:
    return config.context_length, config.num_input_channels


def _spoken(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """SpeechT5: what its prenets make of sound, or the sound itself."""
    if "decoder_input_ids" in signature(model.forward).parameters:
        return {"input_values": floats(2, 3200), "decoder_input_ids": ids(model.config.vocab_size)}
    width = model.config.hidden_size
    return {"input_values": floats(2, 9, width), "decoder_input_values": floats(2, 7, width, seed=2)}


def _patches(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """TimesFM: two series of three patches, none of it padding."""
    values = floats(2, 3 * model.config.patch_length)
    padding = torch.zeros(values.shape, dtype=torch.long)
    freq = {"freq": torch.tensor([[0], [1]])} if hasattr(model.config, "freq_size") else {}
    return {"past_values": values, "past_values_padding": padding} | freq


def _sound_and_frames(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Codecs that listen twice: to the sound, and to its spectrum."""
    width = model.config.semantic_model_config.feature_projection_input_dim
    return {"input_values": floats(2, 1, 1600), "input_features": floats(2, 5, width, seed=2)}


def _dialogue(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Dia: text in bytes, and a code of each codebook a step."""
    decoder = model.config.decoder_config
    codes = ids(decoder.vocab_size, 2, 7, decoder.num_channels, seed=2)
    return {"input_ids": ids(model.config.encoder_config.vocab_size), "decoder_input_ids": codes}


def _text_and_codes(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Kyutai: a word and a code of each codebook a step."""
    c = model.config
    codes = ids(c.codebook_vocab_size, 2, 9, c.num_codebooks, seed=2, low=4)
    return {"input_ids": torch.cat([ids(c.vocab_size, 2, 9, 1), codes], dim=-1)}


def _word_by_word(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Voxtral Realtime: as much sound as there is text."""
    c = model.config
    sound = floats(2, c.audio_config.num_mel_bins, 9 * 2 * c.downsample_factor)
    return {"input_ids": ids(c.text_config.vocab_size), "input_features": sound}


def _words_after_a_delay(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Voxtral Realtime's text part: words, and the waves of how late they are."""
    c = model.config
    return {"input_ids": ids(c.vocab_size), "t_cond": torch.linspace(0, 3, c.hidden_size).cos()}


def _waves_in_text(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """VibeVoice: text with places for sound of three steps."""
    part = getattr(model.config, "acoustic_tokenizer_encoder_config", None) or model.config.audio_config
    sound = floats(2, 1, 3 * part.hop_length)
    return media_and_text(
        model, input_values=sound, padding_mask=torch.ones(2, sound.shape[-1], dtype=torch.bool)
    )


class _Noiseless:
    """A noise scheduler that adds none: it would be drawn for the first channel, whichever that is."""

    alpha_t, sigma_t = torch.zeros(1), torch.ones(1)

    @staticmethod
    def add_noise(features: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        return features


def _waves_to_tell(model: PreTrainedModel) -> Mapping[str, Any]:
    """VibeVoice in training, where its diffusion head sees what the words before a sound have become."""
    made = dict(_waves_in_text(model))
    heard = made["input_ids"] == model.config.audio_token_id
    return made | {
        "labels": torch.full_like(made["input_ids"], 5),
        "acoustic_loss_mask": heard,
        "noise_scheduler": _Noiseless(),
        "num_diffusion_steps": 1,
    }


def _masked_words(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Granite Speech: its mask is over the words that the sound becomes, so many a window."""
    c = model.config
    words = 2 * (c.window_size // c.downsample_rate)
    sound = floats(2, 2 * c.window_size, c.encoder_config.input_dim)
    return media_and_text(
        model, input_features=sound, input_features_mask=torch.ones(2, words, dtype=torch.bool)
    )


def _windows_in_text(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Qwen3 ASR: whole windows of sound."""
    part = model.config.audio_config
    sound = floats(2, part.num_mel_bins, 2 * part.n_window)
    mask = torch.ones(2, sound.shape[-1], dtype=torch.long)
    return media_and_text(model, input_features=sound, input_features_mask=mask)


def _frames_in_text(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Fun ASR: frames of seven spectra."""
    sound = floats(2, 9, model.config.audio_config.input_size)
    return media_and_text(model, input_features=sound, input_features_mask=torch.ones(2, 9, dtype=torch.long))


def _windows_of_recordings(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Moss: a window of each recording, and how long that was."""
    part = model.config.audio_config
    sound = floats(2, part.num_mel_bins, 2 * part.max_source_positions)
    mask = torch.ones(2, sound.shape[-1], dtype=torch.long)
    return media_and_text(model, input_features=sound, input_features_mask=mask, padding_mask=mask)


def _timed(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Music Flamingo tells from the places in the text when each window of sound was heard: two in each text."""
    part = model.config.audio_config
    sound = floats(4, part.num_mel_bins, 2 * part.max_source_positions)
    mask = torch.ones(4, sound.shape[-1], dtype=torch.long)
    text = words(model.config, [(model.config.audio_token_id, part.max_source_positions // 2 * 2)])
    return {"input_ids": text, "input_features": sound, "input_features_mask": mask}


def _drafted(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Muse Glimmer's assistant: noise to be made words, and what the large model has in some of its layers."""
    c = model.config
    context = floats(2, 7, c.hidden_size * len(c.target_layer_ids), seed=2)
    return {"noise_embeds": floats(2, 5, c.hidden_size), "context_hidden_states": context}


def _masked_mel(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Gemma 3n's mask is true where there is nothing."""
    return {
        "audio_mel": floats(2, 48, model.config.input_feat_size),
        "audio_mel_mask": torch.zeros(2, 48, dtype=torch.bool),
    }


def _states(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """What an encoder has made of sound."""
    return {"inputs_embeds": floats(2, 9, model.config.hidden_size)}


def _pairs(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Perception Encoder: two texts and two sounds."""
    return {"input_ids": ids(model.config.text_config.vocab_size), "input_values": floats(2, 1, 5760)}


def _latents(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """What a codec's decoder makes sound of: three steps."""
    c = model.config
    if "latents" in signature(model.forward).parameters:
        return {"latents": floats(2, c.hidden_size, 3)}
    return {"hidden_states": floats(2, c.hidden_size, 3)}


def _speech_or_text(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Seamless M4T: speech where the class hears, else text."""
    c, names = model.config, signature(model.forward).parameters
    source = {"input_features": floats(2, 24, c.feature_projection_input_dim)}
    if "input_features" not in names:
        source = {"input_ids": ids(c.vocab_size)}
    return source | {"decoder_input_ids": ids(c.vocab_size, seed=2)}


def _heard_and_written(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """A speech encoder and a text decoder, each of its own family."""
    return {"input_values": floats(2, 3200), "decoder_input_ids": ids(model.config.decoder.vocab_size)}


INPUTS: dict[str, Inputs] = {
    **dict.fromkeys(("seamless_m4t", "seamless_m4t_v2"), _speech_or_text),
    **dict.fromkeys(("vibevoice_asr",), _waves_in_text),
    "vibevoice": _waves_to_tell,
    **dict.fromkeys(
        ("mimi_decoder", "pocket_tts_audio_tokenizer_decoder", "vibevoice_acoustic_tokenizer_decoder"),
        _latents,
    ),
    "dia": _dialogue,
    "fun_asr_nano": _frames_in_text,
    "gemma3n_audio": _masked_mel,
    "moss_transcribe_diarize": _windows_of_recordings,
    "muse_glimmer_assistant": _drafted,
    "musicflamingo": _timed,
    "nemotron3_5_transcribe_audio": _heard(lambda c: (160, c.asr_config.num_mel_bins)),
    "nemotron3_5_transcribe_word_timestamp": _states,
    "nemotron3_diarization": _heard(lambda c: (160, c.audio_config.num_mel_bins)),
    "pe_audio": _pairs,
    "vibevoice_acoustic_tokenizer_encoder": _heard(lambda c: (1, 6400), "hidden_states"),
    "xcodec": _heard(lambda c: (1, 3200), "input_values"),
    "granite_speech": _masked_words,
    "granite_speech_plus": _masked_words,
    "qwen3_asr": _windows_in_text,
    "kyutai_speech_to_text": _text_and_codes,
    "speech-encoder-decoder": _heard_and_written,
    "voxtral_realtime_text": _words_after_a_delay,
    "voxtral_realtime": _word_by_word,
    **dict.fromkeys((*_WAVE, "wavlm", "moonshine", "moonshine_streaming"), _heard(_wave, "input_values")),
    **dict.fromkeys(
        (
            "dac",
            "encodec",
            "mimi",
            "mimi_encoder",
            "pocket_tts_audio_tokenizer",
            "pocket_tts_audio_tokenizer_encoder",
            "pe_audio_encoder",
            "vibevoice_acoustic_tokenizer",
        ),
        _heard(_mono, "input_values"),
    ),
    **dict.fromkeys(
        (
            "whisper",
            "qwen2_audio_encoder",
            "voxtral_encoder",
            "voxtral_realtime_encoder",
            "glmasr_encoder",
            "moss_transcribe_diarize_audio",
        ),
        _heard(_bands),
    ),
    **dict.fromkeys(
        (
            "cohere_asr",
            "canary",
            "lasr_ctc",
            "lasr_encoder",
            "parakeet_ctc",
            "parakeet_encoder",
            "parakeet_rnnt",
            "parakeet_tdt",
            "nemotron3_5_transcribe_asr_audio",
            "nemotron3_diarization_audio",
        ),
        _heard(_frames),
    ),
    **dict.fromkeys(
        ("nemotron_asr_streaming", "nemotron_asr_streaming_encoder", "nemotron3_5_asr"),
        _heard(_frames, mask="attention_mask"),
    ),
    **dict.fromkeys(("informer", "time_series_transformer"), _history),
    "autoformer": _one_history,
    **dict.fromkeys(("patchtst", "patchtsmixer"), _heard(_series, "past_values")),
    **dict.fromkeys(("timesfm", "timesfm2_5"), _patches),
    **dict.fromkeys(("neucodec", "xcodec2"), _sound_and_frames),
    **dict.fromkeys(
        ("granite_speech5_ctc", "granite_speech5_encoder"), _heard(lambda c: (48, 4 * c.num_mel_bins))
    ),
    "audio-spectrogram-transformer": _heard(lambda c: (c.max_length, c.num_mel_bins), "input_values"),
    "audioflamingo3_encoder": _heard(_bands, mask="input_features_mask", time=1),
    "fun_asr_nano_encoder": _heard(lambda c: (9, c.input_size), mask="input_features_mask"),
    "gemma4_audio": _heard(lambda c: (48, c.subsampling_conv_channels[0])),
    "muse_spark_audio": _heard(lambda c: (7680,), "input_values"),
    "qwen3_asr_encoder": _heard(
        lambda c: (c.num_mel_bins, 4 * c.n_window), mask="input_features_mask", time=1
    ),
    "speech_to_text": _heard(lambda c: (40, c.input_feat_per_channel * c.input_channels)),
    "speecht5": _spoken,
    "univnet": _heard(lambda c: (6, c.num_mel_bins)),
    "wav2vec2-bert": _heard(lambda c: (12, c.feature_projection_input_dim)),
}
