"""The page `docs/architectures.md`: what is proven of every model type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import __version__

from hf_ws.layouts.catalogue import KINDS, Verdict, types

HEAD = """# Architectures

What `hf-ws` can resize in {count} model types of Transformers {version}: the axes that are proven to be free, on a
miniature of the type's default config which has every kind of tensor that the default itself has. `hf-ws certify --all
--markdown` writes this page; for the types in tests/zoo_types.txt (every one that is certified) the tests check that
it says what the proofs say, and that a transfer keeps the laws.

*Certified*: hidden, ffn, heads, kv_heads and layers may change wherever the type has them, in every stack. *In part*:
one of these stays as it is, for the reason given. *Refused*: nothing is transferred. A config of your own is proven
when it is used, whatever stands here; `hf-ws certify <folder or id>` shows it.

"""


def page(found: Sequence[Verdict]) -> str:
    """The page in Markdown."""
    missing = sorted(types().keys() - {verdict.name for verdict in found})
    lines = [HEAD.format(count=len(found), version=__version__) + "\n".join(_figures(found)), ""]
    if missing:
        lines += [f"Without a verdict on this page: {', '.join(f'`{name}`' for name in missing)}.", ""]
    return "\n".join([*lines, *map(row, sorted(found, key=lambda v: v.name))]) + "\n"


def row(verdict: Verdict) -> str:
    """A type's line of the page, without what differs from run to run."""
    start = f"- `{verdict.name}` ({verdict.model_class}): {verdict.verdict}"
    if verdict.verdict == "refused":
        return f"{start}. {_plain(verdict.reason or '')}"
    fixed = "; ".join(f"{axis} stays, {_plain(why)}" for axis, why in verdict.fixed.items())
    tables = ". Proven apart from its computed position tables" if verdict.tables else ""
    sides = "" if verdict.reads else ". Not rescaled: which side reads is not proven"
    return f"{start}. {', '.join(verdict.axes)}{'. ' if fixed else ''}{fixed}{tables}{sides}"


def _plain(reason: str) -> str:
    """A reason without its figures, which differ in their last digits from machine to machine."""
    return reason.partition(" by ")[0].rstrip(".")


def _figures(found: Sequence[Verdict]) -> Iterator[str]:
    yield "| kind | types | certified | in part | refused |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for kind in KINDS:
        own = [verdict for verdict in found if verdict.name in types(kind)]
        counts = [
            sum(v.verdict == word for v in own) for word in ("certified", "certified in part", "refused")
        ]
        yield f"| {kind} | {len(own)} | " + " | ".join(f"{count}" for count in counts) + " |"


__all__ = ["page", "row"]
