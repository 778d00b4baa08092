"""Continue the training of an encoder-decoder on text, from a teacher too if one is given.

Text loses spans and the model puts them back (T5's objective; BART's where the tokenizer has a mask and no sentinels):

    hf-ws subclone google/t5-v1_1-large students/t5-512 --hidden 512
    accelerate launch recipes/seq2seq.py --config recipes/configs/t5-large-to-512.yaml --output runs/t5-512

    # a minute on a CPU
    python recipes/seq2seq.py --config recipes/configs/smoke.yaml --model STUDENT --output runs/smoke

Pairs of texts, in JSON lines or a dataset of the Hub, are learned as they are:

    python recipes/seq2seq.py --model STUDENT --train-files pairs.jsonl --source-column en --target-column de \\
        --steps 1000 --output runs/en-de

The run's folder receives metrics.jsonl, loss.png, checkpoints if asked for, and the trained model in model/.
The same command with --resume continues a run that was interrupted.
"""

import sys

from hf_ws.training import recipe

if __name__ == "__main__":
    sys.exit(recipe.run("seq2seq", __doc__))
