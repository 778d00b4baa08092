"""The command line, `hf-ws`.

    hf-ws plan gpt2-large --hidden 512
    hf-ws subclone gpt2-large student --hidden 512

What goes wrong is one line on stderr and an exit code: 2 usage, 3 bad input, 4 output, 6 diverged, 130 interrupted;
1 is a fault of ours. Nothing heavy is imported before a command runs, so `--help` is quick.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Annotated

import typer

from hf_ws._version import __version__
from hf_ws.cli.cache_teacher import cache_teacher
from hf_ws.cli.certify import certify
from hf_ws.cli.compare import compare
from hf_ws.cli.env import env
from hf_ws.cli.evaluate import eval_
from hf_ws.cli.plan import plan
from hf_ws.cli.subclone import subclone
from hf_ws.cli.trim_vocab import trim_vocab
from hf_ws.errors import HfWsError

app = typer.Typer(
    # Plain help: it can be grepped, reads well without a terminal, and rich need not be imported for it.
    rich_markup_mode=None,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),  # --kv_heads is --kv-heads
        "max_content_width": 110,
    },
)

EXAMPLES: dict[Callable[..., None], tuple[str, ...]] = {
    plan: (
        "hf-ws plan gpt2-large --hidden 512 --layers 12",
        "hf-ws plan gpt2-large --params 125M --save plan.json",
    ),
    subclone: (
        "hf-ws subclone gpt2-large student --hidden 512 --calibration stdlib",
        "hf-ws subclone gpt2-large student --ratio 0.4 --calibration stdlib",
        "hf-ws subclone gpt2-large student --plan plan.json",
    ),
    trim_vocab: (
        "hf-ws trim-vocab gpt2 gpt2-8000 --vocab 8000 --data my-text/",
        "hf-ws trim-vocab gpt2 gpt2-code --vocab 8000 --data stdlib",
    ),
    certify: ("hf-ws certify llama qwen3 gpt2", "hf-ws certify BertForMaskedLM --layouts"),
    compare: (
        "hf-ws compare gpt2-large --hidden 512 --data stdlib --steps 500 --output comparison",
        "hf-ws compare gpt2-large --hidden 512 --steps 500 --output comparison --learning-rates 1e-3,5e-4",
        "hf-ws compare gpt2-large --ratio 0.4 --shapes 3 --race --seconds 600 --output race",
    ),
    cache_teacher: (
        "hf-ws cache-teacher cache --model student --teacher gpt2-large --data my-text/ --block 512",
        "hf-ws cache-teacher cache --config run.yaml --k 64",
    ),
    eval_: (
        "hf-ws eval student --data my-text/ --block 512 --teacher gpt2-large",
        "hf-ws eval student --tasks hellaswag,arc_easy",
    ),
    env: ("hf-ws env",),
}


def name_of(command: Callable[..., None]) -> str:
    """A command's name as it is typed."""
    return command.__name__.strip("_").replace("_", "-")


for command, examples in EXAMPLES.items():
    # \b keeps the lines as they are.
    epilog = "\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples)
    app.command(name_of(command), epilog=epilog)(command)


@app.callback(epilog="\b\nExample:\n  hf-ws plan gpt2-large --hidden 512")
def _hf_ws(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; allowed anywhere.")
    ] = False,
) -> None:
    """Start a transformer of one size from the pretrained weights of another."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (that of this process if None) and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug, given = "--debug" in given, [argument for argument in given if argument != "--debug"]
    if "--version" in given[:1]:
        print(__version__)
        return 0
    try:
        command = typer.main.get_command(app)
        code = command.main(given or ["--help"], prog_name="hf-ws", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # `hf-ws ... | head`; Python must not flush into it once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        text, code = _explained(error)
        print(f"hf-ws: {' '.join(text.split())}", file=sys.stderr)
        return code


def _explained(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    if isinstance(error, HfWsError):
        return str(error), error.exit_code
    # The parser's own errors. Releases of typer bring them from different modules, so no import names them.
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "hf-ws"
        text = error.format_message().rstrip(".")
        if near := get_close_matches(
            getattr(error, "option_name", ""), getattr(error, "possibilities", None) or (), 1
        ):
            text = f"{getattr(error, 'message', text)}; did you mean {near[0]}?"
        return f"{text}; see {path} --help", getattr(error, "exit_code", 2)
    return f"unexpected {type(error).__name__}: {error} (--debug shows the traceback; please report it)", 1
