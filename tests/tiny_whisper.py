"""A tiny Whisper with random weights, as transformers saves it and converted for CTranslate2; made offline."""

from __future__ import annotations

import json
from pathlib import Path

import torch

LANGUAGES = ("en", "zh", "ja")
_SPECIAL = ("<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>")
_TIMESTAMPS = 1501


def save_whisper(folder: Path, mel_channels: int = 80, seed: int = 0) -> Path:
    """Write ``folder`` as transformers has it: any text can be spelled, byte by byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        GenerationConfig,
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    # The empty text is what CTranslate2 knows a multilingual model by.
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), ""]
    specials = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{name}|>" for name in LANGUAGES), *_SPECIAL]
    vocabulary = {letter: place for place, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    end = "<|endoftext|>"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end)
    wrapped.save_pretrained(folder)
    ids = {name: tokenizer.token_to_id(name) for name in specials}
    size = len(letters) + len(specials) + _TIMESTAMPS
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=size,
            num_mel_bins=mel_channels,
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=64,
            init_std=0.6,
            bos_token_id=ids[end],
            eos_token_id=ids[end],
            pad_token_id=ids[end],
            decoder_start_token_id=ids["<|startoftranscript|>"],
            suppress_tokens=[],
            begin_suppress_tokens=[],
        )
    )
    model.generation_config = GenerationConfig(
        bos_token_id=ids[end],
        eos_token_id=ids[end],
        pad_token_id=ids[end],
        decoder_start_token_id=ids["<|startoftranscript|>"],
        lang_to_id={f"<|{name}|>": ids[f"<|{name}|>"] for name in LANGUAGES},
        task_to_id={"translate": ids["<|translate|>"], "transcribe": ids["<|transcribe|>"]},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        is_multilingual=True,
        suppress_tokens=list(range(len(letters) + 1, size)),  # nothing but text, or the end
        begin_suppress_tokens=[],
        alignment_heads=[[1, 0], [1, 1]],
    )
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=mel_channels).save_pretrained(folder)
    return folder


def convert(folder: Path, to: Path) -> Path:
    """Convert what :func:`save_whisper` wrote for CTranslate2."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder), copy_files=["tokenizer.json", "preprocessor_config.json"]).convert(str(to))
    assert json.loads((to / "config.json").read_text())["alignment_heads"]
    return to
