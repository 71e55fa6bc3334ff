# SPDX-License-Identifier: Apache-2.0
"""Speech tokenizers of mel frames, and what turns their tokens into sound."""
