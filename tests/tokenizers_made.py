"""A small trained tokenizer of every kind that a vocabulary is trimmed in."""

from __future__ import annotations

import json
import sysconfig
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def corpus() -> list[str]:
    """Lines of English and code, with a few letters that no byte is."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((folder / name).read_text() for name in ("argparse.py", "calendar.py", "string.py"))
    return [*text.splitlines(), *["naïve café, Füße, über alles"] * 3]


def _wrapped(made: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def _bos(made: Tokenizer) -> None:
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )


def byte_level(**options: object) -> Tokenizer:
    """GPT-2's kind."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    _bos(made)
    made.add_special_tokens(["<|end|>"])
    made.add_tokens(["<think>"])
    return _changed(made, **options)


def byte_fallback() -> Tokenizer:
    """Llama 2's kind: letters, of which those that are unknown fall to bytes, and every way to merge a token."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=1100, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    )
    values = json.loads(made.to_str())
    vocab = values["model"]["vocab"]
    ways = [
        (vocab[token], [token[:at], token[at:]])
        for token in vocab
        for at in range(1, len(token))
        if token not in (*SPECIAL, *BYTES) and {token[:at], token[at:]} <= vocab.keys()
    ]
    values["model"] |= {
        "byte_fallback": True,
        "fuse_unk": True,
        "merges": [pair for _, pair in sorted(ways, key=lambda way: way[0])],
    }
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] in SPECIAL]
    made = Tokenizer.from_str(json.dumps(values))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    _bos(made)
    return made


def letters() -> Tokenizer:
    """CLIP's and the first GPT's kind: letters, and a mark at the end of a word."""
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.BPEDecoder("</w>")
    made.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    made.post_processor = processors.RobertaProcessing(
        ("</s>", made.token_to_id("</s>")), ("<s>", made.token_to_id("<s>"))
    )
    return made


def wordpiece() -> Tokenizer:
    """BERT's kind."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(
        corpus(), trainers.WordPieceTrainer(vocab_size=700, special_tokens=SPECIAL, show_progress=False)
    )
    _bos(made)
    made.enable_padding(pad_id=made.token_to_id("<pad>"), pad_token="<pad>")
    return made


def unigram(byte_fallback: bool = False) -> Tokenizer:
    """T5's kind; with byte fallback that of Gemma's and Llama's older relatives."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        corpus(),
        trainers.UnigramTrainer(
            vocab_size=700, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        ),
    )
    if byte_fallback:
        values = json.loads(made.to_str())["model"]["vocab"]
        values = [*values[:4], *([one, 0.0] for one in BYTES), *values[4:]]
        made.model = models.Unigram([(one, score) for one, score in values], 3, True)
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    _bos(made)
    return made


def _changed(made: Tokenizer, **options: object) -> Tokenizer:
    values = json.loads(made.to_str())
    values["model"] |= options
    return Tokenizer.from_str(json.dumps(values))


MADE = {
    "byte_level": byte_level,
    "byte_level_whole_words": lambda: byte_level(ignore_merges=True),
    "byte_fallback": byte_fallback,
    "letters": letters,
    "wordpiece": wordpiece,
    "unigram": unigram,
    "unigram_byte_fallback": lambda: unigram(byte_fallback=True),
}


@cache
def tokenizer(name: str) -> PreTrainedTokenizerBase:
    """One of MADE as Transformers has it."""
    return _wrapped(MADE[name]())
