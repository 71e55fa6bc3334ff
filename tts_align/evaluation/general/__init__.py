# SPDX-License-Identifier: Apache-2.0
"""General sentences without marked words, one file per language: what training must not break."""
