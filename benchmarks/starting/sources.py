"""The sources: small models trained here on text that is at hand, long enough to be worth inheriting from.

A source's folder in the cache holds its tokenizer, its text as blocks of token ids in three parts, the record of its
training, the trained model, and source.json, written last. Training goes on where it was when it is started again.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import re
import sysconfig
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_ws.training import TrainConfig, train
from hf_ws.training.data import Document, load_text, pack, split_held_out, text_files
from hf_ws.training.run_folder import write_json

BLOCK, BATCH = 256, 16  # tokens in a sequence, sequences in a step
VOCAB = 4096
LEARNT = 2**25  # characters that a tokenizer is trained on, about
LARGEST = 160_000_000  # characters of a corpus, about
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAVED = DEVICE == "cpu"  # a GPU is through before a checkpoint is worth its time
MEASURED = 128  # held-out blocks of each split that a loss is taken over
PARTS = ("train", "validation", "final")
PARENTS = ("random", "subclone", "rotation, explained")  # what is started from parents nearer and further
END = "<|endoftext|>"
DEMO = Path(__file__).parents[2] / "recipes" / "demo" / "source"

LLAMA: dict[str, Any] = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": BLOCK, "tie_word_embeddings": False,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "n_embd": 384, "n_inner": 1536, "n_layer": 8, "n_head": 6, "n_positions": BLOCK, "tie_word_embeddings": True,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
LLAMA_100M: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": BLOCK, "tie_word_embeddings": False,
}  # fmt: skip
NEAR_LLAMA = LLAMA | {
    "hidden_size": 320,
    "intermediate_size": 832,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAR_LLAMA = LLAMA | {
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
}
WIDE_LLAMA = {
    # of the parameters that are no embeddings: about 1/2 and 1/4 by width, depth and both; the prototype's target, 40 %
    # of all parameters; and what ratio=0.404 finds for `llama`
    "both-40": {"hidden": 256, "layers": 6, "heads": 4, "kv_heads": 2, "ffn": 704},
    "found-40": {"hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 512},
    "width-1/2": {"hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 768},
    "width-1/4": {"hidden": 192, "heads": 4, "kv_heads": 2, "ffn": 448},
    "depth-1/2": {"layers": 4},
    "depth-1/4": {"layers": 2},
    "both-1/2": {"hidden": 320, "layers": 6, "heads": 4, "kv_heads": 2, "ffn": 832},
    "both-1/4": {"hidden": 256, "layers": 5, "heads": 4, "kv_heads": 2, "ffn": 576},
}
WIDE_GPT2 = {
    "both-40": {"hidden": 256, "layers": 6, "heads": 4, "ffn": 1024},
    "width-1/2": {"hidden": 256, "heads": 4, "ffn": 1152},
    "width-1/4": {"hidden": 192, "heads": 3, "ffn": 768},
    "depth-1/2": {"layers": 4},
    "depth-1/4": {"layers": 2},
    "both-1/2": {"hidden": 320, "layers": 6, "heads": 5, "ffn": 1216},
    "both-1/4": {"hidden": 256, "layers": 5, "heads": 4, "ffn": 832},
}
SMALL_LLAMA = {  # of the demo's source, likewise
    "both-40": {"hidden": 192, "layers": 6, "heads": 2, "kv_heads": 1, "ffn": 320},
    "found-40": {"hidden": 128, "heads": 4, "kv_heads": 2, "ffn": 320},
    "width-1/2": {"hidden": 192, "heads": 2, "kv_heads": 1, "ffn": 384},
    "width-1/4": {"hidden": 128, "heads": 2, "kv_heads": 1, "ffn": 256},
    "depth-1/2": {"layers": 4},
    "depth-1/4": {"layers": 2},
    "both-1/2": {"hidden": 224, "layers": 6, "heads": 2, "kv_heads": 1, "ffn": 448},
    "both-1/4": {"hidden": 160, "layers": 5, "heads": 2, "kv_heads": 1, "ffn": 352},
}


@dataclass(frozen=True)
class Recipe:
    """How a source is made, and the sizes it is brought to. Without `config` it lies in `folder` already."""

    corpus: str  # stdlib, installed or peps
    targets: dict[str, dict[str, int]]
    config: Any = None  # from keyword arguments to a config
    model_class: type[PreTrainedModel] | None = None
    tokens: int = 0
    peak: float = 1e-3  # learning rate
    batch: int = BATCH
    vocab: int | None = None  # VOCAB
    arms: tuple[str, ...] | None = None  # all
    folder: Path | None = None


RECIPES = {
    "llama": Recipe("stdlib", WIDE_LLAMA, partial(LlamaConfig, **LLAMA), LlamaForCausalLM, 8_000_000),
    "gpt2": Recipe("stdlib", WIDE_GPT2, partial(GPT2Config, **GPT2), GPT2LMHeadModel, 12_000_000, 2e-3),
    "llama-peps": Recipe("peps", WIDE_LLAMA, partial(LlamaConfig, **LLAMA), LlamaForCausalLM, 12_000_000),
    "llama-near": Recipe(
        "stdlib",
        {"both-40": WIDE_LLAMA["both-40"]},
        partial(LlamaConfig, **NEAR_LLAMA),
        LlamaForCausalLM,
        8_000_000,
        arms=PARENTS,
    ),
    "llama-far": Recipe(
        "stdlib",
        {"both-40": WIDE_LLAMA["both-40"]},
        partial(LlamaConfig, **FAR_LLAMA),
        LlamaForCausalLM,
        8_000_000,
        arms=PARENTS,
    ),
    "llama-100m": Recipe(
        "installed",
        {"both-40": {"hidden": 576, "layers": 7, "heads": 9, "kv_heads": 3, "ffn": 1280}},
        partial(LlamaConfig, **LLAMA_100M),
        LlamaForCausalLM,
        60_000_000,
        batch=128,
        vocab=16_384,
    ),
    "demo": Recipe(
        "stdlib",
        SMALL_LLAMA,
        folder=DEMO,
    ),
}


@dataclass(frozen=True)
class Source:
    """A trained source and its text."""

    name: str
    folder: Path  # what AutoModelForCausalLM loads
    blocks: dict[str, Tensor]  # by part, [blocks, tokens]
    told: dict[str, Any]  # source.json
    targets: dict[str, dict[str, int]] = field(default_factory=dict)
    arms: tuple[str, ...] | None = None  # all

    @property
    def fingerprint(self) -> str:
        """Of the weights: results of two trainings of one recipe are not mixed."""
        return str(self.told["fingerprint"])


# --- text ---


def documents(corpus: str, peps: Path | None) -> dict[str, list[Document]]:
    """The documents to train on, and two held-out parts that nothing is trained on.

    The library's are split as everywhere in this project (one file in twenty, by a hash of its path), which is how
    the demo's source was trained; a second hash parts what is held out in two. The PEPs come split.
    """
    if corpus == "stdlib":
        trained, held_out = split_held_out(load_text("stdlib"))
    elif corpus == "installed":
        found = [*load_text("stdlib"), *text_files([sysconfig.get_paths()["purelib"]], suffixes=[".py"])]
        alone = list({one.text: one for one in found}.values())
        trained, held_out = split_held_out(alone[:: 1 + sum(len(one.text) for one in alone) // LARGEST])
    elif peps is None:
        raise SystemExit(
            "this source is trained on the text of the PEPs; give --peps FOLDER (train and test .txt.xz)"
        )
    else:
        trained, held_out = (_peps(peps / f"{part}.txt.xz") for part in ("train", "test"))
    late = [hashlib.sha256(f"final {one.name}".encode()).digest()[0] % 2 == 1 for one in held_out]
    parts = {
        name: [one for one, is_late in zip(held_out, late, strict=True) if is_late == wanted]
        for name, wanted in (("validation", False), ("final", True))
    }
    return {"train": trained, **parts}


def _peps(file: Path) -> list[Document]:
    """The PEPs in one file, each under a heading with its path."""
    text = lzma.decompress(file.read_bytes()).decode()
    pieces = re.split(r"^==== (\S+) ====$", text, flags=re.MULTILINE)
    return [Document(name, body) for name, body in zip(pieces[1::2], pieces[2::2], strict=True)]


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text has an encoding, and decoding gives it back.

    Of a large corpus it sees every so manieth text.
    """
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts[:: 1 + sum(map(len, texts)) // LEARNT],
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=[END],
        show_progress=False,
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)


def _packed(place: Path, recipe: Recipe, peps: Path | None) -> tuple[dict[str, Tensor], float]:
    """The blocks of every part, and the bytes of a token of the validation text; made once."""
    file = place / "blocks.npz"
    if not file.is_file():
        texts = documents(recipe.corpus, peps)
        if recipe.folder is None:
            tokenizer = train_tokenizer([one.text for one in texts["train"]], recipe.vocab or VOCAB)
            tokenizer.save_pretrained(place / "tokenizer")
        else:
            tokenizer = AutoTokenizer.from_pretrained(recipe.folder)
        packed = {part: pack(texts[part], tokenizer, BLOCK, progress=False) for part in PARTS}
        arrays = {part: packed[part].dataset.with_format("numpy")["input_ids"][:] for part in PARTS}
        staging = place / ".part.npz"
        np.savez(staging, bytes_per_token=packed["validation"].bytes_per_token, **arrays)
        staging.replace(file)
    with np.load(file) as kept:
        return {part: torch.from_numpy(kept[part]).long() for part in PARTS}, float(kept["bytes_per_token"])


# --- the loss ---


def measured(blocks: Tensor) -> Tensor:
    """The evenly spread blocks of a held-out part that a loss is taken over, [at most MEASURED, tokens]."""
    keep = min(len(blocks), MEASURED)
    return blocks[[i * len(blocks) // keep for i in range(keep)]]


@torch.no_grad()
def loss_of(model: PreTrainedModel, blocks: Tensor) -> float:
    """Mean loss over the measured blocks in nats per token, products in bf16, as in training."""
    model.eval()
    rows = measured(blocks)
    with torch.autocast(model.device.type, torch.bfloat16):
        losses = [
            model(input_ids=ids, labels=ids).loss.item() * len(ids)
            for ids in rows.to(model.device).split(BATCH)
        ]
    return sum(losses) / len(rows)


# --- training ---


def told_of(name: str, cache: Path) -> dict[str, Any] | None:
    """What is known of a finished source; None if it is not finished. Reads no weights."""
    file = cache / "sources" / name / "source.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def make(name: str, cache: Path, peps: Path | None) -> Source:
    """The source, trained if it is not yet; a training that was stopped goes on."""
    recipe, place = RECIPES[name], cache / "sources" / name
    place.mkdir(parents=True, exist_ok=True)
    blocks, bytes_per_token = _packed(place, recipe, peps)
    folder = recipe.folder or place / "run" / "model"
    told = told_of(name, cache)
    if told is None:
        seconds = _train(recipe, place, blocks) if recipe.folder is None else None
        told = _tell(name, folder, blocks, bytes_per_token, seconds)
        write_json(place / "source.json", told)
    return Source(name, folder, blocks, told, recipe.targets, recipe.arms)


def _train(recipe: Recipe, place: Path, blocks: dict[str, Tensor]) -> float:
    """Train to the end, from the last checkpoint if there is one; seconds of training in this and earlier runs."""
    assert recipe.model_class is not None
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(place / "tokenizer")
    model = recipe.model_class(
        recipe.config(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    steps = recipe.tokens // (BLOCK * recipe.batch)
    config = TrainConfig(
        output=str(place / "run"), resume=True, tokens=recipe.tokens, batch_size=recipe.batch, precision="bf16",
        learning_rate=recipe.peak, min_lr_ratio=0.02, warmup_steps=100, eval_every=max(1, steps // 20),
        save_every=max(50, steps // 50) * SAVED, log_every=25, progress=False,
    )  # fmt: skip
    history = train(
        config,
        model=model,
        tokenizer=tokenizer,
        train_blocks=blocks["train"],
        eval_blocks=measured(blocks["validation"]),
    )
    folder = place / "run" / "model"  # kept in bf16, as large checkpoints are
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return history.seconds


def machine() -> str:
    """What the numbers were made on."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"


def _tell(
    name: str, folder: Path, blocks: dict[str, Tensor], bytes_per_token: float, seconds: float | None
) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
    embedded = {
        id(p)
        for part in (model.get_input_embeddings(), model.get_output_embeddings())
        for p in part.parameters()
    }
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]
    loss = loss_of(model, blocks["validation"])
    recipe = RECIPES[name]
    return {
        "name": name,
        "fingerprint": weights,
        "date": time.strftime("%Y-%m-%d"),
        "parameters": model.num_parameters(),
        "without_embeddings": sum(p.numel() for p in model.parameters() if id(p) not in embedded),
        "trained_tokens": recipe.tokens or None,
        "peak_learning_rate": recipe.peak if recipe.config else None,
        "seconds": seconds,
        "machine": machine(),
        "tokens": {part: blocks[part].numel() for part in PARTS},
        "bytes_per_token": bytes_per_token,
        "loss": loss,
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "final": {"loss": loss_of(model, blocks["final"])},  # read once, by --final
    }
