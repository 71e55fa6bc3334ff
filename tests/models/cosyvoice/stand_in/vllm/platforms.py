# SPDX-License-Identifier: Apache-2.0
"""Where it computes."""

from types import SimpleNamespace

current_platform = SimpleNamespace(is_cpu=lambda: True)
