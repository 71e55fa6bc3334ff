# SPDX-License-Identifier: Apache-2.0
"""The multi-task reward model."""
