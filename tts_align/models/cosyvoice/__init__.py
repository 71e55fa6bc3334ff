# SPDX-License-Identifier: Apache-2.0
"""CosyVoice2 and Fun-CosyVoice3: the only place that knows their files and names."""
