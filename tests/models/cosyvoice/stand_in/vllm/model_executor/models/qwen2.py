# SPDX-License-Identifier: Apache-2.0
"""The model."""


class Qwen2ForCausalLM:
    """Only derived from here."""
