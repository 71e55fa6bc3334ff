# SPDX-License-Identifier: Apache-2.0
"""The command: how a recipe is read, built and run; one file per command."""
