"""A recipe run many times over, each in a process of its own, at the price of importing everything once.

As a program: reads a recipe's flags as JSON, a line a run, forks, and prints the process's id and then how it ended.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Forked:
    """Starts runs, one at a time."""

    def __init__(self) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "1",
            "PYTHONPATH": str(ROOT),
        }
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, *flags: object, log: Path) -> int:
        """The process id of `recipes/clm.py` with these flags, what it says going to `log`."""
        self.server.stdin.write(json.dumps([str(log), *map(str, flags)]) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def end(self) -> int:
        """How the run ended, as a shell numbers it."""
        return int(self.server.stdout.readline())

    def run(self, *flags: object, log: Path) -> int:
        self.start(*flags, log=log)
        return self.end()

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(60)
        self.server.stdout.close()


def wait_for_rows(run: Path, rows: int, seconds: float = 60) -> None:
    """Until `metrics.jsonl` holds so many rows."""
    file, until = run / "metrics.jsonl", time.monotonic() + seconds
    while not (file.is_file() and file.read_bytes().count(b"\n") >= rows):
        if time.monotonic() > until:
            raise TimeoutError(f"{file} never came to hold {rows} rows")
        time.sleep(0.002)


def serve() -> None:
    import datasets  # noqa: F401
    import torch
    from matplotlib import figure  # noqa: F401
    from matplotlib.backends import backend_agg  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from hf_ws.training import recipe

    get_checkpoint_conversion_mapping("llama")  # the second of a load that every load shares
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what was imported is never collected again, in no child
    for line in sys.stdin:
        log, *flags = json.loads(line)
        pid = os.fork()
        if pid == 0:
            target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(target, 1)
            os.dup2(target, 2)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.argv = ["clm.py", *flags]
            code = 1
            try:
                code = recipe.run("clm", "about")
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(status if status >= 0 else 128 - status, flush=True)


if __name__ == "__main__":
    serve()
