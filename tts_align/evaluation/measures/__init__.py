# SPDX-License-Identifier: Apache-2.0
"""What is measured of an utterance besides its words: voice, quality, prosody."""
