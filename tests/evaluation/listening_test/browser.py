"""A listener in headless Chromium."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

try:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
except ImportError:  # the tests skip
    Keys = ActionChains = None  # type: ignore[assignment,misc]

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--mute-audio"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=900,1000"),
    *("--autoplay-policy=no-user-gesture-required", "--lang=en"),
)
_HEARD = "return document.querySelectorAll('.play')[arguments[0]].dataset.heard"
_KEY = "return document.querySelector(`input[type=radio][value='${arguments[0]}']`).dataset.key"
_FAST = "const p = HTMLMediaElement.prototype.play; "
_FAST += "HTMLMediaElement.prototype.play = function () { this.playbackRate = 16; return p.call(this); };"
"""Sound at 16 times its speed: the browser still plays every clip to its end."""


@contextmanager
def browser(folder: Path) -> Iterator[Any]:
    """A fresh browser that saves what it downloads in a folder; skips the test where there is none."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[test]'")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium with chromedriver on this machine")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options, selenium.ChromeService(DRIVER))
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _FAST})
    try:
        yield driver
    finally:
        driver.quit()


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait for something to be true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


class Listener:
    """Somebody who listens with the keyboard only.

    Args:
        driver: the browser.
        answer: value to choose for a question, of what the page knows of it.
    """

    def __init__(self, driver: Any, answer: Callable[[dict[str, Any]], str]) -> None:
        self.driver, self.answer = driver, answer

    def run(self, script: str, *given: Any) -> Any:
        """What a piece of JavaScript returns."""
        return self.driver.execute_script(script, *given)

    def press(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def begin(self, address: str, name: str) -> None:
        """From the first page to the first question."""
        self.driver.get(address)
        self.run("document.getElementById('listener').focus()")
        self.press(name, Keys.ENTER)
        self.hear()
        self.press(Keys.ENTER)

    @property
    def session(self) -> dict[str, Any]:
        """What the page keeps of this listener's progress."""
        script = "const k = Object.keys(localStorage).find(k => /^tts-align-listen:[^:]+$/.test(k));"
        return json.loads(self.run(f"{script} return localStorage.getItem(k + ':' + localStorage.getItem(k))"))

    @property
    def question(self) -> dict[str, Any] | None:
        """The question that is shown; ``None`` on other pages."""
        session = self.session
        if not self.run("return Boolean(document.querySelector('fieldset'))"):
            return None
        return session["plan"][len(session["answers"])]

    def hear(self) -> None:
        """Play everything on the page to its end with the space bar."""
        for number in range(self.run("return document.querySelectorAll('.play').length")):
            self.press(" ")
            until(lambda number=number: self.run(_HEARD, number))

    def choose(self, value: str) -> None:
        """Choose an answer by its number key."""
        self.press(self.run(_KEY, value))

    def step(self) -> bool:
        """Answer one question, or leave a page between questions; tells whether more are to come."""
        if self.run("return Boolean(document.getElementById('answers'))"):
            return False
        if (question := self.question) is not None:
            self.hear()
            self.choose(self.answer(question))
        self.press(Keys.ENTER)
        return True

    def finish(self) -> dict[str, Any]:
        """Answer everything; returns what the last page offers to copy."""
        while self.step():
            pass
        return json.loads(self.run("return document.getElementById('answers').value"))
