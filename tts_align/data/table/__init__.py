# SPDX-License-Identifier: Apache-2.0
"""Manifests as tables that lie on the disk and are looked at through the memory: checked once, shared by all."""
