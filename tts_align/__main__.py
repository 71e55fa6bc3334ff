# SPDX-License-Identifier: Apache-2.0
"""``python -m tts_align``."""

from tts_align.cli.entry import main

if __name__ == "__main__":
    main()
