# SPDX-License-Identifier: Apache-2.0
"""Files, audio, messages, processes: what every room uses."""
