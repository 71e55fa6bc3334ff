# SPDX-License-Identifier: Apache-2.0
"""The HiFT vocoders of both versions."""
