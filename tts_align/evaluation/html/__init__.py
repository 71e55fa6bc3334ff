# SPDX-License-Identifier: Apache-2.0
"""Pages of results: one file each, with everything inside, that opens from disk."""
