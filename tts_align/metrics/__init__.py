# SPDX-License-Identifier: Apache-2.0
"""How speech is scored: pure functions, and their torchmetrics twins."""
