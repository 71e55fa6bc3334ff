# SPDX-License-Identifier: Apache-2.0
"""The contrastive pair: fitted, compared, stored, and gone on with; through the command, as a person would."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import Namespace
from tiny import LORA, checkpoint_weights, gap, make_rows, save_recipe, save_rows, weights

from tts_align.batch import Reads
from tts_align.cli import entry as cli
from tts_align.cli.entry import run
from tts_align.data.records import Row, Span
from tts_align.data.select import select
from tts_align.models.base.layout import collate
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.training import stages
from tts_align.training.cache import TokenCache
from tts_align.training.callbacks.guards import HackingGuard
from tts_align.training.callbacks.keep_best import KeepBest
from tts_align.training.callbacks.keep_last import KeepLast
from tts_align.training.contrast import (
    WEIGHTS,
    Contrast,
    deciding_token,
    describe,
    separation,
    trained_weights,
    undesirable_weight,
)
from tts_align.training.module import AlignModule

pytestmark = [pytest.mark.whole_runs, pytest.mark.filterwarnings("ignore:.*does not have many workers.*")]
WORD = Span(0, 1, ("からい",), ("つらい",))
SIDES = ("desirable", "undesirable")


def marked_rows(**options: Any) -> list[Row]:
    """Rows whose first letter is a marked word, in the first half of the speech."""
    scores = {"target_start": 0.0, "target_end": 0.5}
    return [replace(row, spans=(WORD,), scores=scores) for row in make_rows(**options)]


@pytest.fixture
def recipe(tmp_path: Path, tiny_dropout: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write a recipe of TKTO: four steps for each of π⁺, π⁻ and the policy, which has dropout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tts-align"])
    monkeypatch.delenv(cli.DEBUG, raising=False)
    manifest = save_rows(tmp_path, marked_rows())
    held_out = save_rows(tmp_path, marked_rows(seed=9), "held_out.jsonl")

    def write(**changes: Any) -> str:
        knobs = {"data__validation": held_out, "run__checkpoint_every": 1} | changes
        return save_recipe(tmp_path, "tkto", tiny_dropout, manifest, **knobs)

    return write


def fit(path: str, directory: str, *flags: str) -> Any:
    return run(["fit", "--config", path, "--run.directory", directory, *flags])


def final(directory: str) -> dict[str, torch.Tensor]:
    return checkpoint_weights(Path(directory))


def test_fit_makes_its_own_pair(recipe: Callable[..., str], capsys: pytest.CaptureFixture[str], tiny_dropout: Path):
    done = fit(recipe(), "runs/one")
    said = capsys.readouterr().out
    where = [said.index(words) for words in ("π⁺: KTO on the labels", "π⁻: KTO on the flipped labels", "separation of")]
    assert where == sorted(where)
    assert "separation of the pair on held-out rows" in said
    for side in SIDES:
        assert re.search(rf"{side} rows +[+-]\d\.\d\d \(sd \d\.\d\d\) +[+-]\d\.\d\d \(sd \d\.\d\d\) +\d+\.\d%", said)
    # Both sides have moved, from the same start, in opposite directions.
    start = weights(Qwen2CodecLM(str(tiny_dropout)))
    pair = {side: trained_weights(f"runs/one/contrast/{side}/checkpoints/last.ckpt") for side in SIDES}
    assert gap(start, pair["desirable"]) > 1e-4
    assert gap(start, pair["undesirable"]) > 1e-4
    moved = [torch.cat([(pair[side][key] - start[key]).flatten() for key in start]) for side in SIDES]
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) < -0.1
    # What is stored is log π⁺ − log π⁻ of every row, under both splits, without dropout.
    stored = json.loads(Path("runs/one", WEIGHTS).read_text())["weights"]
    cache = TokenCache.read(Path(stored), done.datamodule.rows())
    model = Qwen2CodecLM(str(tiny_dropout)).eval()
    for key, row in list(done.datamodule.rows().items())[::7]:
        rows, logp = collate([row], model.layout), {}
        for side in SIDES:
            with torch.no_grad(), model.with_weights(pair[side]):
                logp[side] = model(rows).logp[0].numpy()
        np.testing.assert_allclose(cache.numbers[key], logp["desirable"] - logp["undesirable"], atol=1e-5)
    # Then the policy, with its dropout on.
    assert done.trainer.global_step == 4
    assert gap(start, {key.removeprefix("policy."): value for key, value in final("runs/one").items()}) > 1e-4
    assert done.model.policy.backbone.training


def test_the_policy_has_its_dropout_after_the_pair_was_scored(
    recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    modes: list[tuple[str, bool]] = []
    original = AlignModule.training_step

    def step(self: AlignModule, *given: Any) -> Any:
        modes.append((type(self.objective).__name__, self.policy.backbone.training))
        return original(self, *given)

    monkeypatch.setattr(AlignModule, "training_step", step)
    fit(recipe(), "runs/one")
    assert modes == [("KTO", True)] * 8 + [("TKTO", True)] * 4


class KilledError(BaseException):
    """What nobody catches."""


@pytest.mark.parametrize(
    ("at", "lora"),
    [(2, False), (6, False), (10, False), (6, True)],
    ids=["good side", "bad side", "policy", "bad side, adapters"],
)
def test_interrupted_in_any_stage_it_goes_on(
    at: int, lora: bool, recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    """Killed in a step of any of the three fits, the same command ends with the weights of an uninterrupted run."""
    changes = {"model__policy__init_args__lora": {"rank": LORA.rank, "alpha": LORA.alpha}} if lora else {}
    path = recipe(**changes)
    fit(path, "runs/whole")
    steps = [0]
    original = AlignModule.training_step

    def step(self: AlignModule, *given: Any) -> Any:
        steps[0] += 1
        if steps[0] == at:
            raise KilledError
        return original(self, *given)

    monkeypatch.setattr(AlignModule, "training_step", step)
    with pytest.raises(KilledError):
        fit(path, "runs/cut")
    finished = [side for side, end in zip(SIDES, (4, 8), strict=True) if at > end]
    before = {side: Path(f"runs/cut/contrast/{side}/checkpoints/last.ckpt").stat().st_mtime_ns for side in finished}
    capsys.readouterr()
    done = fit(path, "runs/cut")
    assert steps[0] == 13  # twelve steps and the one that died
    for side in finished:  # not fitted again
        assert Path(f"runs/cut/contrast/{side}/checkpoints/last.ckpt").stat().st_mtime_ns == before[side]
    assert ("continuing runs/cut from step 1" in capsys.readouterr().out) == (at == 10)
    assert done.trainer.global_step == 4
    for place in ("", "/contrast/desirable", "/contrast/undesirable"):
        assert gap(final(f"runs/whole{place}"), final(f"runs/cut{place}")) == 0


def test_a_given_pair_or_given_weights_are_used(
    recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path = recipe()
    fit(path, "runs/own")

    def never(*_: Any) -> None:
        raise AssertionError("the pair is there")

    monkeypatch.setattr(stages, "fit_side", never)
    pair = [f"runs/own/contrast/{side}/checkpoints/last.ckpt" for side in SIDES]
    flags = ["--model.contrast.desirable", pair[0], "--model.contrast.undesirable", pair[1]]
    capsys.readouterr()
    fit(path, "runs/pair", *flags)
    assert "separation of the pair on held-out rows" in capsys.readouterr().out
    stored = json.loads(Path("runs/own", WEIGHTS).read_text())["weights"]
    fit(path, "runs/weights", "--model.contrast.weights", stored)
    assert not Path("runs/pair/contrast/desirable").exists()
    assert gap(final("runs/own"), final("runs/pair")) == 0
    assert gap(final("runs/own"), final("runs/weights")) == 0


def test_weights_of_other_data_and_missing_checkpoints_are_named(
    recipe: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = TokenCache(tmp_path, "contrast", {})
    other.numbers["00" * 16] = np.zeros(3, np.float32)
    other.save()
    for flags, message in (
        (["--model.contrast.weights", str(other.path)], r"lacks \d+ of the rows: it was made for other data"),
        (["--model.contrast.weights", "nowhere"], r"no numbers at nowhere: check model\.contrast\.weights"),
        (
            ["--model.contrast.desirable", "a.ckpt", "--model.contrast.undesirable", "b.ckpt"],
            r"no checkpoint at a\.ckpt: check model\.contrast\.desirable",
        ),
        (["--model.contrast.desirable", "a.ckpt"], "names only desirable: a pair needs both"),
    ):
        with pytest.raises(SystemExit) as raised:
            fit(recipe(), "runs/none", *flags)
        assert raised.value.code == 2
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"undesirable": "b"}, "names only undesirable: a pair needs both desirable and undesirable"),
        ({"desirable": "a", "undesirable": "b", "weights": "c"}, "have no effect beside weights"),
    ],
)
def test_half_a_pair_and_both_at_once_are_refused(knobs: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        Contrast(**knobs)


def test_pair_is_fitted_as_told(recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    """Epochs, learning rate, anchor and balance are those of the pair; β is that of TKTO."""
    seen: list[tuple[Any, ...]] = []
    original = AlignModule.on_fit_start

    def start(self: AlignModule) -> None:
        knobs = self.objective
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        labels = self.trainer.datamodule.labels  # type: ignore[attr-defined]
        weight = getattr(knobs, "undesirable_weight", None)
        schedules = self.trainer.lr_scheduler_configs
        falls = schedules[0].scheduler.total_iters if schedules else None
        here = (type(knobs).__name__, self.trainer.max_epochs, lr, falls)
        seen.append((*here, knobs.beta, knobs.sft_weight, weight, labels.sum()))
        original(self)

    monkeypatch.setattr(AlignModule, "on_fit_start", start)
    manifest = save_rows(Path.cwd(), marked_rows(per_side=(2, 1)), "uneven.jsonl")
    flags = ["--objective.beta", "0.2", "--data.manifest", manifest]
    pair = {"epochs": 2, "learning_rate": 0.01, "decay_steps": 7, "sft_weight": 1.5, "balance": "flipped"}
    for key, value in pair.items():
        flags += [f"--model.contrast.{key}", str(value)]
    fit(recipe(), "runs/one", *flags)
    assert seen == [
        ("KTO", 2, 0.01, 7, 0.2, 1.5, 1.0, 16),
        ("KTO", 2, 0.01, 7, 0.2, 1.5, 0.75 * 8 / 16, 8),  # flipped: 8 desirable and 16 undesirable
        ("TKTO", 1, 0.1, None, 0.2, 0.0, 1.0, 16),
    ]


def test_an_average_of_the_weights_is_the_policys_alone(recipe: Callable[..., str]):
    """The two sides of the pair are as far apart as without it."""
    average = [{"class_path": "tts_align.training.callbacks.moving_average.MovingAverage", "init_args": {"decay": 0.9}}]
    fit(recipe(), "runs/plain")
    fit(recipe(trainer__callbacks=average), "runs/averaged")
    for side in SIDES:
        assert gap(*(final(f"runs/{name}/contrast/{side}") for name in ("plain", "averaged"))) == 0
    assert gap(final("runs/plain"), final("runs/averaged")) > 1e-5


class OwnGuard(HackingGuard):
    """A user's guard."""


@pytest.mark.parametrize("several", [False, True])
def test_what_listens_to_the_policy_stays_out_of_the_pair(several: bool):
    named = [Namespace(class_path=f"{kind.__module__}.{kind.__qualname__}") for kind in (KeepBest, OwnGuard, KeepLast)]
    for one in named:
        given = [one] if several else one
        left = stages._without_guards(Namespace(trainer=Namespace(callbacks=given)))["trainer.callbacks"]
        assert left == ([one] if one.class_path.endswith("KeepLast") else [])
    assert stages._without_guards(Namespace(trainer=Namespace(callbacks=None))) == {}


@pytest.mark.parametrize(("good", "bad"), [(3, 1), (1, 6), (5, 5)])
def test_balance(good: int, bad: int):
    weight = undesirable_weight(np.array([True] * good + [False] * bad))
    assert good / (weight * bad) == pytest.approx(4 / 3)


# --- where the pair tells tokens apart ---


def utterance(row: Row) -> Any:
    return select([row], Reads.LABELLED)[0][0]


@pytest.mark.parametrize(
    ("right", "wrong", "place", "token"),
    [
        ("からい", "つらい", (0.25, 0.5), 2),  # the first mora differs: 0.25 of 8 speech tokens
        ("からい", "つらい", (0.3, 0.6), 2),  # 2.4
        ("いたい", "いやい", (0.25, 1.0), 4),  # the second of three morae: 0.25 + 0.75 / 3 = 0.5
        ("からい", "から", (0.25, 1.0), 6),  # the third
        ("からい", "つらい", (1.0, 1.0), 7),  # the end is not a token
        ("からい", "つらい", (0.0, 0.1), 0),
    ],
)
def test_deciding_token(right: str, wrong: str, place: tuple[float, float], token: int):
    row = Row(
        "a",
        "辛い",
        speech=tuple(range(8)),
        desirable=False,
        spans=(Span(0, 2, (right,), (wrong,)),),
        scores={"target_start": place[0], "target_end": place[1]},
    )
    assert deciding_token(utterance(row), 9) == token


@pytest.mark.parametrize(
    "changes",
    [{"scores": {}}, {"spans": ()}, {"spans": (Span(0, 2, ("からい",)),)}, {"spans": (Span(0, 2),)}],
)
def test_without_a_marked_and_located_word_there_is_none(changes: dict[str, Any]):
    scores = {"target_start": 0.2, "target_end": 0.4}
    row = Row("a", "辛い", speech=(1, 2), desirable=True, spans=(Span(0, 2, ("か",), ("つ",)),), scores=scores)
    assert deciding_token(utterance(row), 3) is not None
    assert deciding_token(utterance(replace(row, **changes)), 3) is None


def test_separation_by_hand(tmp_path: Path):
    cache = TokenCache(tmp_path, "contrast", {})
    rows = marked_rows(sentences=1, per_side=(1, 2), longest=9)
    bare = replace(rows[2], spans=(), scores={})
    sources = {key: utterance(row) for key, row in zip("abc", (*rows[:2], bare), strict=True)}
    cache.numbers = {
        "a": np.array([1.0, 2.0, 3.0], np.float32),
        "b": np.array([-5.0, 0.5, 0.5], np.float32),
        "c": np.array([0.0, 0.0], np.float32),
    }
    found = separation(cache, sources)
    assert found["desirable"].target.tolist() == [1.0]
    assert found["desirable"].elsewhere.tolist() == [2.0, 3.0]
    assert found["undesirable"].target.tolist() == [-5.0]
    assert found["undesirable"].elsewhere.tolist() == [0.5, 0.5, 0.0, 0.0]
    table = describe(found, -2.0, 2.0).splitlines()
    assert re.search(r"desirable rows +\+1\.00 \(sd 0\.00\) +\+2\.50 \(sd 0\.50\) +66\.7%", table[1])
    assert re.search(r"undesirable rows +-5\.00 \(sd 0\.00\) +\+0\.25 \(sd 0\.25\) +20\.0%", table[2])


def test_nothing_marked_is_said(tmp_path: Path):
    nothing = separation(TokenCache(tmp_path, "contrast", {}), {})
    assert describe(nothing, -2.0, 2.0).count("none marked") == 4
