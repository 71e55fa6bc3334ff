# SPDX-License-Identifier: Apache-2.0
"""Flow matching from speech tokens to mel frames."""
