# SPDX-License-Identifier: Apache-2.0
"""A CosyVoice2 or Fun-CosyVoice3 directory as it is downloaded: which of them it is, its numbers, its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tts_align.models.base.layout import Family
from tts_align.models.cosyvoice.plain_yaml import read_plain_yaml
from tts_align.utils.readers import load_safetensors, load_tensors, read_json

BACKBONE = "CosyVoice-BlankEN"
COUNTERS = ("epoch", "step")
"""Numbers that the published training code writes between the weights."""
_FAMILIES: tuple[Family, ...] = ("cosyvoice2", "cosyvoice3")


@dataclass(frozen=True)
class Frames:
    """Rates and sizes of speech tokens and mel frames.

    Args:
        sample_rate: of the sound, in Hz.
        tokens_per_second: speech tokens.
        frames_per_token: mel frames for each speech token.
        mel_channels: of a mel frame.
        fft_samples: length of the Fourier transform and of its window.
        hop_samples: from one mel frame to the next.
        fmin: lower edge of the lowest mel channel, in Hz.
        fmax: upper edge of the highest; ``None`` for half the sample rate.
    """

    sample_rate: int = 24000
    tokens_per_second: int = 25
    frames_per_token: int = 2
    mel_channels: int = 80
    fft_samples: int = 1920
    hop_samples: int = 480
    fmin: float = 0.0
    fmax: float | None = None


@dataclass(frozen=True)
class ModelDirectory:
    """A directory with a CosyVoice2 or Fun-CosyVoice3 model; made by :meth:`find`.

    Args:
        path: where it lies.
        family: which of them it is.
        config: its yaml as plain data: numbers, texts, lists and dictionaries.
    """

    path: Path
    family: Family
    config: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def find(cls, path: str | Path) -> ModelDirectory:
        """Look into a directory.

        Args:
            path: of the directory.

        Raises:
            FileNotFoundError: there is no such directory.
            ValueError: it holds neither ``cosyvoice2.yaml`` nor ``cosyvoice3.yaml``, or both, or one that is damaged.
        """
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"no directory {path}: expected that of a CosyVoice2 or Fun-CosyVoice3 model")
        found = [family for family in _FAMILIES if (path / f"{family}.yaml").is_file()]
        if len(found) == 1:
            return cls(path, found[0], read_plain_yaml(path / f"{found[0]}.yaml"))
        if found:
            raise ValueError(f"{path} holds {' and '.join(f'{name}.yaml' for name in found)}: keep the right one")
        if (path / "cosyvoice.yaml").is_file():
            raise ValueError(f"{path} holds the first CosyVoice; expected CosyVoice2 or Fun-CosyVoice3")
        raise ValueError(
            f"{path} is not a CosyVoice directory: expected cosyvoice2.yaml or cosyvoice3.yaml in it{_listing(path)}"
        )

    @property
    def backbone(self) -> Path:
        """Directory of the text model, from which config and tokenizer are read.

        Raises:
            FileNotFoundError: it is missing, or has no ``config.json``.
        """
        return self.file(f"{BACKBONE}/config.json").parent

    def file(self, name: str) -> Path:
        """Path of one of the directory's files.

        Args:
            name: of the file, relative to the directory.

        Raises:
            FileNotFoundError: it is not there; the message lists what is.
        """
        path = self.path / name
        if not path.is_file():
            folder = path.parent if path.parent.is_dir() else self.path
            raise FileNotFoundError(f"{self.path} has no {name}: was it downloaded completely?{_listing(folder)}")
        return path

    @property
    def frames(self) -> Frames:
        """Rates and sizes as the yaml gives them, or those of the published models where it is silent.

        Raises:
            ValueError: they contradict each other.
        """
        mel = self._section("feat_extractor")
        fmax = mel["fmax"] if "fmax" in mel else {"cosyvoice2": 8000, "cosyvoice3": None}[self.family]
        frames = Frames(
            sample_rate=int(self._number(self.config, "sample_rate", 24000)),
            tokens_per_second=int(self._number(self.config, "token_frame_rate", 25)),
            frames_per_token=int(self._number(self.config, "token_mel_ratio", 2)),
            mel_channels=int(self._number(mel, "num_mels", 80)),
            fft_samples=int(self._number(mel, "n_fft", 1920)),
            hop_samples=int(self._number(mel, "hop_size", 480)),
            fmin=float(self._number(mel, "fmin", 0.0)),
            fmax=None if fmax is None else float(self._number(mel, "fmax", fmax)),
        )
        samples = frames.tokens_per_second * frames.frames_per_token * frames.hop_samples
        if samples != frames.sample_rate:
            raise ValueError(
                f"{self._yaml}: token_frame_rate * token_mel_ratio * hop_size must give sample_rate, "
                f"got {samples} and {frames.sample_rate}"
            )
        return frames

    @property
    def codebook_size(self) -> int:
        """Size of the speech codebook."""
        return int(self._number(self._section("llm"), "speech_token_size", 6561))

    @property
    def _yaml(self) -> Path:
        return self.path / f"{self.family}.yaml"

    def _section(self, name: str) -> Mapping[str, Any]:
        section = self.config.get(name)
        return section if isinstance(section, Mapping) else {}

    def _number(self, section: Mapping[str, Any], name: str, default: int | float) -> int | float:
        value = section.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{self._yaml}: expected a number for {name}, got {value!r}")
        return value


def _listing(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"; {path.name or path} holds {', '.join(names[:20]) or 'nothing'}{more}"


def load_state(path: str | Path) -> dict[str, Tensor]:
    """Weights of a ``.pt`` or ``.safetensors`` file, on the CPU, mapped from the file where it allows that.

    The counters ``epoch`` and ``step`` of training checkpoints are left out. Code in a file is never run.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or does not hold tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a directory (of DeepSpeed?): export it to one file first" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"expected a file of weights, but {path} {what}")
    state = load_safetensors(path) if path.suffix == ".safetensors" else load_tensors(path)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} does not hold tensors by name, but {type(state).__name__}")
    weights = {name: value for name, value in state.items() if name not in COUNTERS or isinstance(value, Tensor)}
    if odd := {name: value for name, value in weights.items() if not isinstance(value, Tensor)}:
        name, value = next(iter(odd.items()))
        raise ValueError(
            f"{path} does not hold tensors only: {len(odd)} of {len(weights)} entries are others, such as {name!r} "
            f"({type(value).__name__}); expected a flat file of weights like llm.pt"
        )
    if not weights:
        raise ValueError(f"{path} holds no weights")
    return weights


@dataclass(frozen=True)
class BackboneSizes:
    """Sizes of the Qwen2 text model inside, as its ``config.json`` gives them.

    Args:
        hidden_size: width.
        layers: number of blocks.
        heads: attention heads.
        key_value_heads: heads of keys and values (grouped-query attention).
        intermediate_size: width inside the feed-forward layers.
        vocabulary: rows of the text embedding.
        rope_theta: base of the rotary positions.
        rms_norm_eps: of the normalisation.
        attention_dropout: of attention weights, in training.
    """

    hidden_size: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate_size: int
    vocabulary: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    attention_dropout: float = 0.0


_FRACTIONS = ("rope_theta", "rms_norm_eps", "attention_dropout")


def backbone_sizes(directory: str | Path) -> BackboneSizes:
    """Sizes in a ``config.json`` of transformers 4 or 5.

    Args:
        directory: of the text model.

    Raises:
        FileNotFoundError: there is no ``config.json`` in it.
        ValueError: it is damaged, or that of another kind of model.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: expected the config of the text model")
    config: Any = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected the config of a qwen2 model, got {type(config).__name__!r}")
    return read_backbone_sizes(config, str(path))


def read_backbone_sizes(config: Mapping[str, Any], path: str = "config") -> BackboneSizes:
    """Sizes in what a ``config.json`` holds.

    Args:
        config: its content.
        path: what errors call it.

    Raises:
        ValueError: it lacks something, or is that of another kind of model.
    """
    kind = config.get("model_type", "qwen2")
    if kind != "qwen2":
        raise ValueError(f"{path}: expected the config of a qwen2 model, got {kind!r:.60}")
    rope = config.get("rope_parameters") or {}  # where transformers 5 keeps it
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    if lacking := [name for name in needed if name not in config]:
        raise ValueError(f"{path} lacks {', '.join(lacking)}")
    if not isinstance(rope, Mapping):
        raise ValueError(f"{path}: expected names and values for rope_parameters, got {rope!r:.60}")
    whole = (*needed, "num_key_value_heads")
    numbers = {name: config[name] for name in (*whole, *_FRACTIONS) if name in config} | dict(rope)
    for name, value in numbers.items():
        if name in whole and (type(value) is not int or not 0 < value < 2**31):
            raise ValueError(f"{path}: expected a whole number above 0 for {name}, got {value!r:.60}")
        if name in _FRACTIONS and (type(value) not in (int, float) or not math.isfinite(value)):
            raise ValueError(f"{path}: expected a number for {name}, got {value!r:.60}")
    return BackboneSizes(
        hidden_size=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        key_value_heads=config.get("num_key_value_heads", config["num_attention_heads"]),
        intermediate_size=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        rope_theta=float(config.get("rope_theta", rope.get("rope_theta", 1e6))),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        attention_dropout=float(config.get("attention_dropout", 0.0)),
    )
