# SPDX-License-Identifier: Apache-2.0
"""What a command takes from an earlier run: its checkpoint, its contrastive pair, its test results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from tts_align.cli.places import leaves
from tts_align.evaluation.html.report import REPORT
from tts_align.evaluation.reward import print_numbers
from tts_align.evaluation.table import print_table
from tts_align.objectives import Part
from tts_align.training.contrast import SIDES, Contrast
from tts_align.training.run import REWARD_NUMBERS, SUMMARY, Run, changed
from tts_align.training.stages import prepare_contrast
from tts_align.utils.messages import say
from tts_align.utils.readers import load_yaml, read_json_object, read_yaml

TESTED_WITH = ("model.test", "model.vocoder", "model.judge", "model.sampling", "data.validation")
"""Keys of a recipe that change what a test says of a finished training."""


@runtime_checkable
class Restoring(Protocol):
    """A command of a recipe: the module it has built, and the run it belongs to."""

    model: Any
    run: Run


def checkpoint_of(run: Run, given: str | Path | None) -> Path:
    """The checkpoint to look at: the one given, or the run's: the one that was heard best, or the last.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = Path(given) if given else run.chosen
    if not path.exists():
        raise FileNotFoundError(
            f"no checkpoint at {path}: "
            + ("check --ckpt_path" if given else "train first with `tts-align fit`, or pass --ckpt_path")
        )
    return path


def own_checkpoint(run: Run, given: str | Path | None, recipes: Sequence[Any], policy: Any) -> Path | None:
    """The checkpoint that ``sample`` and ``judge`` take, and a line that says so; ``None`` for the policy as it is.

    A run's own recipe stands for what the run has trained, unless another policy is named with it.

    Args:
        run: the recipe's.
        given: ``--ckpt_path``.
        recipes: files that ``--config`` names.
        policy: ``model.policy`` of the parsed recipe, as plain values.
    """
    if given is not None:
        path = checkpoint_of(run, given)
        say(f"policy:       {path}")
        return path
    if not run.recipe.is_file() or all(Path(str(one)).resolve() != run.recipe.resolve() for one in recipes):
        return None
    if read_yaml(run.recipe)["model"]["policy"] != json.loads(json.dumps(policy, default=str)):
        say(f"policy:       as model.policy names it, which is not that of {run.directory}: its checkpoint is not used")
        return None
    newest = run.newest()
    if newest is None:
        say(f"policy:       as model.policy names it: {run.directory} has no checkpoint yet")
        return None
    path = checkpoint_of(run, None)
    say(f"policy:       {path}")
    return path


def restore_contrast(cli: Restoring) -> None:
    """Give a module whose objective needs them the token weights of the run's own pair, or of the recipe's.

    Raises:
        FileNotFoundError: the run has no pair yet.
    """
    model = cli.model
    if Part.CONTRAST not in model.objective.needs:
        return
    contrast = model.contrast or Contrast()
    if contrast.fits:
        pair = {side: Run(cli.run.directory / "contrast" / side).checkpoint for side in SIDES}
        missing = [str(path) for path in pair.values() if not path.exists()]
        if missing:
            raise FileNotFoundError(f"no contrastive pair at {missing[0]}: run `tts-align fit` on this recipe first")
        contrast.desirable, contrast.undesirable = (str(pair[side]) for side in SIDES)
    model.contrast = contrast
    prepare_contrast(cast("Any", cli))


def stored_test(run: Run, recipe: str) -> Mapping[str, Any] | None:
    """Results of the test of a finished training; ``None`` if there are none, or if they would be others now.

    Args:
        run: where they are, with the recipe they were made with.
        recipe: today's, as YAML.
    """
    found = [path for path in (run.test / SUMMARY, run.test / REWARD_NUMBERS) if path.is_file()]
    made_of = [path for path in (run.checkpoint, run.choice) if path.exists()]
    if not found or not run.checkpoint.exists():
        return None
    if found[0].name == SUMMARY and not (run.test / REPORT).is_file():  # its last file: a kill came between
        return None
    if any(found[0].stat().st_mtime < path.stat().st_mtime for path in made_of):
        return None
    old, new = read_yaml(run.recipe), load_yaml(recipe)
    named = [value for key, value in leaves(new) if value and key.startswith(TESTED_WITH)]
    if any(found[0].stat().st_mtime < _last_changed(Path(value)) for value in named):
        return None
    if any(key.startswith(TESTED_WITH) for key, *_ in changed(old, new)):
        return None
    return read_json_object(found[0])


def _last_changed(path: Path) -> float:
    """When a file, or any in a directory, was last changed or put there; long ago if there is none."""
    files = path.rglob("*") if path.is_dir() else [path]
    return max((one.stat().st_ctime for one in files if one.is_file()), default=0.0)


def show_test(results: Mapping[str, Any]) -> None:
    """Print the results of a test, of a policy or of a reward model."""
    print_table(results) if "failed" in results else print_numbers(results)
