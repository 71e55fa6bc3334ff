# SPDX-License-Identifier: Apache-2.0
"""Nothing here may ask another machine for anything."""

from offline import no_network

__all__ = ["no_network"]
