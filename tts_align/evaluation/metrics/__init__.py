# SPDX-License-Identifier: Apache-2.0
"""Error rates, intervals, statistics of tokens: pure functions."""
