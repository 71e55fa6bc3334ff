# SPDX-License-Identifier: Apache-2.0
"""The one shared training step, and everything around it."""
