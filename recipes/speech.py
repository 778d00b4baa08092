"""Train a model that writes down speech (Whisper and its kin), from a teacher too if one is given.

    hf-ws subclone openai/whisper-medium students/whisper-s --hidden 768 --layers 12 --heads 12 --ffn 3072
    accelerate launch recipes/speech.py --config recipes/configs/whisper-medium-to-small.yaml --output runs/whisper-s

    # a minute on a CPU, on the sounds of a telephone's keys, made here
    python recipes/speech.py --config recipes/configs/smoke-speech.yaml --model STUDENT --output runs/smoke

Clips come from a table with a column of paths and one of text, or from a dataset of the Hub:

    python recipes/speech.py --model STUDENT --train-files clips.csv --audio-column file --text-column said \\
        --steps 1000 --output runs/clips

The run's folder receives metrics.jsonl, loss.png, checkpoints if asked for, and the trained model in model/.
The same command with --resume continues a run that was interrupted.
"""

import sys

from hf_ws.training import recipe

if __name__ == "__main__":
    sys.exit(recipe.run("speech", __doc__))
