# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from tts_align.training.callbacks.figures import (
    History,
    TokenRewards,
    history,
    likelihood_figure,
    read_history,
    reward_figure,
    weight_figure,
)

KANA = [("か", 0, 3), ("れ", 3, 5), ("ー", 5, 7), ("つ", 7, 10)]


def is_drawn(path):
    """A PNG in which something dark or coloured stands on white."""
    from matplotlib.image import imread

    picture = imread(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    return min(picture.shape[:2]) > 200 and 0.01 < (picture[..., :3].min(-1) < 0.8).mean() < 0.6


def rewards(mean, count=50):
    generator = np.random.default_rng(0)
    return TokenRewards(generator.normal(mean, 1, count), np.split(generator.normal(0, 1, 10 * count), 5))


def test_likelihoods(tmp_path):
    step = np.arange(0, 200, 10)
    curves = History(step, -0.5 + step / 1e3, np.where(step == 50, np.nan, -0.6 - step / 1e3))
    assert is_drawn(likelihood_figure(curves, tmp_path / "test" / "likelihood.png"))


def test_likelihoods_of_one_kind_only(tmp_path):
    curves = history({0: -0.5, 10: -0.4}, {})
    assert is_drawn(likelihood_figure(curves, tmp_path / "one.png"))


def test_rewards(tmp_path):
    assert is_drawn(reward_figure(rewards(2), rewards(-6), tmp_path / "rewards.png"))


def test_rewards_without_targets(tmp_path):
    empty = TokenRewards(np.zeros(0), [np.zeros(0)])
    assert is_drawn(reward_figure(rewards(2, 1), empty, tmp_path / "rewards.png"))


@pytest.mark.parametrize("seconds", [None, 0.04])
def test_weights(tmp_path, seconds):
    weights = np.exp(np.random.default_rng(0).normal(size=10))
    path = weight_figure(weights, KANA, tmp_path / "weights.png", (7, 10), seconds_per_token=seconds)
    assert is_drawn(path)


def test_labels_need_no_font_with_kana(tmp_path, recwarn):
    """Matplotlib warns of every letter that its font lacks."""
    weight_figure([1.0] * 10, KANA, tmp_path / "weights.png", title="karē")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_history_is_read_from_the_logs_of_a_run_and_its_continuation(tmp_path):
    for first, shift in ((0, 0.0), (20, -1.0)):
        with SummaryWriter(str(tmp_path), filename_suffix=str(first)) as writer:
            for step in (first, first + 10, first + 20):
                writer.add_scalar("train/desirable_logp", -0.5 + shift, step)
                if step % 20 == 0:
                    writer.add_scalar("train/undesirable_logp", -0.7 + shift, step)
    curves = read_history(tmp_path)
    assert curves.step.tolist() == [0, 10, 20, 30, 40]
    assert curves.desirable == pytest.approx([-0.5, -0.5, -1.5, -1.5, -1.5])
    assert np.isnan(curves.undesirable).tolist() == [False, True, False, True, False]


def test_logs_without_likelihoods(tmp_path):
    with pytest.raises(FileNotFoundError, match="no likelihoods are logged"):
        read_history(tmp_path)
