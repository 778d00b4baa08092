"""Continue the pretraining of a causal language model, from a teacher too if one is given.

    # from gpt2-large to a trained student of hidden 512, which its source teaches
    accelerate launch recipes/clm.py --config recipes/configs/gpt2-large-to-512.yaml --output runs/gpt2-512

    # a student of your own source; or adapters on a model as it is
    python recipes/clm.py --subclone source=SOURCE hidden=512 layers=6 --train-files TEXT --steps 1000 --output runs/own
    python recipes/clm.py --model MODEL --lora r=16 merge=true --train-files TEXT --steps 1000 --output runs/lora

    # a minute on a CPU, in one process or two
    python recipes/clm.py --config recipes/configs/smoke.yaml --model STUDENT --output runs/smoke
    accelerate launch --config_file recipes/accelerate/cpu2.yaml recipes/clm.py \\
        --config recipes/configs/smoke.yaml --model STUDENT --output runs/smoke2 --batch-size 4

The run's folder receives metrics.jsonl, loss.png, checkpoints if asked for, and the trained model in model/.
The same command with --resume continues a run that was interrupted; SIGTERM ends one after the step, with a checkpoint.
"""

import sys

from hf_ws.training import recipe

if __name__ == "__main__":
    sys.exit(recipe.run("clm", __doc__))
