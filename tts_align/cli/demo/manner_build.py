# SPDX-License-Identifier: Apache-2.0
"""`tts-align demo build --corpus manner`: an experiment on attributes that have probability under every prompt.

The sentences, voices and readings of the audio experiment, spoken in two manners and three qualities that the text
does not tell (see `tts_align.data.demo.manner`). The recognisers are those of the audio experiment; the codec is its
own, because that one has never heard another pitch and gives back the usual one. Stages, as in
`tts_align.cli.demo.build`: codec, base in two trainings, gates; then recordings whose style is known, for the reward
model, and candidates that the base spoke, for the policy.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tts_align.cli.demo.build import REPORT, GateError, copy_synthesise
from tts_align.cli.demo.gates import SAMPLING, Gate, measure_base, measure_codec, measure_judge
from tts_align.cli.demo.manner_gates import StyleRule, beyond_copies, measure_shares, measure_styles, style_rule
from tts_align.cli.demo.stages import Stages
from tts_align.cli.demo.text import prompt, text_tokenizer
from tts_align.cli.demo.training import Schedule, train_base, train_codec
from tts_align.cli.judge import judge
from tts_align.cli.label import LabelRule, label
from tts_align.cli.sample import sample
from tts_align.data.demo.audio import Clip
from tts_align.data.demo.manner import MANNERS, QUALITIES, MannerBank, Style, draw_style
from tts_align.data.demo.sentences import READINGS, SPEAKERS, Sentence, Split, right_rates, split_sentences
from tts_align.data.manifest import read_manifest, write_manifest
from tts_align.data.records import Row
from tts_align.evaluation.judges.ctc import CTCJudge
from tts_align.evaluation.parts import Parts
from tts_align.evaluation.prompts import write_prompts
from tts_align.models.base.generation import Context
from tts_align.models.base.layout import TokenRow
from tts_align.models.codec.mel import CodecSizes, MelCodec, encode
from tts_align.models.codec.vocoder import MelVocoder
from tts_align.models.policy.qwen2 import Qwen2CodecLM, Sizes
from tts_align.utils.assets import ASSETS, resolve
from tts_align.utils.files import directory_written_atomically, write_json
from tts_align.utils.progress import Bar
from tts_align.utils.readers import read_json

DRAWN_TOP_P = 0.97
"""Candidates are drawn a little wilder than tests, as those of the audio experiment."""
RULE = "rule.json"
LISTENERS = ("judge", "labeller")


@dataclass(frozen=True)
class MannerPlan:
    """Every number of a build.

    Args:
        seed: Of all draws and all initial weights; sentences and cells are those of the audio experiment of this seed.
        codec: Sizes of the codec; more mel channels than the audio experiment's, so that a low pitch survives.
        codec_schedule: Its training.
        codec_clips: Sentences that it learns from, in all styles alike.
        base: Sizes of a new language model, but for its vocabularies; by default it starts from the audio experiment's,
            which knows the words and their order, and learns other speech tokens.
        base_schedule: Its first training.
        refining: Its second training, from where the first ended: after that alone, rare styles are still garbled.
        renderings: How often each sentence is rendered in each voice, its reading and style drawn by their shares.
        recordings: Renderings of each preference and dev sentence in each voice that the reward model learns from.
        samples: Candidates per sentence and voice.
        sentences: Sentences of each split; all of them by default.
        heard: Clips of known style that the gates hear.
        spoken: Utterances per test sentence and voice that they hear of the base.
    """

    seed: int = 0
    codec: CodecSizes = field(default_factory=lambda: CodecSizes(speakers=SPEAKERS, mel_channels=64))
    codec_schedule: Schedule = field(default_factory=lambda: Schedule(1200, batch_size=48, learning_rate=2.5e-3))
    codec_clips: int = 3000
    base: Sizes | None = None
    base_schedule: Schedule = field(default_factory=lambda: Schedule(600, 48, learning_rate=3e-3, weight_decay=0.05))
    refining: Schedule = field(default_factory=lambda: Schedule(700, 48, learning_rate=2e-3, weight_decay=0.05))
    renderings: int = 4
    recordings: int = 2
    samples: int = 1
    sentences: int | None = None
    heard: int = 600
    spoken: int = 3


@dataclass(frozen=True)
class Rendering:
    """One recording of the corpus, as speech tokens.

    Attributes:
        sentence: What was to be said.
        speaker: Whose voice.
        reading: How 辛い was read.
        style: Manner and quality.
        speech: Speech tokens.
    """

    sentence: Sentence
    speaker: str
    reading: str
    style: Style
    speech: tuple[int, ...]

    def row(self, name: str) -> Row:
        """Row of a manifest whose attributes are known for certain."""
        said = prompt(self.sentence)
        return Row(
            id=name,
            text=said.text,
            language=said.language,
            speaker=self.speaker,
            speech=self.speech,
            desirable=self.reading == self.sentence.reading_right,
            spans=said.spans,
            notes={"transcript": self.sentence.transcript(self.reading)},
            attributes={"manner": self.style.manner, "quality": float(self.style.quality)},
            transcript=self.sentence.transcript(self.sentence.reading_right),
        )


def build_manner(
    directory: Path = ASSETS / "manner",
    seed: int = 0,
    plan: MannerPlan | None = None,
    work: Path = Path("demo/build-manner"),
    threads: int = 1,
) -> Path:
    """Build the experiment, or what of it is missing, and put it in its place if it passes the gates.

    The directory then holds ``codec/``, ``base/``, ``sentences/{preference,dev,test}.jsonl``, ``recordings.parquet``
    and ``recordings_dev.parquet`` (the corpus, its attributes ``manner`` and ``quality`` known), ``preference.parquet``
    and ``dev.parquet`` (what the base spoke, labelled by what the labelling recogniser heard), ``rule.json`` (how
    manner and quality are told by two numbers of the sound) and ``build.json``.

    Args:
        directory: Where the finished artefacts go.
        seed: Of the whole build; ignored when `plan` is given.
        plan: Sizes and lengths.
        work: Where work in progress lies, to be continued.
        threads: Of PyTorch.

    Returns:
        `directory`.

    Raises:
        GateError: A gate failed; `directory` is left as it was.
    """
    plan = plan or MannerPlan(seed=seed)
    torch.set_num_threads(threads)
    return _Build(plan, work).run(directory)


class _Build:
    """One build in its work directory."""

    def __init__(self, plan: MannerPlan, work: Path) -> None:
        self.plan, self.work = plan, work
        self.work.mkdir(parents=True, exist_ok=True)
        splits = split_sentences(plan.seed)
        self.splits: dict[Split, list[Sentence]] = {name: some[: plan.sentences] for name, some in splits.items()}
        self.rates = right_rates(plan.seed)
        self.bank = MannerBank(plan.codec.token_samples)
        self.stages = Stages(work, f"{self.bank.digest} {MANNERS} {QUALITIES}")

    def run(self, directory: Path) -> Path:
        """All stages, then shipping."""
        plan = self.plan
        common: list[Any] = [plan.seed, plan.sentences, plan.codec, plan.codec_schedule, plan.codec_clips]
        self.stages.run("listeners", [], self._listeners)
        self.stages.run("codec", common, self._codec)
        self.stages.run("rule", [*common, plan.heard], self._rule)
        corpus = [*common, plan.renderings]
        self.stages.run("corpus", corpus, self._corpus)
        first = [*corpus, plan.base, plan.base_schedule]
        kept = self.stages.unfinished("first-base", first)
        self.stages.run("first-base", first, lambda out: self._first_base(out, kept))
        speaking = [*first, plan.refining]
        resumed = self.stages.unfinished("base", speaking)
        self.stages.run("base", speaking, lambda out: self._refined_base(out, resumed))
        self.stages.run("gates", [*speaking, plan.heard, plan.spoken], self._gates)
        gates = [Gate(**gate) for gate in read_json(self.work / "gates" / "gates.json")]
        for gate in gates:
            print(gate)
        if failed := [gate.name for gate in gates if not gate.passed]:
            raise GateError(f"nothing is kept, because of: {', '.join(failed)}. The parts lie in {self.work}")
        self.stages.run("manifests", [*speaking, plan.recordings, plan.samples], self._manifests)
        self._ship(directory, gates)
        return directory

    @property
    def training_sentences(self) -> list[Sentence]:
        """What everything that is trained may hear."""
        return self.splits["base"] + self.splits["preference"]

    def clips(
        self, sentences: Sequence[Sentence], count: int, label: str, by_share: bool = False
    ) -> tuple[list[Clip], list[Style]]:
        """Renderings of random sentences in random readings and voices, in styles by their shares or all alike."""
        generator = random.Random(f"{label} {self.plan.seed}")
        alike = [Style(manner, quality) for manner in MANNERS for quality in QUALITIES]
        styles = [draw_style(generator) if by_share else generator.choice(alike) for _ in range(count)]
        said = generator.choices(sentences, k=count)
        return [
            self.bank.say(sentence, generator.choice(READINGS), generator.choice(SPEAKERS), style, generator)
            for sentence, style in zip(said, styles, strict=True)
        ], styles

    def _listeners(self, out: Path) -> None:
        for name in LISTENERS:
            shutil.copytree(resolve(f"demo:audio/{name}"), out / name)

    def _codec(self, out: Path) -> None:
        clips, _ = self.clips(self.training_sentences, self.plan.codec_clips, "codec")
        train_codec(self.plan.codec, clips, self.plan.codec_schedule, self.plan.seed).save(out)

    def _rule(self, out: Path) -> None:
        clips, styles = self.clips(self.training_sentences, self.plan.heard, "rule")
        rule = style_rule(copy_synthesise(self.work / "codec", clips), styles)
        write_json(out / RULE, dataclasses.asdict(rule))

    def _corpus(self, out: Path) -> None:
        codec = MelCodec.load(self.work / "codec")
        corpus = self.renderings(codec, self.training_sentences, self.plan.renderings, "renderings")
        write_manifest((one.row(f"corpus-{i:06d}") for i, one in enumerate(corpus)), out / "corpus.parquet")

    def _first_base(self, out: Path, kept: Path) -> None:
        plan = self.plan
        torch.manual_seed(plan.seed)
        if plan.base is None:
            model = Qwen2CodecLM("demo:audio/base")
        else:
            tokenizer, tokens = text_tokenizer(), MelCodec.load(self.work / "codec").tokenizer.codebook_size
            tokenizer.save(str(out / "tokenizer.json"))
            sizes = dataclasses.replace(plan.base, codebook_size=tokens, text_vocabulary=tokenizer.get_vocab_size())
            model = Qwen2CodecLM(sizes=sizes, tokenizer=str(out / "tokenizer.json"))
        self._train(model, "corpus", plan.base_schedule, kept).save(out)

    def _refined_base(self, out: Path, kept: Path) -> None:
        model = Qwen2CodecLM(str(self.work / "first-base"))
        self._train(model, "refining", self.plan.refining, kept).save(out)

    def _train(self, model: Qwen2CodecLM, label: str, schedule: Schedule, kept: Path) -> Qwen2CodecLM:
        """Half precision on disk; the model reads it back as float32."""
        corpus = read_manifest(self.work / "corpus" / "corpus.parquet").rows
        train_base(model, self._epochs(model, corpus, label), schedule, kept)
        return model.half()

    def renderings(
        self, codec: MelCodec, sentences: Sequence[Sentence], count: int, label: str, batch_size: int = 256
    ) -> list[Rendering]:
        """Each sentence in each voice some times; reading and style are drawn anew by their shares each time."""
        generator = random.Random(f"{label} {self.plan.seed}")
        keys = [(sentence, speaker) for sentence in sentences for speaker in SPEAKERS for _ in range(count)]
        found: list[Rendering] = []
        for start in Bar(range(0, len(keys), batch_size), desc="tokens", unit="batch"):
            drawn = [self._drawn(*key, generator) for key in keys[start : start + batch_size]]
            tokens = encode(codec, [clip.audio for _, clip in drawn])
            found += [
                dataclasses.replace(one, speech=tuple(row.tolist()))
                for (one, _), row in zip(drawn, tokens, strict=True)
            ]
        return found

    def _drawn(self, sentence: Sentence, speaker: str, generator: random.Random) -> tuple[Rendering, Clip]:
        is_right = generator.random() < self.rates[sentence.cell]
        reading = sentence.reading_right if is_right else sentence.reading_wrong
        style = draw_style(generator)
        clip = self.bank.say(sentence, reading, speaker, style, generator)
        return Rendering(sentence, speaker, reading, style, ()), clip

    def _epochs(self, model: Qwen2CodecLM, corpus: Sequence[Row], label: str) -> Callable[[], Iterator[TokenRow]]:
        generator = random.Random(f"{label} {self.plan.seed}")

        def draw() -> Iterator[TokenRow]:
            for one in generator.sample(corpus, len(corpus)):
                yield model.encode_text(one.text, Context(one.speaker)).row(one.speech)

        return draw

    def _gates(self, out: Path) -> None:
        parts = out / "parts"  # laid out as those of the audio experiment
        for name in ("codec", "base"):
            shutil.copytree(self.work / name, parts / name)
        for name in LISTENERS:
            shutil.copytree(self.work / "listeners" / name, parts / name)
        known, styles = self.clips(self.splits["test"], self.plan.heard, "gates", by_share=True)
        copies = copy_synthesise(parts / "codec", known)
        gates = [*measure_codec(parts, copies), *measure_judge(parts, known, copies)]
        rule = StyleRule.read(self.work / "rule" / RULE)
        gates += measure_styles(rule, copies, styles)
        gates += beyond_copies(measure_base(parts, self.splits["test"], self.rates, self.plan.spoken), gates[0].value)
        policy, vocoder = Qwen2CodecLM(str(parts / "base")).eval(), MelVocoder(str(parts / "codec"))
        gates += measure_shares(policy, vocoder, rule, self.splits["test"])
        write_json(out / "gates.json", [dataclasses.asdict(gate) for gate in gates])
        shutil.rmtree(parts)

    def _manifests(self, out: Path) -> None:
        plan, codec = self.plan, MelCodec.load(self.work / "codec")
        module = Parts(
            policy=Qwen2CodecLM(str(self.work / "base")).eval(),
            judge=CTCJudge(str(self.work / "listeners" / "labeller")),
            sampling=dataclasses.replace(SAMPLING, top_p=DRAWN_TOP_P),
            vocoder=MelVocoder(str(self.work / "codec")),
        )
        for split in self.splits:
            if split != "base":
                said = [prompt(sentence) for sentence in self.splits[split]]
                write_prompts(out / "sentences" / f"{split}.jsonl", said)
        for split, name in (("preference", "recordings"), ("dev", "recordings_dev")):
            corpus = self.renderings(codec, self.splits[split], plan.recordings, name)
            write_manifest((one.row(f"{name}-{i:05d}") for i, one in enumerate(corpus)), out / f"{name}.parquet")
            drawn, heard = self.work / f"{split}-drawn.jsonl", self.work / f"{split}-heard.jsonl"
            prompts = out / "sentences" / f"{split}.jsonl"
            sample(module, prompts, drawn, plan.samples, SPEAKERS, 256, plan.seed, overwrite=True)
            judge(module, drawn, heard, 256, overwrite=True)
            label(heard, out / f"{split}.parquet", LabelRule(keep="all"))

    def _ship(self, directory: Path, gates: Sequence[Gate]) -> None:
        """Put the finished parts, and a report, in place of what was there."""
        report = {
            "plan": dataclasses.asdict(self.plan),
            "styles": {"manners": {name: vars(one) for name, one in MANNERS.items()}}
            | {"qualities": {score: vars(one) for score, one in QUALITIES.items()}},
            "gates": {gate.name: round(gate.value, 4) for gate in gates},
            "seconds": self.stages.seconds(("codec", "corpus", "first-base", "base", "gates", "manifests")),
        }
        with directory_written_atomically(directory, overwrite=True) as scratch:
            shutil.copytree(self.work / "manifests", scratch, dirs_exist_ok=True)
            for name in ("codec", "base"):
                shutil.copytree(self.work / name, scratch / name)
            shutil.copy(self.work / "rule" / RULE, scratch / RULE)
            write_json(scratch / REPORT, report)
