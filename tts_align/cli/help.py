# SPDX-License-Identifier: Apache-2.0
"""What ``tts-align COMMAND --help`` prints: read from the source, so that nothing heavy is imported for it."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Any

from tts_align.cli.commands import ARGUMENTS, COMMANDS, DESCRIPTIONS, OF_A_RECIPE, TRAINER_DEFAULTS

PACKAGE = Path(__file__).parents[1]
TRAINER_HELP = "--help.trainer"
_FOLLOWS = "follows the objective"
_INDENT = 30
_NARROWEST, _WIDEST = 80, 120


@dataclass(frozen=True)
class Source:
    """Where options are defined: the arguments of a class's constructor, of a function or of a method.

    Args:
        file: path of the source file, from the package's folder.
        name: class or function.
        method: method of the class instead of its constructor.
        prefix: what stands before an option's name on the command line, such as ``run.``.
        hidden: arguments that do not come from the command line.
    """

    file: str
    name: str
    method: str = ""
    prefix: str = ""
    hidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Args:
        name: as it is written, with its dashes.
        text: what it is.
        default: as it stands in the source; empty when there is none to show.
        required: whether it must be given.
    """

    name: str
    text: str
    default: str = ""
    required: bool = False

    def lines(self, width: int) -> list[str]:
        """The option as help shows it, no wider than ``width``."""
        told = f" (default: {self.default})" if self.default and "default" not in self.text else ""
        text = f"{self.text}{' (required)' if self.required else told}"
        wrapped = textwrap.wrap(text, width - _INDENT, break_on_hyphens=False) or [""]
        first = f"  {self.name}"
        apart = len(first) >= _INDENT
        head = [first] if apart else [f"{first:{_INDENT}}{wrapped[0]}".rstrip()]
        return head + [" " * _INDENT + line for line in (wrapped if apart else wrapped[1:])]


OF_THE_RECIPE = {
    "the run": Source("training/run.py", "RunSettings", prefix="run."),
    "the models": Source("training/module.py", "AlignModule", prefix="model.", hidden=("objective",)),
    "the data": Source("data/datamodule.py", "AlignData", prefix="data.", hidden=("wants",)),
}
"""Groups of options that every command of a recipe has."""

GENERAL = {
    True: (
        Option("--config, -c RECIPE", "recipe to use: a YAML file, or a packaged one by name (tts-align recipes)"),
        Option("--objective NAME", "objective to optimise: a registered name, or the import path of a class of yours"),
        Option("--seed_everything SEED", "seed of everything random that has no seed of its own", "0"),
        Option("--print_config", "print the recipe in full and exit; --print_config=skip_default without defaults"),
        Option("--debug", "show where in the code an error comes from"),
    ),
    False: (
        Option("--config, -c FILE", "YAML file with these options"),
        Option("--debug", "show where in the code an error comes from"),
    ),
}  # fmt: skip
"""Options that no class defines: of a command with a recipe, and of one without."""

_COPY = Option("--copy DIR", "folder to copy the recipes to; without it they are listed; files there stay as they are")
_CKPT = Option("--ckpt_path FILE", "checkpoint to use; by default the run's last one")
_TRAINER = "cli/trainer.py", "AlignTrainer"
_LIGHTNINGS = ("fit", "validate", "test", "predict")
OWN: dict[str, tuple[Source, ...]] = {
    "sample": (Source(*_TRAINER, "sample", hidden=("model",)),),
    "judge": (Source(*_TRAINER, "judge", hidden=("model", "ckpt_path")),),
    "export": (Source(*_TRAINER, "export", hidden=("model", "manifest", "report")),),
    "prepare": (
        Source("cli/prepare.py", "prepare", hidden=("trainer",)),
        Source("cli/prepare.py", "Processes", prefix="trainer."),
    ),
    "label": (Source("cli/label.py", "label", hidden=("rule",)), Source("cli/label.py", "LabelRule", prefix="rule.")),
    "score": (
        Source("cli/score.py", "score", hidden=("trainer",)),
        Source("cli/prepare.py", "Processes", prefix="trainer."),
    ),
    "compare": (Source("cli/compare.py", "compare"),),
    "listen make": (
        Source("cli/listen.py", "make", hidden=("plan",)),
        Source("evaluation/listening_test/design.py", "Plan", prefix="plan."),
    ),
    "listen score": (
        Source("cli/listen.py", "score", hidden=("rules",)),
        Source("evaluation/listening_test/screening.py", "Rules", prefix="rules."),
    ),
    "listen label": (
        Source("cli/listen.py", "label", hidden=("rule", "rules")),
        Source("evaluation/listening_test/labels.py", "HumanRule", prefix="rule."),
        Source("evaluation/listening_test/screening.py", "Rules", prefix="rules."),
    ),
    "demo build": (Source("cli/demo/command.py", "build_demo"),),
}
"""Options of one command only."""

_FOOT = (
    "What an option takes is listed by .help behind it, and a class: --objective.help tkto, --model.policy.help "
    "CosyVoiceLM, --model.judge.help CTCJudge, --model.sampling.help, --model.test.help and so on.",
    "Lightning's trainer (trainer.accelerator, devices, precision, max_epochs, callbacks, ...): "
    "tts-align {command} --help.trainer",
)


def wanted(args: Sequence[str]) -> bool:
    """Whether a command line asks for help about its command."""
    return bool({"-h", "--help", TRAINER_HELP} & set(args))


def show(command: str, trainer: bool = False) -> str:
    """The help of a command.

    Args:
        command: its name.
        trainer: show the options of Lightning's trainer instead of the command's.
    """
    width = max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns))
    recipe = command in OF_A_RECIPE
    about = DESCRIPTIONS.get(command) or f"{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}."
    words = ["--config RECIPE" if recipe else "", ARGUMENTS.get(command, "")]
    usage = " ".join(filter(None, ["usage: tts-align", command, *words, "[options]"]))
    parts = [usage, "", *textwrap.wrap(about, width)]
    if trainer:
        parts += _section("Lightning's trainer", _trainer_options(), width)
        return "\n".join(parts) + "\n"
    own = [option for source in OWN.get(command, ()) for option in options(source)]
    own += [_CKPT] if command in _LIGHTNINGS else []
    general = GENERAL[recipe] if command != "recipes" else (_COPY, GENERAL[False][-1])
    parts += _section("options", [*own, *general], width)
    if recipe:
        for title, source in OF_THE_RECIPE.items():
            parts += _section(title, options(source), width)
        for line in _FOOT:
            parts += ["", *textwrap.wrap(line.format(command=command), width)]
    return "\n".join(parts) + "\n"


def _section(title: str, given: Sequence[Option], width: int) -> list[str]:
    return ["", f"{title}:", *(line for option in given for line in option.lines(width))]


def options(source: Source) -> list[Option]:
    """Options that a class or function makes, in the order of its arguments; what follows the objective is left out."""
    file = PACKAGE / source.file
    node = _find(ast.parse(file.read_text("utf-8")), source.name)
    documented = signature = node
    if isinstance(node, ast.ClassDef) and source.method:
        documented = signature = _find(node, source.method)
    elif isinstance(node, ast.ClassDef):
        found = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
        signature = found[0] if found else node
    texts = _argument_texts(ast.get_docstring(documented) or "")
    return [
        Option(f"--{source.prefix}{name}", texts.get(name, ""), _shown(default, file), required=default == "")
        for name, default in _defaults(signature)
        if name not in source.hidden and _FOLLOWS not in texts.get(name, "")
    ]


def _find(tree: ast.AST, name: str) -> ast.ClassDef | ast.FunctionDef:
    kinds = ast.ClassDef, ast.FunctionDef
    return next(one for one in ast.iter_child_nodes(tree) if isinstance(one, kinds) and one.name == name)


def _defaults(node: ast.ClassDef | ast.FunctionDef) -> Iterator[tuple[str, str]]:
    """Name and default of each argument, or of each field of a record; the default is empty where there is none."""
    if isinstance(node, ast.ClassDef):
        for one in node.body:
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and one.target.id[0] != "_":
                yield one.target.id, ast.unparse(one.value) if one.value else ""
        return
    names = [argument.arg for argument in node.args.args]
    values = [""] * (len(names) - len(node.args.defaults)) + [ast.unparse(value) for value in node.args.defaults]
    yield from ((name, value) for name, value in zip(names, values, strict=True) if name != "self")


def _shown(default: str, file: Path | None = None) -> str:
    """A default as a person would write it in a recipe; what is plainly nothing is not shown.

    Args:
        default: as it stands in the source.
        file: where it stands, for constants.
    """
    if default in ("", "None", "()") or default.startswith("field("):  # of an empty record
        return ""
    default = re.sub(r"^Path\((.*)\)$", r"\1", default)
    if re.fullmatch(r"(\w+\.)?[A-Z][A-Z_]+", default):
        default = "" if file is None else _constant(default, file)
    try:
        return _written(ast.literal_eval(default)) if default else ""
    except (ValueError, SyntaxError):
        return default


def _written(value: Any) -> str:
    """A value as a recipe holds it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_written, value))}]"
    return str(value)


def _constant(name: str, file: Path) -> str:
    """Source of what a constant holds, where that is a plain value; of a file itself, or of what it imports of ours."""
    module, _, name = name.rpartition(".")
    tree = ast.parse(file.read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(PACKAGE.name):
            if (module or name) in [alias.name for alias in node.names]:
                path = f"{node.module}.{module}".strip(".").replace(".", "/")
                return _constant(name, PACKAGE.parent / f"{path}.py")
        elif isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return ast.unparse(node.value) if isinstance(node.value, (ast.Constant, ast.UnaryOp)) else ""
    return ""


def _argument_texts(docstring: str) -> dict[str, str]:
    """Description of each argument in a docstring of Google's style."""
    _, _, section = docstring.partition("Args:\n")
    section = re.split(r"\n(?=\S)", section)[0]  # up to the next heading
    texts: dict[str, str] = {}
    for block in re.split(r"\n(?=\w+: )", f"\n{textwrap.dedent(section)}"):
        name, colon, text = block.strip().partition(":")
        if colon:
            texts[name] = _plain(text)
    return texts


def _plain(text: str) -> str:
    """Words without the marks of the documentation's source."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?([\w]+)`", r"\1", text)
    return " ".join(text.replace("``", "").split()).rstrip(".")


def _trainer_options() -> list[Option]:
    """Options of Lightning's trainer: the first sentence of each, and its default here."""
    spec = importlib.util.find_spec("lightning")  # finds it without importing it
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "pytorch/trainer/trainer.py"
    node = _find(_find(ast.parse(path.read_text("utf-8")), "Trainer"), "__init__")
    assert isinstance(node, ast.FunctionDef)
    section = cleandoc(ast.get_docstring(node) or "").partition("Args:\n")[2].partition("\nRaises:")[0]
    texts = {}
    for block in re.split(r"\n(?=\w+: )", f"\n{textwrap.dedent(section)}"):
        name, _, text = block.strip().partition(":")
        texts[name] = _plain(re.split(r"\n\s*\n|\.\s|Default:", text.strip())[0])
    values = [ast.unparse(value) if value else "" for value in node.args.kw_defaults]
    return [
        Option(f"--trainer.{name}", texts.get(name, ""), _shown(str(TRAINER_DEFAULTS.get(name, value))))
        for name, value in zip((argument.arg for argument in node.args.kwonlyargs), values, strict=True)
    ]
