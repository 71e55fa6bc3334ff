# SPDX-License-Identifier: Apache-2.0
"""`tts-align demo build`: makes the embedded audio experiment from nothing but eSpeak NG and a seed.

Stages, each written whole, and skipped when it is there and nothing it depends on has changed:

1. `codec`: speech tokenizer and mel decoder;
2. `labeller` and `judge`: two recognisers of different width, trained apart on different halves of the sentences
   and different
   free speech; the first labels training data, the second only tests;
3. `base`: the language model, which misreads 辛い as often as the corpus does;
4. `flow`: speech tokens to mel by flow matching, with the codec's decoder as its prior; and `flow_from_noise`, a flow
   without, which is measured for the report and not shipped;
5. `gates`: the base speaks every test sentence; unless all gates hold, nothing is shipped.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tts_align.cli.demo.flow import FROM_NOISE, SHIPPED, reconstruction_error, train_flow
from tts_align.cli.demo.gates import Gate, measure_base, measure_codec, measure_flow, measure_judge
from tts_align.cli.demo.stages import Stages
from tts_align.cli.demo.text import prompts, text_tokenizer
from tts_align.cli.demo.training import Schedule, train_base, train_codec, train_recogniser
from tts_align.data.demo.audio import ALPHABET, STRANGERS, Clip, PhraseBank, free_speech, speed_jitter
from tts_align.data.demo.sentences import READINGS, SPEAKERS, Sentence, right_rates, split_sentences
from tts_align.evaluation.judges.ctc import RecogniserSizes
from tts_align.evaluation.prompts import write_prompts
from tts_align.models.base.generation import Context
from tts_align.models.base.layout import TokenRow
from tts_align.models.codec.mel import CodecSizes, MelCodec, encode
from tts_align.models.codec.vocoder import MelVocoder
from tts_align.models.flow.dit import DiTFlow, DiTFlowSizes
from tts_align.models.policy.qwen2 import Qwen2CodecLM, Sizes
from tts_align.utils.assets import ASSETS
from tts_align.utils.files import directory_written_atomically, write_json
from tts_align.utils.progress import Bar
from tts_align.utils.readers import read_json

REPORT = "build.json"


@dataclass(frozen=True)
class Plan:
    """Every number of a build.

    Args:
        seed: Of the split, the cells, all draws and all initial weights.
        codec: Sizes of the codec.
        codec_schedule: Its training.
        codec_clips: Sentences and, again as many, clips of free speech that the codec learns from.
        labeller_channels: Width of the labeller.
        judge_channels: Width of the judge.
        recogniser_blocks: Depth of both.
        recogniser_schedule: Training of each.
        recogniser_clips: Sentences, and twice as many clips of free speech, that each learns from; most of them a
            second time,
            copy-synthesised.
        base: Sizes of the language model, but for its vocabularies.
        base_schedule: Its training.
        renderings: How often each sentence is rendered in each reading and voice.
        flow: Sizes of the flow.
        flow_schedule: Its training.
        flow_clips: Sentences and, again as many, clips of free speech that the flow learns from.
        flow_from_noise: Sizes of the flow without a prior, which is measured only.
        flow_from_noise_schedule: Its training.
    """

    seed: int = 0
    codec: CodecSizes = field(default_factory=lambda: CodecSizes(speakers=SPEAKERS))
    codec_schedule: Schedule = field(default_factory=lambda: Schedule(2000, batch_size=48, learning_rate=2e-3))
    codec_clips: int = 2000
    labeller_channels: int = 96
    judge_channels: int = 112
    recogniser_blocks: int = 4
    recogniser_schedule: Schedule = field(default_factory=lambda: Schedule(1600, batch_size=64, learning_rate=3e-3))
    recogniser_clips: int = 1000
    base: Sizes = field(
        default_factory=lambda: Sizes(
            codebook_size=0,
            text_vocabulary=0,
            hidden_size=128,
            layers=4,
            intermediate_size=384,
            prefix_format="<{speaker}>",
        )
    )
    base_schedule: Schedule = field(default_factory=lambda: Schedule(2000, 64, learning_rate=3e-3, weight_decay=0.05))
    renderings: int = 4
    flow: DiTFlowSizes = SHIPPED
    flow_schedule: Schedule = field(default_factory=lambda: Schedule(1000, batch_size=16, learning_rate=1e-3))
    flow_clips: int = 1000
    flow_from_noise: DiTFlowSizes = FROM_NOISE
    flow_from_noise_schedule: Schedule = field(default_factory=lambda: Schedule(6000, 16, learning_rate=2e-3))


class GateError(RuntimeError):
    """The build is not good enough to ship."""


def build(
    directory: Path = ASSETS / "audio",
    seed: int = 0,
    plan: Plan | None = None,
    work: Path = Path("demo/build"),
    threads: int = 1,
) -> Path:
    """Build the experiment, or what of it is missing, and ship it if it passes the gates.

    Args:
        directory: Where the finished artefacts go.
        seed: Of the whole build; ignored when `plan` is given.
        plan: Sizes and lengths.
        work: Where work in progress lies, to be continued.
        threads: Of PyTorch. These models are small: with anything else running, two threads are slower than one.

    Returns:
        `directory`.

    Raises:
        GateError: A gate failed; `directory` is left as it was.
    """
    plan = plan or Plan(seed=seed)
    torch.set_num_threads(threads)
    return _Build(plan, work).run(directory)


class _Build:
    """One build in its work directory."""

    def __init__(self, plan: Plan, work: Path) -> None:
        self.plan, self.work = plan, work
        self.work.mkdir(parents=True, exist_ok=True)
        self.splits, self.rates = split_sentences(plan.seed), right_rates(plan.seed)
        self.bank = PhraseBank(plan.codec.token_samples)
        self.stages = Stages(work, self.bank.digest)

    def run(self, directory: Path) -> Path:
        """All stages, then shipping."""
        plan = self.plan
        common: list[Any] = [plan.seed, plan.codec, plan.codec_schedule, plan.codec_clips]
        hearing = [*common, plan.recogniser_blocks, plan.recogniser_schedule, plan.recogniser_clips]
        speaking = [*common, plan.base, plan.base_schedule, plan.renderings]
        self.stages.run("codec", common, self._codec)
        self.stages.run(
            "labeller", [*hearing, plan.labeller_channels], lambda out: self._recogniser(out, "labeller", 0)
        )
        self.stages.run("judge", [*hearing, plan.judge_channels], lambda out: self._recogniser(out, "judge", 1))
        self.stages.run("base", speaking, self._base)
        for name, sizes, schedule in (
            ("flow", plan.flow, plan.flow_schedule),
            ("flow_from_noise", plan.flow_from_noise, plan.flow_from_noise_schedule),
        ):
            inputs = [*common, sizes, schedule, plan.flow_clips]
            self.stages.run(name, inputs, partial(self._flow, sizes=sizes, schedule=schedule))
        self.stages.run("gates", [plan], self._gates)
        gates = [Gate(**gate) for gate in read_json(self.work / "gates" / "gates.json")]
        for gate in gates:
            print(gate)
        if failed := [gate.name for gate in gates if not gate.passed]:
            raise GateError(f"nothing is shipped, because of: {', '.join(failed)}. The parts lie in {self.work}")
        self._ship(directory, gates)
        return directory

    @property
    def training_sentences(self) -> list[Sentence]:
        """What everything that is trained may hear."""
        return self.splits["base"] + self.splits["preference"]

    def _sentence_clips(self, sentences: Sequence[Sentence], count: int, generator: random.Random) -> list[Clip]:
        """Renderings of random sentences in random readings and voices."""
        return [
            self.bank.say(sentence, generator.choice(READINGS), generator.choice(SPEAKERS), generator)
            for sentence in generator.choices(sentences, k=count)
        ]

    def _codec(self, out: Path) -> None:
        plan, generator = self.plan, random.Random(f"codec {self.plan.seed}")
        clips = self._sentence_clips(self.training_sentences, plan.codec_clips, generator)
        clips += free_speech(plan.codec_clips, f"codec {plan.seed}", SPEAKERS)
        train_codec(plan.codec, clips, plan.codec_schedule, plan.seed).save(out)

    def _recogniser(self, out: Path, name: str, half: int) -> None:
        plan, label = self.plan, f"{name} {self.plan.seed}"
        sentences = self._sentence_clips(self.training_sentences[half::2], plan.recogniser_clips, random.Random(label))
        free = free_speech(2 * plan.recogniser_clips, label, SPEAKERS)
        strange = free_speech(plan.recogniser_clips // 2, f"{label} strangers", STRANGERS)
        copies = copy_synthesise(self.work / "codec", [*sentences, *free])
        clips = speed_jitter([*sentences, *free, *strange, *copies], label)
        width = plan.labeller_channels if name == "labeller" else plan.judge_channels
        sizes = RecogniserSizes(ALPHABET, hidden_channels=width, blocks=plan.recogniser_blocks)
        train_recogniser(sizes, clips, plan.recogniser_schedule, plan.seed + 1 + half, name).save(out)

    def _base(self, out: Path) -> None:
        plan = self.plan
        codec = MelCodec.load(self.work / "codec")
        tokenizer = text_tokenizer()
        tokenizer.save(str(out / "tokenizer.json"))
        torch.manual_seed(plan.seed)
        sizes = dataclasses.replace(
            plan.base, codebook_size=codec.tokenizer.codebook_size, text_vocabulary=tokenizer.get_vocab_size()
        )
        model = Qwen2CodecLM(sizes=sizes, tokenizer=str(out / "tokenizer.json"))
        train_base(model, self._corpus(model, self._renderings(codec)), plan.base_schedule)
        # Half precision on disk; the model reads it back as float32.
        model.half().save(out)

    def _renderings(self, codec: MelCodec) -> dict[tuple[str, str, str], list[tuple[int, ...]]]:
        """Speech tokens of each training sentence by (id, reading, speaker), several times."""
        generator = random.Random(f"renderings {self.plan.seed}")
        keys = [
            (sentence, reading, speaker)
            for sentence in self.training_sentences
            for reading in READINGS
            for speaker in SPEAKERS
        ]
        tokens: dict[tuple[str, str, str], list[tuple[int, ...]]] = {}
        for start in Bar(range(0, len(keys), 64), desc="tokens", unit="batch"):
            some = [key for key in keys[start : start + 64] for _ in range(self.plan.renderings)]
            speech_tokens = encode(codec, [self.bank.say(*key, generator).audio for key in some])
            for (sentence, reading, speaker), row in zip(some, speech_tokens, strict=True):
                tokens.setdefault((sentence.id, reading, speaker), []).append(tuple(row.tolist()))
        return tokens

    def _corpus(
        self, model: Qwen2CodecLM, renderings: dict[tuple[str, str, str], list[tuple[int, ...]]]
    ) -> Callable[[], Iterator[TokenRow]]:
        """One epoch of the corpus: every sentence by every speaker, its reading drawn by the cell's rate each time."""
        generator = random.Random(f"corpus {self.plan.seed}")
        pairs = [(sentence, speaker) for sentence in self.training_sentences for speaker in SPEAKERS]

        def draw() -> Iterator[TokenRow]:
            for sentence, speaker in generator.sample(pairs, len(pairs)):
                is_right = generator.random() < self.rates[sentence.cell]
                reading = sentence.reading_right if is_right else sentence.reading_wrong
                speech = generator.choice(renderings[sentence.id, reading, speaker])
                yield model.encode_text(sentence.text, Context(speaker)).row(speech)

        return draw

    def _flow(self, out: Path, sizes: DiTFlowSizes, schedule: Schedule) -> None:
        plan, label = self.plan, f"flow {self.plan.seed}"
        clips = self._sentence_clips(self.training_sentences, plan.flow_clips, random.Random(label))
        clips += free_speech(plan.flow_clips, label, SPEAKERS)
        codec = MelCodec.load(self.work / "codec")
        train_flow(sizes, codec, clips, schedule, plan.seed).save(out, half=True)

    def _gates(self, out: Path) -> None:
        test, generator = self.splits["test"], random.Random(f"gates {self.plan.seed}")
        known = self._sentence_clips(test, 1000, generator)
        copies = copy_synthesise(self.work / "codec", known)
        gates = [*measure_codec(self.work, copies), *measure_judge(self.work, known, copies)]
        gates += measure_flow(self.work, known)
        gates += measure_base(self.work, test, self.rates)
        write_json(out / "gates.json", [dataclasses.asdict(gate) for gate in gates])
        from_noise = DiTFlow(directory=str(self.work / "flow_from_noise")).eval()
        error = reconstruction_error(from_noise, self.work, known)
        write_json(out / "measured.json", {"reconstruction CER of a flow without a prior": round(error, 4)})

    def _ship(self, directory: Path, gates: Sequence[Gate]) -> None:
        """Put the finished parts, and a report, in place of what was there."""
        parts = ("codec", "labeller", "judge", "base", "flow")
        stages = (*parts, "flow_from_noise", "gates")
        report = {
            "plan": dataclasses.asdict(self.plan),
            "gates": {gate.name: round(gate.value, 4) for gate in gates},
            "measured": read_json(self.work / "gates" / "measured.json"),
            "seconds": self.stages.seconds(stages),
        }
        with directory_written_atomically(directory, overwrite=True) as scratch:
            for name in parts:
                shutil.copytree(self.work / name, scratch / name)
            for split in ("preference", "dev", "test"):
                write_prompts(scratch / "sentences" / f"{split}.jsonl", prompts(split, self.plan.seed))
            write_json(scratch / REPORT, report)


def copy_synthesise(codec: Path, clips: Sequence[Clip]) -> list[Clip]:
    """The same clips through the codec: waveform -> tokens -> waveform."""
    vocoder = MelVocoder(str(codec))
    copies: list[Clip] = []
    for start in Bar(range(0, len(clips), 128), desc="copy synthesis", unit="batch"):
        some = clips[start : start + 128]
        audio: list[Tensor] = vocoder.speak(
            encode(vocoder.codec, [clip.audio for clip in some]), [clip.speaker for clip in some]
        )
        copies += [dataclasses.replace(clip, audio=sound) for clip, sound in zip(some, audio, strict=True)]
    return copies
