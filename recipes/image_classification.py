"""Train an image classifier, from a teacher too if one is given.

    hf-ws subclone WinKawaks/vit-small-patch16-224 students/vit-t --hidden 192 --heads 3 --ffn 768 \\
        --method weight_selection --set num_labels=100
    accelerate launch recipes/image_classification.py --config recipes/configs/vit-s-to-vit-t-cifar100.yaml \\
        --output runs/vit-t

    # a minute on a CPU, on letters and digits drawn here; STUDENT has 36 labels
    python recipes/image_classification.py --config recipes/configs/smoke-image.yaml --model STUDENT --output runs/smoke

Pictures come from a folder that has a folder a class, from Parquet files, or from a dataset of the Hub:

    python recipes/image_classification.py --model STUDENT --train-files pictures/ --steps 1000 --crop 0.35 --flip \\
        --output runs/pictures

The run's folder receives metrics.jsonl (eval_accuracy among them), loss.png, checkpoints if asked for, and the trained
model in model/. The same command with --resume continues a run that was interrupted.
"""

import sys

from hf_ws.training import recipe

if __name__ == "__main__":
    sys.exit(recipe.run("image_classification", __doc__))
