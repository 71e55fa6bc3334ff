# SPDX-License-Identifier: Apache-2.0
"""Compiled layers give the numbers and gradients of plain ones."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from processes import forked


def compared(backend: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """``compiled.py`` in a process of its own."""
    environment = {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    program = Path(__file__).with_name("compiled.py")
    return forked([[sys.executable, str(program), backend]], [folder], [environment])[0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_layers_are_the_same(backend: str, tmp_path: Path):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU, and there is no g++")
    if backend != "eager" and "RUN_COMPILER" not in os.environ:
        pytest.skip("takes up to minutes of a core: set RUN_COMPILER=1; benchmarks/compiled.py compares it, too")
    done = compared(backend, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [backend]
