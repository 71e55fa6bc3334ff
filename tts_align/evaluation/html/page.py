# SPDX-License-Identifier: Apache-2.0
"""The page around a report: style, sound and pictures inside the file, nothing fetched."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

STYLE = """
:root {
  color-scheme: light dark;
  --back: #ffffff; --sheet: #f4f6f8; --ink: #1d232b; --soft: #5b6673; --line: #d5dbe1;
  --good: #12706a; --bad: #b23a22; --note: #8a6100; --noted: #fff6df;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14181d; --sheet: #1d232a; --ink: #e7ebef; --soft: #a3adb8; --line: #36404a;
    --good: #55c7ba; --bad: #f08a72; --note: #e8c267; --noted: #2b2617;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, "Noto Sans", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .7rem; }
p.soft, .soft { color: var(--soft); } p { margin: .3rem 0; } a { color: inherit; }
.good { color: var(--good); } .bad { color: var(--bad); } .note { color: var(--note); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.tile { background: var(--sheet); border-radius: .6rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.box { background: var(--noted); border-left: .3rem solid var(--note); padding: .6rem .9rem; margin: .6rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .45rem .35rem 0; border-bottom: 1px solid var(--line); text-align: right; }
th, td { white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child, .left { text-align: left; }
td.words { white-space: normal; min-width: 12rem; text-align: left; }
svg.interval { width: 7rem; height: 1.1rem; vertical-align: middle; }
svg .axis { stroke: var(--line); } svg .better { stroke: var(--good); fill: var(--good); }
svg .worse { stroke: var(--bad); fill: var(--bad); } svg .plain { stroke: var(--soft); fill: var(--soft); }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: .8rem; }
.case { background: var(--sheet); border-radius: .6rem; padding: .8rem 1rem; }
.case h3 { font-size: 1.05rem; margin: 0 0 .5rem; font-weight: 600; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; }
.sides > div { min-width: 0; } audio { width: 100%; height: 2.2rem; margin-top: .3rem; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
@media (max-width: 34rem) { .sides { grid-template-columns: 1fr; } body { font-size: 15px; } }
"""
SCRIPT = """
document.addEventListener("play", (event) => {
  for (const other of document.querySelectorAll("audio")) if (other !== event.target) other.pause();
}, true);
"""
"""One sound at a time."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; media-src data:"


def page(title: str, parts: Sequence[str], language: str = "en") -> str:
    """A whole document.

    Args:
        title: of the page.
        parts: pieces of HTML, in order.
        language: of its words, BCP 47.
    """
    return (
        f'<!doctype html>\n<html lang="{escape(language)}">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, parts))
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it; nothing if nothing does."""
    inside = "\n".join(filter(None, parts))
    return f"<section>\n<h2>{escape(title)}</h2>\n{inside}\n</section>" if inside else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    """A table that scrolls sideways on a narrow screen; its cells are HTML already.

    Args:
        head: titles of the columns, as text.
        rows: cells, as HTML; ``<td ...>`` around them is added where it is missing.
        label: what a reader of the screen hears.
    """
    if not rows:
        return ""
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}"><table>\n'
        f"<thead><tr>{titles}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _cell(content: str) -> str:
    return content if content.startswith("<td") else f"<td>{content}</td>"


def tile(value: str, words: str, kind: str = "") -> str:
    """A number to see from afar."""
    return f'<div class="tile"><b class="{kind}">{escape(value)}</b>{escape(words)}</div>'


def box(words: str) -> str:
    """A remark that must not be overlooked."""
    return f'<div class="box" role="note">{escape(words)}</div>'


def player(path: Path | None, label: str) -> str:
    """A recording inside the page as FLAC; without one, or with one that cannot be read, words that say so."""
    if path is None:
        return '<p class="soft">no recording kept</p>'
    import soundfile

    try:
        samples, sample_rate = soundfile.read(path, dtype="int16")
        whole = io.BytesIO()
        soundfile.write(whole, samples, sample_rate, format="FLAC", subtype="PCM_16")
    except (OSError, RuntimeError) as error:
        return f'<p class="bad">{escape(f"{path.name} cannot be read as sound: {error}")}</p>'
    encoded = base64.b64encode(whole.getvalue()).decode()
    source = f"data:audio/flac;base64,{encoded}"
    return f'<audio controls preload="metadata" aria-label="{escape(label)}" src="{source}"></audio>'


def picture(path: Path, words: str) -> str:
    """A PNG inside the page, with words under it."""
    encoded = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{encoded}" alt="{escape(words)}">'
        f'<figcaption class="soft">{escape(words)}</figcaption></figure>'
    )


def interval_svg(value: float, low: float, high: float, reach: float, kind: str) -> str:
    """An interval around a line at 0.

    Args:
        value: in the middle.
        low: lower end.
        high: upper end.
        reach: what the ends of the picture stand for, both ways.
        kind: ``better``, ``worse`` or ``plain``.
    """
    places = [100 * (1 + max(-1.0, min(1.0, number / reach))) if reach else 100.0 for number in (low, value, high)]
    return (
        f'<svg class="interval" viewBox="-6 0 212 20" role="img" aria-label="difference from {low:.4g} to {high:.4g}">'
        f'<line class="axis" x1="100" y1="0" x2="100" y2="20" stroke-width="2"/>'
        f'<line class="{kind}" x1="{places[0]:.1f}" y1="10" x2="{places[2]:.1f}" y2="10" stroke-width="4"/>'
        f'<circle class="{kind}" cx="{places[1]:.1f}" cy="10" r="5"/></svg>'
    )
