"""Continue the pretraining of a masked language model (BERT and its kin), from a teacher too if one is given.

    hf-ws subclone google-bert/bert-large-uncased students/bert-6 --layers 6
    accelerate launch recipes/mlm.py --config recipes/configs/bert-large-to-6-layers.yaml --output runs/bert-6

    # a minute on a CPU
    python recipes/mlm.py --config recipes/configs/smoke.yaml --model STUDENT --output runs/smoke

The run's folder receives metrics.jsonl, loss.png, checkpoints if asked for, and the trained model in model/.
The same command with --resume continues a run that was interrupted.
"""

import sys

from hf_ws.training import recipe

if __name__ == "__main__":
    sys.exit(recipe.run("mlm", __doc__))
