# SPDX-License-Identifier: Apache-2.0
"""Short names of the files that ship with the package: ``demo:audio/base`` lies in ``data/demo/assets/audio/base``."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "data" / "demo" / "assets"


def resolve(name: str | Path) -> Path:
    """Path of a file or directory; a name that begins with ``demo:`` is looked up among the embedded ones.

    Raises:
        FileNotFoundError: no embedded file has this name; the message lists those that exist.
    """
    text = str(name)
    if not text.startswith("demo:"):
        return Path(text)
    path = ASSETS / text.removeprefix("demo:")
    if not path.exists():
        if text.startswith("demo:manner"):
            raise FileNotFoundError(f"{text} is not built yet: run `tts-align demo build --corpus manner` first")
        known = sorted(f"demo:{p.relative_to(ASSETS)}" for p in ASSETS.glob("*/*"))
        raise FileNotFoundError(
            f"no embedded file {text!r}: expected one of {', '.join(known) or 'none, none is built yet'}"
        )
    return path
