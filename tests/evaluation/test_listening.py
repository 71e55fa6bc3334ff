# SPDX-License-Identifier: Apache-2.0
"""A fault is not a verdict: what is raised, what is counted, and what is a number of the model."""

import logging

import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException as OrtError
from talker import Ear, Tube, make_candidates

from tts_align.evaluation.candidates import read_candidates
from tts_align.evaluation.faults import is_out_of_memory
from tts_align.evaluation.listening import Failures, TooManyFailuresError, listen


@pytest.fixture
def candidates(tmp_path):
    return read_candidates(make_candidates(tmp_path))


def heard(judge, vocoder, candidates, **knobs):
    return [one for batch in listen(judge, vocoder, candidates, **knobs) for one in batch]


class Broken(Tube):
    """Fails as the error says, for every utterance that the rule names."""

    def __init__(self, error, rule=lambda speech: True):
        super().__init__()
        self.error, self.rule, self.calls = error, rule, 0

    def speak(self, speech, speakers):
        self.calls += 1
        for one in speech:
            if self.rule(one):
                raise self.error(one)
        return super().speak(speech, speakers)


def test_a_broken_vocoder_is_raised_not_a_verdict(candidates):
    """Messages that differ in sizes only are one reason."""
    broken = Broken(lambda one: RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({len(one)}x3 and 4x4)"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        heard(Ear(), broken, candidates)
    assert "each of the 24 utterances of a batch failed so" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OrtError(
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 9"
        ),
    ],
    ids=["accelerator", "CPU", "Python", "cuBLAS", "ONNX Runtime"],
)
def test_exhausted_memory_is_raised_at_once(candidates, error):
    broken = Broken(lambda _: error)
    with pytest.raises(type(error)) as caught:
        heard(Ear(), broken, candidates)
    assert broken.calls == 1
    assert "lower batch_rows" in caught.value.__notes__[0]


def test_memory_exhausted_by_one_row_alone_is_raised_too(candidates):
    first = min(candidates, key=lambda one: len(one.speech))
    error = iter([RuntimeError("odd"), MemoryError()])
    broken = Broken(lambda _: next(error), lambda speech: tuple(speech.tolist()) == first.speech)
    with pytest.raises(MemoryError):
        heard(Ear(), broken, candidates)


def test_an_ordinary_error_is_no_exhausted_memory():
    assert not is_out_of_memory(RuntimeError("shapes"))
    assert not is_out_of_memory(ValueError("out of memory"))
    assert not is_out_of_memory(OrtError("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions"))


def test_a_batch_that_only_works_one_by_one_is_said_once_and_counted(candidates, caplog):
    class Lonely(Tube):
        def speak(self, speech, speakers):
            if len(speech) > 1:
                raise RuntimeError("one at a time, please")
            return super().speak(speech, speakers)

    failures = Failures(len(candidates))
    with caplog.at_level(logging.WARNING):
        judged = heard(Ear(), Lonely(), candidates, batch_rows=2, failures=failures)
    assert all(one.verdict for one in judged)
    assert failures.split_batches == len(candidates) // 2 == 12
    first, tenth = (record.getMessage() for record in caplog.records)
    assert first.startswith("1 batch failed as a whole although each utterance can be judged alone, which is slow")
    assert first.endswith("of 2 utterances, with RuntimeError: one at a time, please")
    assert tenth.startswith("10 batches failed")


def test_single_failures_are_counted_and_come_back_without_a_verdict(candidates):
    name = candidates[7].id
    broken = Broken(lambda _: RuntimeError("crackles"), lambda speech: tuple(speech.tolist()) == candidates[7].speech)
    failures = Failures(len(candidates), 0.5)
    found = heard(Ear(), broken, candidates, failures=failures)
    failed = {one.id: one.error for one in found if one.verdict is None}
    assert failures.reasons == failed
    assert failed[name] == "RuntimeError: crackles"
    assert len(found) == len(candidates)


def test_beyond_the_share_the_work_stops_with_the_reasons(candidates):
    number = iter(range(99))
    broken = Broken(lambda _: RuntimeError("no" * (1 + next(number))), lambda speech: len(speech) > 3)
    with pytest.raises(
        TooManyFailuresError, match=r"2 of 24 candidates could not be judged, 1 may(.|\n)*: RuntimeError: no"
    ):
        heard(Ear(), broken, candidates, batch_rows=8)


@pytest.mark.parametrize(
    ("candidates", "share", "allowed"), [(1000, 0.01, 10), (24, 0.01, 1), (24, 0.0, 0), (1, 0.01, 0), (2, 1.0, 1)]
)
def test_how_many_may_fail(candidates, share, allowed):
    """All of them never may: then nothing was heard."""
    assert Failures(candidates, share).allowed == allowed


def test_a_share_is_a_share():
    with pytest.raises(ValueError, match=r"max_failed_share must lie in 0..1, got 2.0"):
        Failures(3, 2.0)
