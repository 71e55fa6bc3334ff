# SPDX-License-Identifier: Apache-2.0
"""The embedded corpora: Japanese sentences whose word 辛い is read からい (hot) or つらい (hard) by context."""
