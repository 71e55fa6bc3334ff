# SPDX-License-Identifier: Apache-2.0
"""The head."""


class ParallelLMHead:
    """Only named here."""
