"""Train the demo's source: a small Llama on the sources of Python's own standard library.

This is how `recipes/demo/source` was made; its card holds the figures that the run printed.

    python recipes/demo/train_source.py --out recipes/demo/source            # about an hour on 2 cores
    python recipes/demo/train_source.py --out try --tokens 500_000     # minutes

The model is a decoder with grouped key/value heads and an untied head, 5.8 M parameters in all. One file in
twenty, chosen by a hash of its path, is held out and never trained on; the loss on those files is given in bits
per byte, which does not depend on the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_ws.training.data import load_text, pack, split_held_out

BLOCK = 256  # tokens in a training sequence
BATCH = 16  # sequences in a step
END = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text has an encoding, and decoding gives it back."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=vocab, min_frequency=2, special_tokens=[END], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)


@torch.no_grad()
def nats_per_token(model: LlamaForCausalLM, blocks: torch.Tensor) -> float:
    """Mean loss over all the tokens of `blocks`, in nats."""
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        losses = [model(input_ids=b, labels=b).loss.item() * len(b) for b in blocks.split(16)]
    model.train()
    return sum(losses) / len(blocks)


def train(model: LlamaForCausalLM, blocks: torch.Tensor, tokens: int, peak: float, evaluate) -> list[dict]:
    """AdamW, a short warm-up, cosine to a tenth of the peak. Returns what `evaluate` saw on the way."""
    steps = max(1, tokens // (BLOCK * BATCH))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.95),
        fused=True,
    )
    warm = min(200, steps // 10 + 1)

    def rate(step: int) -> float:
        progress = max(0.0, (step - warm) / max(1, steps - warm))
        return min(1.0, (step + 1) / warm) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(0)
    order = torch.empty(0, dtype=torch.long)
    log, start = [], time.monotonic()
    for step in (bar := tqdm(range(1, steps + 1), desc="training", mininterval=5)):
        if len(order) < BATCH:
            order = torch.randperm(len(blocks), generator=generator)
        batch, order = blocks[order[:BATCH]], order[BATCH:]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if step % max(1, steps // 20) == 0 or step == steps:
            row = {"tokens": step * BLOCK * BATCH, "seconds": round(time.monotonic() - start), **evaluate()}
            log.append(row)
            tqdm.write(json.dumps(row))
    return log


def main() -> None:
    """Tokenizer, data, model, training, save; then the same model on a tenth of the tokens, to compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--tokens", type=int, default=24_000_000, help="training tokens")
    parser.add_argument("--peak", type=float, default=2e-3, help="peak learning rate")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already; name a new folder")

    documents, held_out_documents = split_held_out(load_text("stdlib"))
    tokenizer = train_tokenizer([document.text for document in documents], vocab=2048)
    packed, packed_held_out = pack(documents, tokenizer, BLOCK), pack(held_out_documents, tokenizer, BLOCK)
    blocks, held_out = (torch.tensor(p.dataset["input_ids"][:]) for p in (packed, packed_held_out))
    per_token = packed_held_out.bytes_per_token
    print(f"{blocks.numel():,} training tokens in {len(documents)} files, {held_out.numel():,} held out")
    print(f"{per_token:.2f} bytes a token")

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=BLOCK,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )

    def run(tokens: int) -> tuple[LlamaForCausalLM, list[dict]]:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)

        def evaluate() -> dict:
            loss = nats_per_token(model, held_out[:: max(1, len(held_out) // 128)])
            return {"loss": round(loss, 4), "bits_per_byte": round(loss / math.log(2) / per_token, 4)}

        log = train(model, blocks, tokens, args.peak, evaluate)
        loss = nats_per_token(model, held_out)
        log[-1] |= {"loss": round(loss, 4), "bits_per_byte": round(loss / math.log(2) / per_token, 4)}
        return model, log

    model, log = run(args.tokens)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps({"whole": log}, indent=1))
    _, tenth = run(args.tokens // 10)
    (args.out / "training.json").write_text(json.dumps({"whole": log, "tenth": tenth}, indent=1))
    print(f"all tokens: {log[-1]}\na tenth:    {tenth[-1]}")


if __name__ == "__main__":
    main()
