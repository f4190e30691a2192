"""Measures the figures of docs/performance.md: `make bench`, or `.venv/bin/python bench/run.py --help`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from bench.command import main

    sys.exit(main())
