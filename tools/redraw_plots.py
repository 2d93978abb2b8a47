# SPDX-License-Identifier: Apache-2.0
"""Draw the pictures of docs/benchmarks.md anew, of the figures that the last run left.

Usage: ``redraw_plots.py``, after a change to how plots are drawn. It measures nothing.
"""

import sys
from pathlib import Path

from xvd.bench.page import redraw

if __name__ == "__main__":
    redraw(Path(__file__).resolve().parent.parent / "docs" / "benchmarks")
    sys.exit(0)
