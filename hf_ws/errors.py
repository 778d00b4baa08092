"""Every error this library raises on purpose.

    HfWsError
    ├── PlanError (ValueError)            what was asked for cannot be done
    │   ├── SizeError                     a size that no legal target has
    │   └── UnsupportedArchitectureError  a class that is unknown, runs remote code, or failed its certificate
    ├── CheckpointError (ValueError)      the source cannot be read, or is not what it says
    ├── CalibrationError (ValueError)     calibration data that is missing, empty or unusable
    ├── DistillationError (ValueError)    a teacher that does not fit its student
    ├── DataError (ValueError)            training text that is missing, empty or unusable
    ├── DivergenceError (ArithmeticError) a loss that is no longer finite
    ├── ResumeError (ValueError)          a training checkpoint that cannot be continued
    ├── StoppedError                      a run that was told to end, and can be continued
    └── OutputError (OSError)             an output that cannot be written

Each message names the thing, what came, what is allowed, and what to do. Each class is also the built-in error
that a caller would expect, so `except ValueError` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HfWsError(Exception):
    """Base of every error of this library; the command line prints it in one line and exits with `exit_code`."""

    exit_code = 2


class PlanError(HfWsError, ValueError):
    """What was asked for cannot be done; nothing was read or written."""


class SizeError(PlanError):
    """A size no legal target has. The message lists every violation, with the nearest legal values."""


class UnsupportedArchitectureError(PlanError):
    """A model class that is unknown, needs remote code, or whose layouts could not be proven."""


class CheckpointError(HfWsError, ValueError):
    """The source cannot be read, or its weights are not what its config says."""

    exit_code = 3


class CalibrationError(HfWsError, ValueError):
    """Calibration data that is missing, empty or unusable."""

    exit_code = 3


class DistillationError(HfWsError, ValueError):
    """A teacher that does not fit its student, or a loss setting out of range."""

    exit_code = 3


class DataError(HfWsError, ValueError):
    """Training text that is missing, empty or unusable."""

    exit_code = 3


class ResumeError(HfWsError, ValueError):
    """A training checkpoint that is damaged or belongs to other settings."""

    exit_code = 3


class DivergenceError(HfWsError, ArithmeticError):
    """The loss is no longer finite; the last good checkpoint was kept."""

    exit_code = 6


class StoppedError(HfWsError):
    """SIGTERM came; a whole checkpoint was written."""

    exit_code = 143  # what a shell reports of a process that SIGTERM ended: 128 + 15


class OutputError(HfWsError, OSError):
    """An output that cannot be written; what was there before is untouched."""

    exit_code = 4


def unknown(kind: str, value: object, known: Iterable[str]) -> PlanError:
    """The error for a name that is in no table, with the nearest that is."""
    names = list(known)
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return PlanError(f"{kind} {value!r} is unknown; known are {', '.join(names)}, or pass a callable{hint}")
