# SPDX-License-Identifier: Apache-2.0
"""Models: their interfaces in base, one folder per kind."""
