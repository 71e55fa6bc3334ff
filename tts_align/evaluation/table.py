# SPDX-License-Identifier: Apache-2.0
"""The table that ``test`` ends with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    "error_rate": _Row("error rate %", 100, "{:.2f}", False),
}
_SURE = 0.05


def print_table(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Show a summary: one line per number, base, aligned and their difference with 95 % intervals.

    Args:
        summary: what :func:`tts_align.evaluation.report.summarise` gives.
        console: where to; standard output by default.
    """
    console = console or Console()
    systems = [one for one in (*summary.get("systems", ("base", "aligned")), "difference") if one in summary]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption="95 % intervals", caption_justify="left")
    table.add_column("", no_wrap=True)
    for system in systems:
        table.add_column(system, justify="right", no_wrap=True)
    measures = summary.get("measures", {})
    rows = _ROWS | {name: _Row(name, 1, "{:.3f}", None) for name in measures.get(systems[0], {})}
    for name, row in rows.items():
        places = [place for place in (summary, summary["further"], measures) if name in place.get(systems[0], {})]
        if places:
            cells = [_cell(places[0][system][name], system == "difference", row) for system in systems]
            table.add_row(row.title, *cells)
    with above_bars():
        console.print(table)
    for system, names in summary["failed"].items():
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            what = "1 utterance has" if len(names) == 1 else f"{len(names)} utterances have"
            console.print(f"{system}: {what} no verdict, left out of all numbers: {shown}", style="yellow")
    for line in _further_lines(summary):
        console.print(line, style="yellow", soft_wrap=True)


def _further_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """What the numbers alone do not say: failures by name, abstentions, and the rates of the protocol."""
    for system, failures in summary.get("failures", {}).items():
        if failures:
            counted = ", ".join(f"{len(names)} {name}" for name, names in failures.items())
            yield f"{system}: faults of the recordings: {counted}"
    for system, count in summary.get("abstained", {}).items():
        if count:
            yield f"{system}: the judge abstained from {count} readings, which are in no accuracy"
    if known := summary.get("judge_accuracy"):
        yield f"the judge's own accuracy: {accuracy_line(known)}"
    name = summary.get("protocol", {}).get("name", "")
    for system, rates in summary.get("rates", {}).items():
        numbers = {"macro": rates["macro"], "corpus": rates["corpus"], "median": rates["median"]}
        shown = ", ".join(f"{kind} {100 * value:.2f} %" for kind, value in numbers.items())
        yield f"{system}: protocol {name}: {shown}, {100 * rates['share_above_half']:.1f} % of utterances above 50 %"


def accuracy_line(known: Mapping[str, Any]) -> str:
    """A judge's own accuracy with its interval and its abstentions, as a summary holds it."""
    if known["value"] is None:
        return f"none, {known['abstained']} readings left open, {known['failed']} not judged"
    counted = f"{known['n']} utterances, {known['abstained']} more left open, {known['failed']} not judged"
    return f"{known['value']:.1%} [{known['low']:.1%}, {known['high']:.1%}] of {counted} ({known['source']})"


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
