# SPDX-License-Identifier: Apache-2.0
"""A recipe is read, not run: what its places are not for is refused before anything is called."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import LambdaCallback
from places import ROOT
from tiny import make_rows, save_recipe, save_rows

from tts_align.cli.classes import PLACES, check_classes, slots
from tts_align.cli.entry import main, run
from tts_align.cli.errors import RecipeError
from tts_align.cli.recipe import import_modules
from tts_align.cli.shelf import find_recipes, names

pytestmark = pytest.mark.whole_runs

TOUCH = "touched"
HOSTILE: dict[str, dict[str, Any]] = {
    "a function for an optimiser": {"model": {"optimizer": {"class_path": "os.system"}}},
    "its name alone": {"model": {"optimizer": "os.system"}},
    "a class that can be called": {"model": {"optimizer": {"class_path": "functools.partial"}}},
    "a function for a schedule": {"model": {"lr_scheduler": {"class_path": "os.mkdir"}}},
    "a process for a callback": {
        "trainer": {"callbacks": [{"class_path": "subprocess.Popen", "init_args": {"args": ["touch", TOUCH]}}]}
    },
    "exec for a callback": {
        "trainer": {"callbacks": [{"class_path": "builtins.exec", "init_args": {"source": f"open('{TOUCH}', 'w')"}}]}
    },
    "a function inside a callback": {
        "trainer": {
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"on_fit_start": "os.mkdir"}}
            ]
        }
    },
    "a function of another package inside a callback": {
        "trainer": {
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.LambdaCallback",
                    "init_args": {"on_fit_start": "torch.hub.load"},
                }
            ]
        }
    },
    "a process for a logger": {
        "trainer": {"logger": [{"class_path": "subprocess.Popen", "init_args": {"args": ["touch", TOUCH]}}]}
    },
    "a path for a strategy": {"trainer": {"strategy": {"class_path": "pathlib.Path", "init_args": {"args": ["x"]}}}},
    "a thread for a plugin": {"trainer": {"plugins": [{"class_path": "threading.Thread"}]}},
    "a file for a profiler": {"trainer": {"profiler": {"class_path": "io.FileIO", "init_args": {"file": TOUCH}}}},
    "a process for a judge": {"model": {"judge": {"class_path": "subprocess.Popen"}}},
    "a network for a vocoder": {"model": {"vocoder": {"class_path": "torch.nn.Linear"}}},
    "a policy for an objective": {"objective": {"class_path": "tts_align.models.policy.qwen2.Qwen2CodecLM"}},
    "a process inside a schedule": {
        "model": {
            "lr_scheduler": {
                "class_path": "torch.optim.lr_scheduler.LambdaLR",
                "init_args": {"lr_lambda": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", TOUCH]}}},
            }
        }
    },
    "a function inside a schedule": {
        "model": {
            "lr_scheduler": {
                "class_path": "torch.optim.lr_scheduler.LambdaLR",
                "init_args": {"lr_lambda": "os.system"},
            }
        }
    },
    "a class where anything may stand": {
        "trainer": {
            "logger": [
                {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": "x"},
                    "dict_kwargs": {
                        "more": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", TOUCH]}}
                    },
                }
            ]
        }
    },
}


@pytest.fixture
def recipe(tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tts-align"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    return save_recipe(tmp_path, "kto", tiny_policy, save_rows(tmp_path, make_rows(sentences=4)))


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_is_called(name: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.listdir())
    Path("over.yaml").write_text(yaml.safe_dump(HOSTILE[name]))
    with pytest.raises(SystemExit) as raised:
        main(["fit", "--config", recipe, "--config", "over.yaml"])
    assert raised.value.code == 2
    said = capsys.readouterr().err.partition("tts-align: error: ")[2]
    assert said.strip()
    assert "Traceback" not in said
    assert "ought not to happen" not in said
    assert sorted(os.listdir()) == sorted([*before, "over.yaml"])


@pytest.mark.parametrize(
    "words",
    [
        {"model": {"optimizer": "this.s"}},
        {"model": {"optimizer": {"class_path": "this.s"}}},
        {"model": {"judge": {"class_path": "this.s"}}},
        {"trainer": {"callbacks": [{"class_path": "this.s"}]}},
        {"trainer": {"callbacks": "this.s"}},
        {"trainer": {"callbacks": [{"class_path": "a.B", "init_args": {"inside": {"class_path": "this.s"}}}]}},
        {"by_objective": {"kto": {"model": {"optimizer": "this.s"}}}},
        {"objective": {"name": "this.s"}},
        ["--model.optimizer=this.s"],
        ["--model.optimizer", "this.s"],
        ["--model.judge.class_path", "this.s"],
        ["--trainer.callbacks+=this.s"],
        ["--trainer.callbacks", '[{"class_path": "this.s"}]'],
        ["--model.vocoder", '{"class_path": "this.s"}'],
        ["--objective", "this.s"],
        ["--model.optimizer=pip.__main__.x"],
    ],
)
def test_nothing_of_the_standard_library_is_imported(
    words: Any, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Module ``this`` prints a poem when it is imported."""
    if isinstance(words, dict):
        (tmp_path / "more.yaml").write_text(yaml.safe_dump(words))
        words = ["--config", str(tmp_path / "more.yaml")]
    with pytest.raises(SystemExit):
        run(["fit", "--config", recipe, *words])
    said = capsys.readouterr()
    assert "is no class that a recipe may name" in said.err
    assert not {"this", "pip.__main__"} & set(sys.modules)


def test_all_places_are_looked_at() -> None:
    assert set(slots()) == PLACES


def test_what_a_recipe_may_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Classes of their places; one's own functions where run.modules says that there is code of one's own."""
    (tmp_path / "mine_here.py").write_text(
        "from torch import nn\nclass Helper: ...\nclass Mine(nn.Module): ...\ndef rate(step): return 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import mine_here

    schedule = {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": mine_here.rate}}
    recipe = {"model": {"lr_scheduler": schedule, "optimizer": {"class_path": "torch.optim.SGD"}}}
    check_classes(recipe, "mine_here")
    with pytest.raises(RecipeError, match=r"lr_lambda: mine_here.rate is no part of a training; if it is yours, name"):
        check_classes(recipe)
    own = {"class_path": "mine_here.Mine", "init_args": {"helper": {"class_path": "mine_here.Helper"}}}
    check_classes({"data": {"more": own}})
    check_classes({"trainer": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.Timer"}]}})
    with pytest.raises(RecipeError, match=r"trainer.callbacks: expected a class of the kind Callback, got torch"):
        check_classes({"trainer": {"callbacks": [{"class_path": "torch.nn.Linear"}]}})
    assert LambdaCallback  # the class itself is a callback; only what it would call is refused


ENDS = """
try:
    entry.main()
except SystemExit as end:
    assert end.code == 2, end.code  # before anything heavy is loaded, after the places are set
import os
assert sys.path[-1] == os.getcwd() and os.getcwd() not in sys.path[:-1], sys.path
from importlib.util import find_spec
for name in ("yaml", "torch", "jsonargparse", "tokenizers"):
    assert not find_spec(name).origin.startswith(os.getcwd()), name
"""


def test_the_current_folder_comes_after_installed_packages(recipe: str, tmp_path: Path) -> None:
    for name in ("yaml", "torch", "jsonargparse", "tokenizers", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / TOUCH)!r}, 'w')\n")
    installed = "import sys; from tts_align.cli import entry; sys.argv[1:] = ['fit', '--config', 'no such recipe']; "
    for start in (["-m", "tts_align", "fit", "--config", recipe, "--print_config"], ["-c", installed + ENDS]):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
        environment["PYTHONPATH"] = str(ROOT)
        if start[0] == "-c":
            environment["PYTHONSAFEPATH"] = "1"  # as the installed command, whose first place is its own folder
        done = subprocess.run([sys.executable, *start], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / TOUCH).exists()


def test_a_local_file_comes_before_the_packaged_recipe(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_recipes(["fit", "--config", "dpo"]) == ["fit", "--config", str(names()["dpo"])]
    Path("dpo.yaml").write_text("objective: dpo\n")
    assert find_recipes(["fit", "--config", "dpo"]) == ["fit", "--config", "dpo.yaml"]
    assert find_recipes(["fit", "--config=dpo", "-c", "dpo"]) == ["fit", "--config=dpo.yaml", "-c", "dpo.yaml"]
    assert "recipe: dpo is the file dpo.yaml, not a packaged recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("no_such_thing", "run.modules: no module named 'no_such_thing' in "),
        ("no_such_parent.mine", "run.modules: no module named 'no_such_parent.mine' in "),
        ("needs_more", "run.modules: needs_more cannot be imported: ModuleNotFoundError: No module named 'not_there'"),
        ("broken_one", "run.modules: broken_one cannot be imported: ZeroDivisionError: division by zero"),
        (5, "run.modules: expected names of modules, such as mine or [mine, more.of_mine], got 5"),
        ([1], r"got [1]"),
        ({"a": "b"}, "got {'a': 'b'}"),
        (["", "os"], r"got ['', 'os']"),
        (".relative", "run.modules: .relative cannot be imported: TypeError"),
    ],
)
def test_modules_that_cannot_be_imported(modules: Any, message: str, recipe: str, capsys: pytest.CaptureFixture[str]):
    Path("needs_more.py").write_text("import not_there\n")
    Path("broken_one.py").write_text("1 / 0\n")
    sys.path.append(os.getcwd())
    with pytest.raises(SystemExit) as raised:
        import_modules([], {1: {"run": {"modules": modules}}})
    assert raised.value.code == 2
    assert message in capsys.readouterr().err
    import_modules([], {1: {"run": []}, 2: {}})


BOMB = "a0: &a0 [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    "text", [BOMB, "a: &a [*a]", "[" * 3000, "\x00", "a: !!python/object/apply:os.system [id]", "run: 5", "- 1", "1: 2"]
)
def test_hostile_recipes_are_refused_in_a_line(text: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("over.yaml").write_text(text)
    with pytest.raises(SystemExit) as raised:
        main(["fit", "--config", recipe, "--config", "over.yaml"])
    assert raised.value.code == 2
    said = capsys.readouterr().err.partition("tts-align: error: ")[2]
    assert 0 < len(said) < 2000
    assert "Traceback" not in said


def test_a_fault_of_the_program_is_a_line_and_debug_shows_it(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "false")
    (tmp_path / "odd_objective.py").write_text(
        "from tts_align import Objective\n"
        "class Broken(Objective):\n"
        "    def forward(self, step):\n"
        "        return {}['no key']\n"
    )
    args = ["fit", "--config", recipe, "--objective", "odd_objective.Broken"]
    with pytest.raises(SystemExit) as raised:
        main(args)
    assert raised.value.code == 1
    said = capsys.readouterr().err
    assert "tts-align: error: KeyError: 'no key' (in odd_objective.py, line 4)\n" in said
    assert "it comes from code of yours: --debug shows all of the way" in said
    with pytest.raises(KeyError):
        main([*args, "--debug"])
    assert run  # which leaves faults as they are, for notebooks
