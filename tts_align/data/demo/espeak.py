# SPDX-License-Identifier: Apache-2.0
"""eSpeak NG in a process of its own: text in, 22.05 kHz samples out.

Only `tts-align demo build` needs it (optional extra `espeakng-loader`; the library is GPLv3, hence at arm's
length). A process synthesises one batch and ends, because eSpeak carries state from call to call: the same batch in
a fresh process gives the same samples, the same utterance later in a process does not.

    python -m tts_align.data.demo.espeak requests.jsonl audio.npz
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SAMPLE_RATE = 22050

# Values of the enums in espeak-ng's public header speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_CHARACTERS_UTF8 = 1
_PARAMETER_RATE, _PARAMETER_PITCH, _PARAMETER_RANGE = 1, 3, 4

Samples = npt.NDArray[np.int16]


@dataclass(frozen=True)
class EspeakPhrase:
    """One thing to say.

    Attributes:
        text: Kana; spaces are phrase boundaries.
        voice: eSpeak voice and variant, such as "ja+f2".
        rate: Speaking rate in words per minute (80 to 450).
        pitch: Base pitch, 0 to 99.
        pitch_range: How lively the pitch moves, 0 to 99.
    """

    text: str
    voice: str
    rate: int = 220
    pitch: int = 50
    pitch_range: int = 50


def synthesise(utterances: Sequence[EspeakPhrase]) -> list[Samples]:
    """Say each utterance in one fresh worker process.

    Args:
        utterances: What to say, in order; the same sequence always gives the same samples.

    Returns:
        One int16 array at `SAMPLE_RATE` per utterance.

    Raises:
        RuntimeError: If the worker fails, with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        requests, audio = Path(folder, "requests.jsonl"), Path(folder, "audio.npz")
        requests.write_text("".join(json.dumps(asdict(utterance)) + "\n" for utterance in utterances), encoding="utf-8")
        command = [sys.executable, "-P", __file__, str(requests), str(audio)]
        worker = subprocess.run(command, capture_output=True, text=True, check=False)
        if worker.returncode != 0:
            raise RuntimeError(f"the eSpeak NG worker failed; is `pip install espeakng-loader` done?\n{worker.stderr}")
        with np.load(audio) as arrays:
            return np.split(arrays["samples"], np.cumsum(arrays["lengths"])[:-1])


class _Engine:
    """The shared library through ctypes; exists in the worker process only."""

    def __init__(self) -> None:
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data_folder = str(Path(espeakng_loader.get_data_path()).parent).encode()
        if self._library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 500, data_folder, 0) != SAMPLE_RATE:
            raise RuntimeError("espeak_Initialize failed")
        # Breathy voices draw noise, by default from a generator seeded with the time of day in seconds.
        self._library.espeak_ng_SetRandSeed(1)
        self._chunks: list[Samples] = []
        # The library keeps a bare pointer to the callback: this reference keeps it alive.
        self._callback = self._make_callback()
        self._library.espeak_SetSynthCallback(self._callback)

    def _make_callback(self) -> Any:
        signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

        def collect(samples: Any, count: int, _events: Any) -> int:
            if samples and count > 0:
                self._chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
            return 0

        make: Callable[..., Any] = signature
        return make(collect)

    def say(self, utterance: EspeakPhrase) -> Samples:
        """Samples of one utterance."""
        if self._library.espeak_SetVoiceByName(utterance.voice.encode()) != 0:
            raise ValueError(f"eSpeak NG has no voice {utterance.voice!r}")
        for parameter, value in (
            (_PARAMETER_RATE, utterance.rate),
            (_PARAMETER_PITCH, utterance.pitch),
            (_PARAMETER_RANGE, utterance.pitch_range),
        ):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._chunks.clear()
        data = utterance.text.encode()
        self._library.espeak_Synth(data, len(data) + 1, 0, 0, 0, _CHARACTERS_UTF8, None, None)
        return np.concatenate(self._chunks) if self._chunks else np.zeros(0, np.int16)


def _work(requests: Path, audio: Path) -> None:
    """Body of the worker: requests.jsonl -> audio.npz."""
    engine = _Engine()
    lines = requests.read_text(encoding="utf-8").splitlines()
    clips = [engine.say(EspeakPhrase(**json.loads(line))) for line in lines]
    samples = np.concatenate(clips) if clips else np.zeros(0, np.int16)
    np.savez(audio, samples=samples, lengths=np.array([len(clip) for clip in clips], np.int64))


if __name__ == "__main__":
    _work(Path(sys.argv[1]), Path(sys.argv[2]))
