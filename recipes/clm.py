"""Continue the pretraining of a causal language model, from a teacher too if one is given.

    hf-ws subclone gpt2-large students/gpt2-512 --hidden 512
    accelerate launch recipes/clm.py --config recipes/configs/gpt2-large-to-512.yaml --output runs/gpt2-512

    # a minute on a CPU, in one process or two
    python recipes/clm.py --config recipes/configs/smoke.yaml --model STUDENT --output runs/smoke
    accelerate launch --config_file recipes/accelerate/cpu2.yaml recipes/clm.py \\
        --config recipes/configs/smoke.yaml --model STUDENT --output runs/smoke2 --batch-size 4

The run's folder receives metrics.jsonl, loss.png, checkpoints if asked for, and the trained model in model/.
The same command with --resume continues a run that was interrupted.
"""

import sys

from accelerate import PartialState

from hf_ws.errors import HfWsError, PlanError
from hf_ws.training import config_from_flags, train


def main() -> int:
    """Settings, training, and a line on what came out."""
    try:
        config = config_from_flags(None, __doc__)
        if config.output is None:
            raise PlanError("no place for the result; set output to a new folder")
        history = train(config)
    except HfWsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code

    state = PartialState()
    if state.is_main_process:
        if history.evaluations:
            first, last = history.evaluations[0][1], history.final_loss
            print(f"held-out loss {first:.3f} -> {last:.3f} nats per token, {history.seconds:.0f} s")
        print(f"the run is in {config.output}")
    state.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
