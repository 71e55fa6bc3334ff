# SPDX-License-Identifier: Apache-2.0
"""``python -m tts_align``."""

import os
import sys

from tts_align.cli.entry import main

if __name__ == "__main__":
    try:
        here = os.getcwd()
    except FileNotFoundError:  # which the command says
        here = ""
    # Python has put the current folder first: a file in it must not stand for an installed package.
    if sys.path[0] in ("", here) and here not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        sys.path.append(sys.path.pop(0))
    main()
