"""A tiny wav2vec 2.0 for CTC, as transformers saves it: random, of several languages, or taught to tell tones apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.nn import functional

RATE = 16_000
LETTER_SECONDS = 0.12


def save_ctc(
    folder: Path,
    letters: Sequence[str] | Mapping[str, Sequence[str]],
    norm: str = "layer",
    adapters: bool = False,
    kind: str = "wav2vec2",
) -> Path:
    """Write a model whose blank is 0, and the vocabulary beside it."""
    from transformers import HubertConfig, HubertForCTC, Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    special = ["<pad>", "<s>", "</s>", "<unk>", "|"]
    several = isinstance(letters, Mapping)
    groups: Mapping[str, Sequence[str]] = letters if isinstance(letters, Mapping) else {"": letters}
    vocabularies = {name: {token: i for i, token in enumerate([*special, *one])} for name, one in groups.items()}
    sizes = [len(one) for one in vocabularies.values()]
    torch.manual_seed(0)
    arguments = {
        "vocab_size": sizes[0],
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "conv_dim": (16, 16, 16),
        "conv_stride": (8, 8, 4),
        "conv_kernel": (16, 16, 8),
        "num_feat_extract_layers": 3,
        "feat_extract_norm": norm,
        "do_stable_layer_norm": norm == "layer",
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "layerdrop": 0.0,
        "apply_spec_augment": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if adapters:
        arguments["adapter_attn_dim"] = 4
    kinds = {"wav2vec2": (Wav2Vec2ForCTC, Wav2Vec2Config), "hubert": (HubertForCTC, HubertConfig)}
    of_ctc, config = kinds[kind]
    model = of_ctc(config(**arguments))
    model.save_pretrained(folder)
    if adapters:
        _save_adapters(folder, model, vocabularies)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=norm == "layer").save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabularies if several else vocabularies[""]), "utf-8")
    return folder


def _save_adapters(folder: Path, model: torch.nn.Module, vocabularies: Mapping[str, Mapping[str, int]]) -> None:
    """Adapters of each language as MMS has them: its attention adapters, and its own last layer."""
    from safetensors.torch import save_file

    for number, (name, vocabulary) in enumerate(vocabularies.items(), start=1):
        torch.manual_seed(number)
        weights = {key: 0.1 * torch.randn_like(value) for key, value in model._get_adapters().items()}
        weights["lm_head.weight"] = torch.randn(len(vocabulary), 32)
        weights["lm_head.bias"] = torch.randn(len(vocabulary))
        save_file(weights, folder / f"adapter.{name}.safetensors")


def tone(text: str, letters: Sequence[str], seed: int = 0) -> torch.Tensor:
    """A sound in which each letter is a tone of its own, with a little noise and a silence at both ends."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(int(LETTER_SECONDS * RATE)) / RATE
    pieces = [torch.sin(2 * torch.pi * 250 * (1.35 ** letters.index(letter)) * time) for letter in text]
    quiet = torch.zeros(RATE // 20)
    sound = torch.cat([quiet, *pieces, quiet])
    return 0.3 * sound + 0.01 * torch.randn(len(sound), generator=generator)


def teach(folder: Path, letters: Sequence[str], steps: int = 60) -> Path:
    """Teach a model that :func:`save_ctc` wrote to write the tones of :func:`tone`, frame by frame."""
    from transformers import Wav2Vec2ForCTC

    model = Wav2Vec2ForCTC.from_pretrained(folder).train()
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        spelled = torch.randint(len(letters), (8, 5), generator=generator)
        texts = ["".join(letters[i] for i in row) for row in spelled.tolist()]
        sounds = torch.stack([tone(text, letters, seed=100 * step + i) for i, text in enumerate(texts)])
        sounds = (sounds - sounds.mean(-1, keepdim=True)) / sounds.std(-1, keepdim=True)
        logits = model(sounds).logits
        # Where each frame lies, in letters: the middle of a letter is the letter, everything else the blank.
        place = (torch.arange(logits.shape[1]) * 256 / RATE + 0.012 - 0.05) / LETTER_SECONDS
        inside = (place % 1 > 0.25) & (place % 1 < 0.75) & (place > 0) & (place < 5)
        wanted = torch.where(inside, 5 + spelled[:, place.clamp(0, 4.99).long()], 0)
        loss = functional.cross_entropy(logits.transpose(1, 2), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(folder)
    return folder
