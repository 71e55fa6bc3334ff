# SPDX-License-Identifier: Apache-2.0
"""CosyVoice2 (arXiv 2412.10117) and Fun-CosyVoice3 (arXiv 2505.17589) as policies, from and to their directories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tts_align.models.base.generation import Context, Encoded, Prompt, Sampling, Spoken
from tts_align.models.base.layout import Family, Layout
from tts_align.models.cosyvoice.directory import (
    BackboneSizes,
    ModelDirectory,
    backbone_sizes,
    load_state,
    read_backbone_sizes,
)
from tts_align.models.cosyvoice.export import BODY, HEAD, write_directory
from tts_align.models.cosyvoice.pieces import FrontEnd, spoken_pieces
from tts_align.models.cosyvoice.text import TextTokenizer
from tts_align.models.cosyvoice.vllm import VLLM, VLLMEngine
from tts_align.models.cosyvoice.voices import Voice, Voices, open_voices
from tts_align.models.policy.backbone import compile_blocks
from tts_align.models.policy.qwen2 import LoRA, Qwen2CodecLM, Sizes
from tts_align.utils.files import file_digest

END_OF_PROMPT = "<|endofprompt|>"
ASSISTANT = "You are a helpful assistant."
"""What version 3 was trained to find in front of every text."""
_PLAIN = Context()


class CosyVoiceLM(Qwen2CodecLM):
    """The language model of a CosyVoice2 or Fun-CosyVoice3 directory; which of them, its yaml tells.

    Only the speech path runs: the text vocabulary's head, stored in the file, is never computed.

    A voice that is asked for by name gives the model what the published inference gives it: a recording to continue
    with its transcript (zero_shot), an instruction, or nothing (cross_lingual, sft: the voice is the vocoder's alone).
    A row's own ``instruct``, ``prompt_text`` and ``prompt_speech`` stand before those of the voice. Unlike in the
    published code, an instruction in front of a version 3 text is not counted for the length limits, and the shortest
    length holds back version 3's own end-of-speech (the published code holds back another id, to no effect).

    Args:
        directory: model directory as downloaded, with cosyvoice2.yaml or cosyvoice3.yaml in it.
        weights: file of the language model in the directory, such as llm.pt or llm.rl.pt, or a path of another.
        voices: JSONL file of voices to speak in: speaker, audio, text (its transcript), instruct, mode.
        dtype: number format of the weights; adapters stay float32.
        lora: low-rank adapters to train instead of all weights; the frozen base is then the reference.
        recompute: whether layers are computed again in the backward pass instead of being kept: less memory, more time.
        compile: whether layers are compiled (torch.compile): the first steps take longer, the others less time.
        bistream: lengths of the blocks of text and speech tokens, for rows that interleave them.
        family: version that the directory must hold, cosyvoice2 or cosyvoice3; either by default.
        front_end: preparation of texts in sample and test: whole (each as it is), split (long ones cut as the CosyVoice
            runtime does) or normalise (numbers and units written out as well; pip install 'tts-align[normalise]').
        vllm: settings of vLLM, which then speaks in sample, test and roll-outs; by default the own engine does.
    """

    def __init__(
        self,
        directory: str,
        weights: str = "llm.pt",
        voices: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        lora: LoRA | None = None,
        recompute: bool = False,
        compile: bool = False,
        bistream: tuple[int, int] = (5, 15),
        family: Family | None = None,
        front_end: FrontEnd = "split",
        vllm: VLLM | None = None,
    ) -> None:
        torch.nn.Module.__init__(self)
        self.engine = None if vllm is None else VLLMEngine(vllm)
        self.front_end: FrontEnd = front_end
        self.source = ModelDirectory.find(directory)
        if family not in (None, self.source.family):
            raise ValueError(
                f"{directory} holds a {self.source.family} model, but model.policy.family is {family}: use the overlay "
                f"recipes/models/{self.source.family}.yaml"
            )
        self.directory, self.weights_name, self.voices_path, self.dtype = self.source.path, weights, voices, dtype
        path = self.weights_path
        state = backbone_names(load_state(path))
        sizes = sizes_of(self.source, state)
        with torch.device("meta"):
            self._build(sizes, bistream)
        self.backbone.recompute = recompute
        if compile:
            compile_blocks(self.backbone)
        fill(self, state, path, getattr(torch, dtype))
        self.text = TextTokenizer(self.source.backbone, sizes.family)
        self._check_codebook(path)
        self._add_adapters(lora)

    def _check_codebook(self, path: Path) -> None:
        llm = self.source.config.get("llm")
        said = llm.get("speech_token_size") if isinstance(llm, Mapping) else None
        if said not in (None, self.sizes.codebook_size):
            raise ValueError(
                f"{path} has a codebook of {self.sizes.codebook_size} speech tokens, the yaml says {said}: do they "
                "belong together?"
            )

    @property
    def weights_path(self) -> Path:
        """The file its weights come from: one of the directory, or else any other."""
        elsewhere = Path(self.weights_name)
        if not (self.source.path / elsewhere).is_file() and elsewhere.is_file():
            return elsewhere
        return self.source.file(self.weights_name)

    @property
    def speakers(self) -> tuple[str, ...] | None:
        """Voices it can be asked for, if there are any; otherwise a name is just a name."""
        return tuple(self.voices) or None

    @property
    def voices(self) -> Voices:
        """The voices of the recipe's file and of the directory."""
        return open_voices(str(self.source.path), self.voices_path)

    def use_voices(self, path: Path) -> None:
        """Speak in the voices of a file of recordings, beside those of the directory."""
        self.voices_path = str(path)

    @property
    def text_identity(self) -> str | None:
        """Digest of tokenizer and voices; voices of a file are recordings, so what they give is not stored."""
        if type(self).encode_text is not CosyVoiceLM.encode_text or self.voices_path is not None:
            return None
        files = [self.source.backbone / name for name in ("vocab.json", "merges.txt", "tokenizer_config.json")]
        files.append(self.source.path / "spk2info.pt")
        return " ".join([self.sizes.family, *(file_digest(file) for file in files if file.is_file())])

    def encode_text(self, text: str, context: Context = _PLAIN) -> Encoded:
        """Token ids of the text behind what the published inference puts before it.

        A text may bring its own instruction, closed by ``<|endofprompt|>``.

        Raises:
            ValueError: the text tokenizer has more ids than the text embedding rows.
        """
        if self.text.length > self.sizes.text_vocabulary:
            raise ValueError(
                f"the text tokenizer in {self.source.backbone} has {self.text.length} ids, but the text embedding in "
                f"{self.weights_path} only {self.sizes.text_vocabulary} rows: do they belong together?"
            )
        voice = self.voices.get(context.speaker)
        head, own, words = text.rpartition(END_OF_PROMPT)
        instruct, prompt_text, speech = _merged(context, voice)
        if own and instruct:
            raise ValueError(f"the text brings its own {END_OF_PROMPT}, and so does its instruction: {text!r:.80}")
        before = prefix_text(self.sizes.family, head + own if own else instruct, prompt_text)
        prefix, ids = self.text.encode(before) if before else [], self.text.encode(words)
        return Encoded((*prefix, *ids), len(prefix), speech)

    def pieces(self, text: str) -> tuple[str, ...]:
        """A text as the runtime would cut and write it, by ``front_end``."""
        return spoken_pieces(text, lambda part: len(self.text.encode(part)), self.front_end)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Callable[[int], None] | None = None
    ) -> list[Spoken]:
        """Speak all prompts in one batch, by vLLM if the recipe says so."""
        if self.engine is None or not prompts:
            return super().generate(prompts, sampling, progress)
        return self.engine.generate(self, prompts, sampling, progress)

    def speech_digest(self) -> str:
        """Digest of the weights and, if it is not the own one, of the engine."""
        return self.digest() if self.engine is None else f"{self.digest()} vllm"

    def fingerprint(self) -> Float[Tensor, " n"]:
        """Sum and length of each parameter, and whether the adapters are on: what changes when a weight does.

        Counters of PyTorch would be quicker still, but some ways to change a weight leave no trace in them.
        """
        numbers = [(one.sum(dtype=torch.float64), one.norm(dtype=torch.float64)) for one in self.parameters()]
        flat = torch.stack([number.detach() for pair in numbers for number in pair]).cpu()
        return torch.cat([flat, torch.tensor([float(self._adapter_on)], dtype=torch.float64)])

    def rebuild(self) -> CosyVoiceLM:
        """The model as its directory holds it, without adapters; it speaks by the same engine."""
        where = str(self.source.path), self.weights_name, self.voices_path
        vllm = None if self.engine is None else self.engine.settings
        return CosyVoiceLM(*where, self.dtype, bistream=self.bistream, front_end=self.front_end, vllm=vllm)

    def published(self) -> dict[str, Tensor]:
        """The weights as the published files hold them, adapters merged; see :func:`published_names`."""
        return published_names(self._weights())

    def save(self, directory: Path) -> None:
        """Write a directory that the CosyVoice runtime loads, adapters merged; it appears whole or not at all."""
        write_directory(self.source, self.published(), Path(directory))


def _merged(context: Context, voice: Voice | None) -> tuple[str, str, tuple[int, ...]]:
    """Instruction, transcript and speech tokens of the recording: the row's own, or the voice's."""
    if context.prompt_speech or context.prompt_text or context.instruct or voice is None:
        return context.instruct, context.prompt_text, context.prompt_speech
    if voice.mode == "zero_shot":
        return "", voice.prompt_text, voice.speech
    return voice.instruct if voice.mode == "instruct" else "", "", ()


def prefix_text(family: Family, instruct: str, prompt_text: str) -> str:
    """What stands before the words of an utterance.

    Args:
        family: version 3 wants its assistant line in front of everything.
        instruct: how to speak; taken as it is when it is closed already.
        prompt_text: transcript of the recording to continue.

    >>> prefix_text("cosyvoice2", "", "Hello.")
    'Hello.'
    >>> prefix_text("cosyvoice3", "Speak softly.", "")
    'You are a helpful assistant. Speak softly.<|endofprompt|>'
    """
    if not instruct.endswith(END_OF_PROMPT):
        if family == "cosyvoice3":
            instruct = f"{ASSISTANT} {instruct}" if instruct else ASSISTANT
        instruct += END_OF_PROMPT if instruct else ""
    return instruct + prompt_text


def sizes_of(source: ModelDirectory, state: Mapping[str, Tensor]) -> Sizes:
    """Sizes of a language model: what shapes do not tell is in the config of the text model beside it.

    Args:
        source: its directory.
        state: its weights, under our names.
    """
    return _sizes(source.family, state, backbone_sizes(source.backbone))


def _sizes(family: Family, state: Mapping[str, Tensor], text: BackboneSizes) -> Sizes:
    rows = state["speech_embedding.weight"].shape[0]
    codebook_size = rows - Layout(family, 0).vocabulary
    return Sizes(
        codebook_size=codebook_size,
        text_vocabulary=state["backbone.embed_tokens.weight"].shape[0],
        family=family,
        hidden_size=text.hidden_size,
        layers=text.layers,
        heads=text.heads,
        key_value_heads=text.key_value_heads,
        intermediate_size=text.intermediate_size,
        rope_theta=text.rope_theta,
        attention_dropout=text.attention_dropout,
        rms_norm_eps=text.rms_norm_eps,
    )


def backbone_names(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names, without the head of the text vocabulary."""
    needed = ("speech_embedding.weight", f"{BODY}embed_tokens.weight")
    if lacking := [key for key in needed if key not in published]:
        raise ValueError(f"these are not the weights of a CosyVoice2 or Fun-CosyVoice3 language model: no {lacking[0]}")
    return {_ours(key): value for key, value in published.items() if key != HEAD}


def _ours(key: str) -> str:
    return f"backbone.{key.removeprefix(BODY)}" if key.startswith(BODY) else key


def published_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the published names, in float32, the text head being the same tensor as the text embedding."""
    state: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = key.replace("backbone.", BODY, 1) if key.startswith("backbone.") else key
        state[name] = value.detach().to("cpu", torch.float32)
    state[HEAD] = state[f"{BODY}embed_tokens.weight"]
    return state


def fill(model: Qwen2CodecLM, state: Mapping[str, Tensor], where: Path | str, dtype: torch.dtype) -> None:
    """Give a model that was built without memory its weights.

    Args:
        model: on the ``meta`` device.
        state: weights under our names.
        where: they come from.
        dtype: of the weights.

    Raises:
        ValueError: names or shapes are not the model's.
    """
    # Built without memory, so what no file holds is made here.
    model.backbone.rotary_emb = type(model.backbone.rotary_emb)(config=model.backbone.config)
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in state.items()}
    if own != given:
        wrong = sorted(key for key in own.keys() | given.keys() if own.get(key) != given.get(key))
        raise ValueError(
            f"{where} does not hold this model's language model: {len(wrong)} of {len(own)} weights differ, "
            f"{wrong[0]} first (expected {own.get(wrong[0])}, got {given.get(wrong[0])})"
        )
    # A copy: what training changes must not be pages of the file.
    model.load_state_dict({key: value.to(dtype, copy=True) for key, value in state.items()}, assign=True)
    model.requires_grad_(True)


def load_lm(family: Family, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Qwen2CodecLM:
    """A language model with published weights, in float32 and in evaluation mode, without text tokenizer and voices.

    Args:
        family: whose special ids are used.
        state: what ``llm.pt`` holds; copied.
        config: what ``config.json`` of the text model holds, for what shapes do not tell.

    Raises:
        ValueError: these are not exactly the weights of such a language model.
    """
    ours = backbone_names(state)
    with torch.device("meta"):
        model = Qwen2CodecLM(sizes=_sizes(family, ours, read_backbone_sizes(config)))
    fill(model, ours, "state", torch.float32)
    return model.eval()
