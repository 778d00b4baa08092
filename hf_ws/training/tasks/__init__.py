"""What a model is trained to do: one file per task, listed in `TASKS`.

A task says what the rows of its data are, and makes batches of them: what the model takes, and `labels`, -100 where
nothing is predicted. What it draws by chance (which tokens are masked) follows from the seed and from the place of a
row in the run, so a run that is resumed, or spread over processes, draws the same.
"""

from collections.abc import Mapping

from hf_ws.training.tasks.base import Rows, Task
from hf_ws.training.tasks.causal_lm import CausalLM
from hf_ws.training.tasks.image_classification import ImageClassification
from hf_ws.training.tasks.masked_lm import MaskedLM
from hf_ws.training.tasks.seq2seq import Seq2Seq
from hf_ws.training.tasks.speech import Speech

TASKS: Mapping[str, type[Task]] = {
    "clm": CausalLM,
    "mlm": MaskedLM,
    "seq2seq": Seq2Seq,
    "image_classification": ImageClassification,
    "speech": Speech,
}

__all__ = ["TASKS", "Rows", "Task"]
