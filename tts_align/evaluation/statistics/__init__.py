# SPDX-License-Identifier: Apache-2.0
"""Intervals, tests and corrections: pure functions of numbers."""
