# SPDX-License-Identifier: Apache-2.0
"""The flow-matching models of both versions."""
