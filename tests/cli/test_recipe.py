"""Sections of an overlay that hold for one objective only."""

from pathlib import Path

import pytest
import yaml
from places import RECIPES, ROOT

from tts_align.cli.entry import run
from tts_align.cli.recipe import expand_sections, full_path, load_recipe

OVERLAY = {"trainer": {"max_epochs": 2}, "by_objective": {"sft": {"data": {"seed": 1}}, "tkto": {"data": {"seed": 2}}}}


@pytest.fixture
def write(tmp_path: Path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write


def sections(args):
    """What was put in, as (place, content)."""
    return [(at, yaml.safe_load(arg)) for at, arg in enumerate(expand_sections(args)) if "\n" in arg]


@pytest.mark.parametrize("objective", ["tkto", {"name": "tkto"}, {"class_path": "tts_align.objectives.tkto.TKTO"}])
def test_the_section_of_the_chosen_objective_follows_its_overlay(write, objective):
    recipe, overlay = write("a.yaml", {"objective": objective}), write("b.yaml", OVERLAY)
    args = ["fit", "--config", recipe, "-c", overlay, "--data.seed", "3"]
    assert sections(args) == [(6, {"data": {"seed": 2}})]
    expanded = expand_sections(args)
    assert expanded[5] == "--config"
    assert [arg for at, arg in enumerate(expanded) if at not in (5, 6)] == args  # later flags still have the last word


def test_the_objective_named_last_counts_wherever_it_is_named(write):
    recipe, overlay = write("a.yaml", {"objective": "tkto"}), write("b.yaml", OVERLAY)
    by_flag = ["fit", f"--config={recipe}", f"--config={overlay}"]
    assert sections([*by_flag, "--objective", "sft"])[0][1] == {"data": {"seed": 1}}
    assert sections([*by_flag, "--objective=sft"])[0][1] == {"data": {"seed": 1}}
    assert sections([*by_flag, "--objective", "dpo"]) == []  # the overlay has nothing to say about it
    assert sections(["sample", "--config", overlay]) == []  # no objective at all


def test_an_overlay_without_sections_changes_nothing_and_an_unreadable_one_is_named(write, capsys):
    args = ["fit", "--config", write("a.yaml", {"objective": "sft"}), "--config", write("b.yaml", {"data": {}})]
    assert expand_sections(args) == args
    with pytest.raises(SystemExit):
        expand_sections(["fit", "--config", args[2], "--config", write("b.yaml", "a: [")])
    assert "b.yaml: not YAML: while parsing" in capsys.readouterr().err
    assert expand_sections(["fit", "--config", "nowhere.yaml"]) == ["fit", "--config", "nowhere.yaml"]


def test_a_section_for_no_objective_is_a_mistake(write, capsys):
    overlay = write("b.yaml", {"by_objective": {"tkot": {}}})
    with pytest.raises(SystemExit):
        expand_sections(["fit", "--config", overlay, "--objective", "sft"])
    assert "did you mean 'tkto'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ([1], "by_objective: expected a section for each objective, got [1]"),
        (None, "by_objective: expected a section for each objective, got None"),
        ({5: {"data": {}}}, "by_objective: expected the name of an objective, got 5"),
        ({"dpo": "x"}, "by_objective.dpo: expected names and values, got 'x'"),
        ({"dpo": [1]}, "by_objective.dpo: expected names and values, got [1]"),
        ({"dpo": {1: 2}}, "by_objective.dpo: expected names and values, got 1 for a name"),
        ({"sft": {}, "dpo": {"data": 3}}, "by_objective.dpo.data: expected names and values, got 3"),
    ],
)
def test_sections_that_are_none_are_refused_when_recipes_are_read(write, capsys, sections, message):
    overlay = write("b.yaml", {"by_objective": sections})
    with pytest.raises(SystemExit) as raised:
        run(["fit", "--config", write("a.yaml", {"objective": "sft"}), "--config", overlay])
    assert raised.value.code == 2
    said = capsys.readouterr().err
    assert f"b.yaml: {message}" in said
    assert said.count("\n") == 1


def test_a_section_without_values_changes_nothing(write):
    overlay = write("b.yaml", {"by_objective": {"sft": None}})
    args = ["fit", "--config", overlay, "--objective", "sft"]
    assert expand_sections(args) == args


def test_sections_are_no_option_of_the_parser():
    assert load_recipe(yaml.safe_dump(OVERLAY)) == {"trainer": {"max_epochs": 2}}


def test_cosyvoice_is_short_for_its_class():
    assert load_recipe("model: {policy: {class_path: cosyvoice}}")["model"]["policy"]["class_path"] == full_path(
        "CosyVoiceLM"
    )
    assert full_path("cosyvoice") == "tts_align.models.cosyvoice.lm.CosyVoiceLM"


def test_both_overlays_of_cosyvoice_say_the_same():
    folder = RECIPES / "models"
    second, third = ((folder / f"cosyvoice{version}.yaml").read_text() for version in "23")
    body = second.partition("\nrun:")[2]
    assert body.replace("cosyvoice2", "cosyvoice3") == third.partition("\nrun:")[2]
    assert set(yaml.safe_load(second)["by_objective"]) >= {"sft", "dpo", "kto", "tkto"}


@pytest.mark.parametrize(("objective", "rate"), [("sft", 1e-5), ("dpo", 1e-6), ("kto", 1e-6), ("tkto", 1e-6)])
def test_the_overlay_puts_the_papers_constants_in_place_of_the_embedded_models(objective, rate):
    """Whatever the recipe beneath sets for a small model is set again, or taken back."""
    from jsonargparse import Namespace

    from tts_align.cli.lightning import AlignCLI

    class Parsed(AlignCLI):
        def instantiate_classes(self):
            self.model = self.datamodule = self.trainer = None

        def _run_subcommand(self, subcommand):
            self.seen: Namespace = self.config[subcommand]

    recipes = [f"recipes/{objective}.yaml", "recipes/models/cosyvoice2.yaml"]
    args = ["fit", *(part for path in recipes for part in ("--config", str(ROOT / path)))]
    seen = Parsed([*args, "--model.policy.init_args.directory", "DIR", "--data.manifest", "FILE"]).seen
    assert seen.run.directory == f"runs/cosyvoice2-{objective}"
    assert seen.model.optimizer.init_args.lr == rate
    assert (seen.data.rows_per_step, seen.data.tokens_per_micro_batch) == (32, 2000)
    assert seen.model.policy.init_args.directory == "DIR"
    for unset in ("judge", "test", "lr_scheduler"):
        assert seen.model[unset] is None
    assert seen.model.vocoder.init_args.directory is None
    knobs = seen.objective.get("init_args")
    if objective == "tkto":
        assert (knobs.beta, knobs.mu, knobs.lower, knobs.upper, knobs.sft_weight) == (0.1, 1, -2, 2, 0)
        assert (seen.model.contrast.sft_weight, seen.model.contrast.balance) == (0, "neither")
    elif objective != "sft":
        assert (knobs.beta, knobs.sft_weight) == (0.1, 0)


@pytest.mark.parametrize(
    ("overlay", "flags", "expected"),
    [
        ("{class_path: torch.optim.SGD, init_args: {lr: 1}}", [], {"lr": 1.0, "weight_decay": 0, "momentum": 0}),
        ("torch.optim.Adagrad", [], {"weight_decay": 0, "eps": 1e-10}),
        ("{init_args: {lr: 2}}", [], {"lr": 2.0, "weight_decay": 0.01}),
        ("{class_path: torch.optim.SGD}", ["--model.optimizer.weight_decay=0.3"], {"weight_decay": 0.3}),
        ("{class_path: torch.optim.SGD, init_args: {weight_decay: 0.2}}", [], {"weight_decay": 0.2}),
    ],
)
def test_an_optimiser_has_its_own_defaults(
    overlay: str, flags: list[str], expected: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of AdamW, with which the parser begins, are not those of another one."""
    path = tmp_path / "over.yaml"
    path.write_text(f"model: {{optimizer: {overlay}}}\n")
    with pytest.raises(SystemExit):
        run(["fit", "--config", "dpo", "--config", str(path), *flags, "--print_config"])
    arguments = yaml.safe_load(capsys.readouterr().out)["model"]["optimizer"]["init_args"]
    assert {name: arguments[name] for name in expected} == expected
