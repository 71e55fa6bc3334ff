# SPDX-License-Identifier: Apache-2.0
"""Codec language models on a Qwen2 backbone, and how they are sampled."""
