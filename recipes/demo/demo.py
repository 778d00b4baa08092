"""The main job, end to end: plan, start a smaller student, train it with distillation, compare with a random start.

    make demo                                  # the source in recipes/demo/source, minutes on 2 cores
    make demo SOURCE=gpt2                      # any causal language model of the Hub, or a folder
    python recipes/demo/demo.py --steps 100    # shorter

The text is the source code of Python's standard library, which is on every machine; one file in twenty is held out.
Both students have half the source's hidden size and three quarters of its layers, see the same batches, and are
distilled from the source in the same way. The learning rate is chosen for each on a short run.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ws import AutoSubclone
from hf_ws.compare import Comparison, compare
from hf_ws.errors import HfWsError
from hf_ws.hub import save, source_folder
from hf_ws.methods import default_method
from hf_ws.store import check_output
from hf_ws.training.data import load_text, pack, split_held_out

SOURCE = Path(__file__).parent / "source"


def main() -> None:
    """Tell the story."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default=str(SOURCE), help="Hub id or folder of a causal language model")
    parser.add_argument("--steps", type=int, default=300, help="training steps of 4,096 tokens")
    parser.add_argument("--output", type=Path, help="folder to write; runs/demo-<time> if not given")
    args = parser.parse_args()
    output = args.output or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    check_output(output)

    print("1. The plan: half the hidden size, three quarters of the layers. Only config.json is read.\n")
    sizes = student_sizes(args.source)
    method, options = default_method(calibrated=True)
    print(AutoSubclone.plan(args.source, method=method, method_args=options, **sizes), "\n")
    method += f"({', '.join(f'{name}={json.dumps(value)}' for name, value in options.items())})"

    print("2. The text: Python's standard library, in blocks of 256 tokens.\n")
    tokenizer = AutoTokenizer.from_pretrained(args.source)
    documents, held_out = split_held_out(load_text("stdlib"))
    blocks = pack(documents[::4], tokenizer, 256)  # a quarter is more than the run will see
    eval_blocks = pack(held_out, tokenizer, 256)
    print(f"   {blocks.tokens:,} tokens to train on, {eval_blocks.tokens:,} held out\n")

    print(f"3. The start: {method}, which looks at the source on some of the text, as a stock checkpoint.\n")
    student = AutoSubclone.from_pretrained(args.source, calibration=blocks.dataset[:64]["input_ids"], **sizes)
    save(student, output / "start", source_folder=source_folder(args.source))
    print(f"   {output / 'start'}: AutoModelForCausalLM.from_pretrained loads it as it loads any model\n")

    print("4. Training, distilled from the source: a random start, then this one.\n")
    result = compare(
        args.source,
        sizes=sizes,
        methods=["random", method],
        data=blocks,
        held_out=eval_blocks,
        tokenizer=tokenizer,
        output=output / "compare",
        steps=args.steps,
        batch_size=16,
        learning_rates=[1e-3, 4e-3],
        search_steps=max(2, args.steps // 8),
        teacher=args.source,
        kd_weight=0.5,
        max_eval_blocks=128,
        precision="bf16",
        save_models=True,
    )

    tell(result, method, output)


def tell(result: Comparison, method: str, output: Path) -> None:
    """Step 5: the numbers, where the picture is, and what the student writes."""
    print(f"\n5. The result.\n\n{result}\n")
    factor = result.speed_up(method)
    if factor is None:
        print(f"The start by {method} did not reach the random start's final loss.")
    elif math.isinf(factor):
        print(f"The start by {method} is below the random start's final loss before any training.")
    else:
        print(
            f"The start by {method} needs {factor:.1f} times fewer tokens than the random start to reach its loss."
        )
    trained = result.of(method)[0].model_folder
    print(
        f"Picture: {output / 'compare' / 'compare.png'}\nTrained student: {trained}\n\nIt continues `def `:\n"
    )
    print(continuation(str(trained), "def "))


def student_sizes(source: str) -> dict[str, int]:
    """Half of hidden and three quarters of the layers, whatever the config calls them."""
    sizes = AutoSubclone.plan(source, method="random").source_sizes
    return {"hidden": sizes["hidden"] // 2, "layers": max(1, round(sizes["layers"] * 3 / 4))}


def continuation(folder: str, prompt: str) -> str:
    """What the trained model writes, greedily; loaded with Transformers alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(
        **inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return tokenizer.decode(written[0], skip_special_tokens=True)


if __name__ == "__main__":
    try:
        main()
    except HfWsError as error:
        raise SystemExit(f"demo: {error}") from error
