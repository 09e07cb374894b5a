"""The codec families as a text and as the page docs/codecs.md, from the library's own table."""

from __future__ import annotations

import textwrap
from typing import Any

from thinwire import _codec  # type: ignore[attr-defined]

_WIDTH = 100
_PAGE = """# Codecs

Made by `thinwire codecs --markdown`; do not edit. A policy names a family, after a colon its main
parameter, then options: `topk:0.01,values=q8`. Payload bytes:
[FORMAT.md](../compressors/FORMAT.md).

{table}

Options that every family takes:

{common}

Traits: *linear*, sent as projections that the transport's own allreduce sums; *lossless*, nothing
is left to a residual; *sparse*, a payload holds few positions and goes to all ranks, or to owners
of its ranges; *exact sum*, values are summed as they are sent; *unbiased*, right on average without
error feedback.
"""


def as_text() -> str:
    """For the terminal: a paragraph a family."""
    parts = [_paragraph(family) for family in _codec.families()]
    parts.append("every family\n" + _option_lines(_codec.common_options()))
    return "\n".join(parts)


def as_markdown() -> str:
    """The page docs/codecs.md."""
    rows = [
        [
            f"`{family['sample']}`" if len(family["words"]) == 1 else family["name"],
            "<br>".join(_parameters(family)) or "–",
            ", ".join(family["traits"]) or "–",
            family["use"],
            family["paper"] or "–",
        ]
        for family in _codec.families()
    ]
    common = [
        [f"`{name}`", values, f"`{default}`", what]
        for name, values, default, what in _codec.common_options()
    ]
    return _PAGE.format(
        table=_table(["policy", "parameters", "traits", "when to use it", "paper"], rows),
        common=_table(["option", "values", "default", "what"], common),
    )


def _paragraph(family: dict[str, Any]) -> str:
    traits = f" ({', '.join(family['traits'])})" if family["traits"] else ""
    lines = [f"{family['name']}{traits}, e.g. {family['sample']}"]
    lines += _wrapped(family["use"])
    if family["main"]:
        lines += _wrapped(f"after the colon: {family['main']}")
    text = "\n".join(lines) + "\n" + _option_lines(family["options"])
    if family["paper"]:
        text += "\n".join(_wrapped(family["paper"])) + "\n"
    return text


def _option_lines(options: list[tuple[str, str, str, str]]) -> str:
    return "".join(
        "\n".join(_wrapped(f"{name} = {values} (default {default}): {what}")) + "\n"
        for name, values, default, what in options
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="    ")


def _parameters(family: dict[str, Any]) -> list[str]:
    main = [f"after the colon: {family['main']}"] if family["main"] else []
    return main + [
        f"`{name}` {values} (`{default}`): {what}"
        for name, values, default, what in family["options"]
    ]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
