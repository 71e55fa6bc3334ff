"""What an installation needs: metadata, versions, short imports, no leftovers."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from places import ROOT

import tts_align

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")


def _requirements(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.strip().splitlines() if not line.startswith("#")]


REQUIRED = _requirements(SETUP["options"]["install_requires"])
TEST = _requirements(SETUP["options.extras_require"]["test"])


@pytest.mark.parametrize("requirement", [*REQUIRED, *TEST], ids=str)
def test_bounds_hold_what_the_tests_run_on(requirement: Requirement) -> None:
    installed = metadata.version(requirement.name)
    assert requirement.specifier.contains(installed, prereleases=True), f"{requirement} but {installed} is installed"
    bounded = any(one.operator in ("<", "==") for one in requirement.specifier)
    assert bounded or requirement.name == "packaging", f"{requirement} has no upper bound"  # it has a calendar version


def test_every_import_is_required_and_every_requirement_imported() -> None:
    modules = {"pyyaml": "yaml", "OpenCC": "opencc", "pyopenjtalk-plus": "pyopenjtalk"}
    modules |= {"faster-whisper": "faster_whisper"}
    through_others = {"tensorboard", "rich", "jaxtyping"}  # Lightning's logger and progress bar; annotations
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "tts_align").rglob("*.py"))
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", source, re.MULTILINE))
    required = {modules.get(requirement.name, requirement.name) for requirement in REQUIRED}
    extras = {
        one for name, text in SETUP["options.extras_require"].items() if name != "test" for one in _requirements(text)
    }
    optional = {modules.get(one.name, one.name.replace("-", "_")) for one in extras}
    elsewhere = {"vllm"}  # by a script for another interpreter: its PyTorch is not ours
    unknown = imported - required - optional - elsewhere - set(sys.stdlib_module_names) - {"tts_align"}
    assert not unknown, f"imported, but not required by setup.cfg: {sorted(unknown)}"
    unused = required - imported - through_others
    assert not unused, f"required by setup.cfg, but never imported: {sorted(unused)}"


def test_import_is_light() -> None:
    code = (
        "import sys, tts_align, tts_align.cli.entry; "
        "print([m for m in ('torch', 'lightning', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(tts_align.PUBLIC))
def test_public_names_load(name: str) -> None:
    assert getattr(tts_align, name).__name__ == name
    assert name in dir(tts_align)


def test_unknown_names_raise() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = tts_align.nothing


def test_the_console_script_returns_nothing() -> None:
    assert "tts-align = tts_align.cli.entry:main" in SETUP["options.entry_points"]["console_scripts"]


def test_version_is_in_one_place() -> None:
    assert SETUP["metadata"]["version"] == "attr: tts_align.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", tts_align.__version__)
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_every_package_is_named() -> None:
    """``find:`` would not see the recipes, which lie beside the package."""
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tts_align").rglob("__init__.py")}
    packages = {".".join(folder.parts) for folder in folders} | {"tts_align.recipes"}
    assert set(SETUP["options"]["packages"].split()) == packages, "setup.cfg: [options] packages"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel of this checkout puts into ``site-packages``; built without a network, in a copy."""
    work = tmp_path_factory.mktemp("wheel")
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, work / name)
    for name in ("tts_align", "recipes"):
        shutil.copytree(ROOT / name, work / name, ignore=leave)
    build = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "build", "--build-lib", "installed"]
    subprocess.run(build, cwd=work, check=True, capture_output=True, env={"PATH": os.environ["PATH"]})
    return work / "installed"


def test_a_wheel_holds_package_recipes_and_assets(installed: Path) -> None:
    for folder, inside, kinds in (("tts_align", ".", "*.py"), ("recipes", "recipes", "*.yaml")):
        own = {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob(kinds)}
        there = {path.relative_to(installed / "tts_align" / inside) for path in (installed / "tts_align").rglob(kinds)}
        assert {path.as_posix() for path in there} == own
    assert (installed / "tts_align/data/demo/assets/audio/base/model.safetensors").is_file()
    assert (installed / "tts_align/py.typed").is_file()
    assert [path.name for path in installed.iterdir()] == ["tts_align"]


def test_an_installation_runs_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    words = "fit --config tkto --trainer.max_steps 1 --data.max_rows 40 --model.test.sentences 2 --run.threads 1"
    done = subprocess.run(
        [sys.executable, "-m", "tts_align", *words.split(), "--data.validation", "null"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"recipe: tkto is the packaged {installed / 'tts_align/recipes/tkto.yaml'}\n" in done.stderr
    assert set(json.loads((tmp_path / "runs/tkto/test/summary.json").read_text())["forgetting"]) == {"ja"}
    assert (tmp_path / "runs/tkto/test/report.html").is_file()


def test_every_folder_of_the_package_is_a_package() -> None:
    for path in (ROOT / "tts_align").rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} lacks __init__.py and would not be installed"


def test_ruff_reads_undefined_names() -> None:
    """F821 stays on, or a misspelt name in an annotation goes unseen."""
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["ruff"]["lint"]
    assert "F821" not in ruff["ignore"]
    assert {"E", "F", "W", "I", "UP", "B", "SIM", "D", "ANN", "PT", "RET", "RUF"} <= set(ruff["select"])


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="no README")
def test_readme_commands() -> None:
    """``.ci/run`` and newcomers rely on the first two fenced blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks[0].strip() == "pip install -e . && tts-align fit --config recipes/tkto.yaml"
    assert blocks[1].strip() == "pip install -e '.[test]' && pytest"
