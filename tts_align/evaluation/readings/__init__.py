# SPDX-License-Identifier: Apache-2.0
"""Which reading of a marked word is said: candidates, their spellings, and the choice between them by likelihood."""
