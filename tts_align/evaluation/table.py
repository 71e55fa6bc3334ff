# SPDX-License-Identifier: Apache-2.0
"""The table that ``test`` ends with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from tts_align.utils.progress import above_bars


class _Row(NamedTuple):
    """How a number is shown, and whether more of it is better."""

    title: str
    factor: float
    form: str
    more_is_better: bool | None


_ROWS = {
    "accuracy": _Row("accuracy %", 100, "{:.1f}", True),
    "cer": _Row("CER %", 100, "{:.2f}", False),
    "nearest_cer": _Row("nearest CER %", 100, "{:.2f}", False),
    "bad_case_ratio": _Row("bad cases %", 100, "{:.2f}", False),
    "neither": _Row("neither %", 100, "{:.2f}", False),
    "finished": _Row("finished %", 100, "{:.1f}", True),
    "length": _Row("length, tokens", 1, "{:.1f}", None),
}
_SURE = 0.05


def print_table(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Show a summary: one line per number, base, aligned and their difference with 95 % intervals.

    Args:
        summary: what :func:`tts_align.evaluation.report.summarise` gives.
        console: where to; standard output by default.
    """
    console = console or Console()
    systems = [system for system in ("base", "aligned", "difference") if system in summary]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption="95 % intervals", caption_justify="left")
    table.add_column("", no_wrap=True)
    for system in systems:
        table.add_column(system, justify="right", no_wrap=True)
    for name, row in _ROWS.items():
        place = summary if name in summary[systems[0]] else summary["further"]
        table.add_row(row.title, *[_cell(place[system][name], system == "difference", row) for system in systems])
    with above_bars():
        console.print(table)
    for system, names in summary["failed"].items():
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            what = "1 utterance has" if len(names) == 1 else f"{len(names)} utterances have"
            console.print(f"{system}: {what} no verdict, left out of all numbers: {shown}", style="yellow")


def _cell(interval: Mapping[str, Any], signed: bool, row: _Row) -> str:
    """``66.0 (63.9–68.1)``; a difference with its signs, coloured where it is sure."""
    if interval["value"] is None:
        return "-"
    value, low, high = (_number(interval[name] * row.factor, row.form, signed) for name in ("value", "low", "high"))
    text = f"{value} ({low}{' to ' if signed else '–'}{high})"
    if not signed or row.more_is_better is None or interval["p_value"] >= _SURE or interval["value"] == 0:
        return text
    return f"[{'green' if (interval['value'] > 0) == row.more_is_better else 'red'}]{text}[/]"


def _number(value: float, form: str, signed: bool) -> str:
    text = form.format(abs(value))
    is_zero = not text.strip("0.")
    return ("±" if signed and is_zero else "-" if value < 0 and not is_zero else "+" if signed else "") + text
