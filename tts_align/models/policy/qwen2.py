# SPDX-License-Identifier: Apache-2.0
"""A codec language model on a Qwen2 backbone: the shape of CosyVoice2 and CosyVoice 3, at any size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen2Config

from tts_align.batch import Rows, Scored
from tts_align.models.base.generation import Context, Encoded, Prompt, Sampling, Spoken
from tts_align.models.base.layout import SPEECH, TEXT, Family, Layout
from tts_align.models.base.policy import CodecLM
from tts_align.models.policy.attention import RowAttention
from tts_align.models.policy.backbone import Backbone, compile_blocks
from tts_align.models.policy.decoding import Decoding
from tts_align.models.policy.kernels import score_targets
from tts_align.utils.model_directory import CONFIG, TOKENIZER, find_model, load_weights_of, read_sizes, write_model
from tts_align.utils.readers import read_text, reading
from tts_align.utils.weights import weights_digest

_PLAIN = Context()
_NOBODY = frozenset({"unk", "pad", "mask", "s", "/s", "bos", "eos", "cls", "sep"})
"""Tokens of a tokenizer's own that look like a voice's."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model; what ``config.json`` in its directory holds.

    Args:
        codebook_size: speech tokens of the tokenizer.
        text_vocabulary: ids of the text tokenizer.
        family: version whose special ids are used.
        hidden_size: width of the layers.
        layers: number of blocks.
        heads: attention heads.
        key_value_heads: heads of keys and values (grouped-query attention).
        intermediate_size: width inside the feed-forward layers.
        rope_theta: base of the rotary positions.
        attention_dropout: share of dropout of attention weights, in training of the policy only.
        prefix_format: form in which a voice enters the text; ``{speaker}`` is replaced by its name. Empty: it does not.
        rms_norm_eps: small number that the normalisation adds, so that it never divides by 0.
    """

    codebook_size: int
    text_vocabulary: int
    family: Family = "cosyvoice2"
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    intermediate_size: int = 384
    rope_theta: float = 1e6
    attention_dropout: float = 0.0
    prefix_format: str = ""
    rms_norm_eps: float = 1e-6

    def backbone(self) -> Qwen2Config:
        """The same sizes in the words of transformers."""
        return Qwen2Config(
            vocab_size=self.text_vocabulary,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            intermediate_size=self.intermediate_size,
            attention_dropout=self.attention_dropout,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            rms_norm_eps=self.rms_norm_eps,
            use_sliding_window=False,
            tie_word_embeddings=False,
            attn_implementation="sdpa",  # type: ignore[call-arg]  # taken by the base class
        )


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (arXiv 2106.09685) on the backbone; everything else is frozen.

    Args:
        rank: rank of the update.
        alpha: scale of the update, which is multiplied by alpha / rank.
        dropout: dropout before the update, in training only.
        targets: names of the linear layers that get an adapter.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Qwen2CodecLM(CodecLM):
    """A codec language model on a Qwen2 backbone.

    Args:
        directory: model directory with ``config.json``, ``model.safetensors`` and ``tokenizer.json``;
            ``demo:audio/base`` and ``demo:symbolic/base`` name the embedded ones. Without it a model of random weights
            is made from ``sizes``.
        sizes: sizes of a new model; not together with ``directory``.
        tokenizer: text tokenizer file of a new model (``tokenizers`` JSON).
        lora: low-rank adapters to train instead of all weights; the frozen base is then the reference.
        recompute: whether layers are computed again in the backward pass instead of being kept: less memory, more time.
        compile: whether layers are compiled (torch.compile): the first steps take longer, the others less time.
        bistream: lengths of the blocks of text and speech tokens, for rows that interleave them.
    """

    def __init__(
        self,
        directory: str | None = None,
        sizes: Sizes | None = None,
        tokenizer: str | None = None,
        lora: LoRA | None = None,
        recompute: bool = False,
        compile: bool = False,
        bistream: tuple[int, int] = (5, 15),
    ) -> None:
        super().__init__()
        if (directory is None) == (sizes is None):
            raise ValueError("model.policy needs exactly one of `directory` (a trained model) and `sizes` (a new one)")
        path = None if directory is None else find_model(directory, "model.policy")
        if path is not None:
            tokenizer, sizes = str(path / TOKENIZER), read_sizes(path, Sizes)
        assert sizes is not None
        self.directory = path
        self.tokenizer = None if tokenizer is None else _read_tokenizer(tokenizer)
        check_text_vocabulary(self.tokenizer, sizes.text_vocabulary)
        with nullcontext() if path is None else reading(path / CONFIG, "sizes of a Qwen2CodecLM"):
            self._build(sizes, bistream)
        self.backbone.recompute = recompute
        if compile:
            compile_blocks(self.backbone)
        for table in self.children():
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=0.02)
        if path is not None:
            load_weights_of(self, path)
        self._add_adapters(lora)

    def _build(self, sizes: Sizes, bistream: tuple[int, int]) -> None:
        self.sizes, self.bistream = sizes, bistream
        self.layout = Layout(sizes.family, sizes.codebook_size, *bistream)
        self.backbone = Backbone(sizes.backbone())
        vocabulary = self.layout.vocabulary
        if sizes.family == "cosyvoice2":
            self.llm_embedding = nn.Embedding(2, sizes.hidden_size)
        self.speech_embedding = nn.Embedding(vocabulary, sizes.hidden_size)
        self.llm_decoder = nn.Linear(sizes.hidden_size, vocabulary, bias=sizes.family == "cosyvoice2")

    def _add_adapters(self, lora: LoRA | None) -> None:
        self.lora = lora
        self._adapter_on = lora is not None
        if lora is None:
            return
        from peft import LoraConfig

        self.requires_grad_(False)
        config = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets)
        )
        self.backbone.add_adapter(config, adapter_name="policy")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(".lora_" in name)
            if ".lora_" in name:  # in the base's type small steps would be lost
                parameter.data = parameter.data.float()

    def stays_float32(self, parameter: str) -> bool:
        """Adapters do, whatever the base is brought to."""
        return ".lora_" in parameter

    @property
    def table(self) -> nn.Embedding:
        """Vectors of all speech tokens, and of the special tokens behind them."""
        return self.speech_embedding

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Layers of the backbone."""
        return self.backbone.blocks

    def embed(self, token: Int[Tensor, " l"], table: Int[Tensor, " l"]) -> Float[Tensor, "l h"]:
        """Input vectors: every id from the table it belongs to."""
        is_text, is_speech = table == TEXT, table == SPEECH
        # Three small look-ups instead of Boolean indexing: nothing here waits for a GPU.
        text = self.backbone.embed_tokens(token.where(is_text, 0))
        speech = self.speech_embedding(token.where(is_speech, 0))
        vectors = torch.where(is_text[:, None], text, speech)
        if self.sizes.family == "cosyvoice2":
            special = self.llm_embedding(token.where(~(is_text | is_speech), 0))
            vectors = torch.where((is_text | is_speech)[:, None], vectors, special)
        return vectors

    def forward(self, rows: Rows, logits: bool = False) -> Scored:
        """Score every target of ``rows``; the last layer and the head run on real targets only."""
        inputs = self.embed(rows.token, rows.table)
        dropout = self.sizes.attention_dropout if self.training else 0.0
        hidden = self.backbone(
            inputs if rows.vectors is None else inputs + rows.vectors.to(inputs.dtype),
            rows.position,
            RowAttention(rows.lengths, rows.offset, rows.row, rows.position, dropout),
            rows.hidden_index,
        )
        logp, normaliser, scores = score_targets(hidden, self.llm_decoder, rows.target, logits)
        return Scored(rows.scatter(logp), rows.mask, scores, normaliser if logits else None)

    @property
    def speakers(self) -> tuple[str, ...] | None:
        """Voices that have a token of their own; ``None`` where a voice is no token, but text or nothing."""
        before, mark, after = self.sizes.prefix_format.partition("{speaker}")
        if self.tokenizer is None or not mark or not before + after:
            return None
        found = [name for name in self.tokenizer.get_vocab() if name.startswith(before) and name.endswith(after)]
        names = {name[len(before) : len(name) - len(after)] for name in found if len(name) > len(before + after)}
        return tuple(sorted(names - _NOBODY)) or None

    @property
    def text_identity(self) -> str | None:
        """Digest of tokenizer and prefix; a class of its own may read texts otherwise."""
        if type(self).encode_text is not Qwen2CodecLM.encode_text or self.tokenizer is None:
            return None
        words = f"{self.sizes.prefix_format}\0{self.tokenizer.to_str()}"
        return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()

    def encode_text(self, text: str, context: Context = _PLAIN) -> Encoded:
        """Token ids of the voice's prefix and the text; other contexts than a voice are refused."""
        if self.tokenizer is None:
            raise ValueError("this model has no text tokenizer: give `tokenizer`, or a directory that holds one")
        if not context.only_speaker:
            raise ValueError(
                f"{type(self).__name__} takes no instruct, prompt_text or prompt_speech: leave these columns out"
            )
        prefix: list[int] = []
        if self.sizes.prefix_format:
            voice = self.sizes.prefix_format.replace("{speaker}", context.speaker)
            token = self.tokenizer.token_to_id(voice)
            if token is None and context.speaker and (known := self.speakers):
                raise ValueError(f"unknown voice {context.speaker!r}: the policy speaks as {', '.join(known)}")
            prefix = [token] if token is not None else self.tokenizer.encode(voice).ids
        return Encoded((*prefix, *self.tokenizer.encode(text).ids), len(prefix))

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Callable[[int], None] | None = None
    ) -> list[Spoken]:
        """Speak all prompts in one batch with a key-value cache; finished utterances leave the batch."""
        if not prompts:
            return []
        was_training = self.training
        self.eval()
        try:
            return Decoding(self, prompts, sampling).run(progress)
        finally:
            self.train(was_training)

    def rebuild(self) -> Qwen2CodecLM:
        """The model as its directory holds it, without adapters."""
        if self.directory is None:
            raise ValueError(
                "a policy made from `sizes` cannot be rebuilt as its own reference: save it and name its directory"
            )
        return Qwen2CodecLM(str(self.directory), bistream=self.bistream)

    @property
    def adapted(self) -> bool:
        """Whether only adapters train."""
        return self.lora is not None

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Within the block the model is its frozen base."""
        if self.lora is None:
            raise RuntimeError("there is no adapter to take off: the policy trains all its weights")
        loose = [name for name, value in self.named_parameters() if value.requires_grad and ".lora_" not in name]
        if loose:
            raise RuntimeError(
                f"with the adapter off the policy is not its base, because {loose[0]} and {len(loose) - 1} more train"
            )
        was_on = self._adapter_on
        if was_on:
            self.backbone.disable_adapters()
        self._adapter_on = False
        try:
            yield
        finally:
            if was_on:
                self.backbone.enable_adapters()
            self._adapter_on = was_on

    def _weights(self) -> dict[str, Tensor]:
        """State with adapters merged into it while they are on, left out while they are off, under plain names."""
        state = {
            key.replace(".base_layer", ""): value for key, value in self.state_dict().items() if ".lora_" not in key
        }
        if self.lora is None or not self._adapter_on:
            return state
        for name, module in self.backbone.named_modules():
            if hasattr(module, "get_delta_weight"):
                key = f"backbone.{name}.weight"
                # In float32, as a small update would vanish in a coarser weight.
                state[key] = state[key].float() + module.get_delta_weight("policy").float()
        return state

    def digest(self) -> str:
        """Digest of all weights as they are now."""
        return weights_digest(self._weights())

    def save(self, directory: Path) -> None:
        """Write config, weights (adapters merged) and tokenizer; the directory appears whole or not at all."""
        texts = {} if self.tokenizer is None else {TOKENIZER: self.tokenizer.to_str(pretty=True)}
        write_model(directory, self.sizes, self._weights(), texts)


def _read_tokenizer(path: str) -> Tokenizer:
    with reading(path, "a tokenizer of the library tokenizers"):
        return Tokenizer.from_str(read_text(path))


def check_text_vocabulary(tokenizer: Tokenizer | None, rows: int) -> None:
    """Raise ``ValueError`` if a text tokenizer has ids for which the text embedding has no row."""
    highest = -1 if tokenizer is None else max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= rows:
        raise ValueError(
            f"the text tokenizer has ids up to {highest}, the text embedding {rows} rows: check model.policy.tokenizer "
            "and sizes.text_vocabulary"
        )
