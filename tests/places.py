"""Where things lie in a checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
BENCHMARKS = ROOT / "benchmarks"
SHARED = ROOT.parent / "shared"
"""Reference dumps beside the checkout; tests that read them are skipped where it is absent."""
