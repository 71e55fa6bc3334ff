# SPDX-License-Identifier: Apache-2.0
"""CosyVoice2 and Fun-CosyVoice3: the only part of the package that knows their file formats and names."""
