# SPDX-License-Identifier: Apache-2.0
"""Policies, tokenizers, vocoders: one file per model."""
