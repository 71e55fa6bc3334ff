# SPDX-License-Identifier: Apache-2.0
"""The page of a report: one file, everything inside, and a real browser that opens it."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from places import ROOT
from scored import row, scored, sound

from tts_align.evaluation.html.report import write_folder_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1200,1500",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A test of 48 utterances, half of them mended, one broken, one silent, with some sound and one figure."""
    from matplotlib.figure import Figure

    folder = tmp_path_factory.mktemp("run") / "test"
    rows = []
    for i in range(48):
        said = {"text": "They record a new song every week.", "language": "en"}
        heard = {"transcript": f"they {('ri-KORD', 'REK-erd')[(i + 1) % 2]} a new song every week"} | said
        measures = {"pitch_spread": 2.5 + 0.01 * (i % 5), "similarity_seed": 0.62 + 0.001 * (i % 7)}
        base = row(i, "base", "right" if i % 2 else "wrong", 0.0 if i % 2 else 0.2, **heard, measures=measures)
        aligned = row(i, measures={name: 0.95 * value for name, value in measures.items()}, **said)
        aligned["transcript"] = "they ri-KORD a new song every week"
        rows += [base, aligned]
        if i in (0, 1, 2):
            for one, frequency in ((base, 200.0), (aligned, 260.0)):
                one["audio"] = f"audio/{one['id']}-{one['system']}.wav"
                sound(folder / one["audio"], frequency)
    rows[3] |= {"reading": "wrong", "cer": 0.4, "transcript": "<script>alert(1)</script> REK-erd"}
    rows[-1] |= {"failure": "silent", "reading": "neither", "cer": 1.0, "transcript": ""}
    forgotten = {"ja": {side: {"value": 0.02, "p_value": 0.5} for side in ("base", "aligned", "difference")}}
    measures = {"similarity_seed": {"model": "wavlm_large_finetune.pth", "digest": "ab12", "higher_is_better": True}}
    scored(folder, rows, forgetting=forgotten, measures=measures, protocol="kana", models={"judge": "1234abcd"})
    Figure(figsize=(2, 1)).savefig(folder / "token_weights.png")
    return folder


@pytest.fixture(scope="module")
def report(folder):
    return write_folder_report(folder.parent, 2000)


def test_the_page_is_one_file_with_everything_inside(report):
    text = report.read_text("utf-8")
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', text)
    assert len(sources) == 1 + 2 * 3 + 1  # icon, three utterances twice, one figure
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?://", text)
    for words in ("base → aligned", "24</b>readings mended", "2</b>readings broken", "possible reward hacking"):
        assert words in text
    for words in ("Mended words (24)", "Broken words (2)", "Failures", "silent", "Forgetting", "1234abcd", "ab12"):
        assert words in text
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_a_folder_of_one_system_has_a_page_too(tmp_path):
    rows = [row(i, "scored", "", 0.1 * (i % 3)) for i in range(12)]
    rows[0] |= {"error": "RuntimeError: no", "cer": None, "audio": "gone.wav"}
    (tmp_path / "broken.wav").write_text("no sound")
    rows[2]["audio"] = "broken.wav"
    text = write_folder_report(scored(tmp_path, rows), 50).read_text("utf-8")
    assert "Worst utterances" in text
    assert "broken.wav cannot be read as sound" in text
    assert "not judged" in text


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[test]'")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium with its chromedriver on PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def _requests(driver):
    """Addresses that the page asked the network for."""
    entries = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [one["params"]["request"]["url"] for one in entries if one["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("data:", "file:", "chrome"))]


def test_a_browser_shows_it_on_desktop_and_phone_in_light_and_dark(browser, report):
    browser.get(report.as_uri())
    assert browser.execute_script("return document.querySelectorAll('table tbody tr').length") > 8
    players = browser.execute_script("return [...document.querySelectorAll('audio')].map(one => one.src.slice(0, 15));")
    assert players == ["data:audio/flac"] * 6
    length = browser.execute_async_script(
        "const audio = document.querySelector('audio'), done = arguments[arguments.length - 1];"
        "if (audio.readyState) done(audio.duration);"
        "audio.onloadedmetadata = () => done(audio.duration); audio.onerror = () => done(-1); audio.load();"
    )
    assert length == pytest.approx(0.2, abs=0.02)  # the browser reads the FLAC
    colours = []
    for scheme in ("light", "dark"):
        feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
        colours.append(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 24, 29)"]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    phone = {"width": 380, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    width = browser.execute_script("return document.documentElement.scrollWidth")
    assert width <= 380  # only tables scroll sideways
    assert _requests(browser) == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_a_picture_for_the_readme(browser, report):
    """Of a real run's page, if TTS_ALIGN_PICTURES names its folder, to ``benchmarks/results/pictures/report.png``."""
    run = Path(os.environ.get("TTS_ALIGN_PICTURES", ""), "test/report.html")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get((run if run.is_file() else report).resolve().as_uri())
    picture = browser.get_screenshot_as_png()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 30_000
    if run.is_file():
        (ROOT / "benchmarks/results/pictures/report.png").write_bytes(picture)
