# SPDX-License-Identifier: Apache-2.0
"""What speaks, listens and reports."""
