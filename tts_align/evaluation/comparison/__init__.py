# SPDX-License-Identifier: Apache-2.0
"""Two systems on the same utterances: what got better, what got worse, and whether it may be chance."""
