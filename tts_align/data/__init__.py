# SPDX-License-Identifier: Apache-2.0
"""From a manifest to micro-batches: reading, selecting, planning, collating."""
