"""Which defence removes which backdoor, and what does it cost? This script runs the arena, as `crow-hf arena` does.

    python benchmarks/arena.py --output_dir runs/arena --workers 2 --alpaca alpaca_data.json
    python benchmarks/arena.py --output_dir runs/quick --quick --workers 2

A second call resumes an arena that was stopped. If nothing is missing, it only writes the tables again.
"""

import sys

from crow_hf.cli.main import main


# Worker processes import this file too.
if __name__ == "__main__":
    sys.exit(main(["arena", *sys.argv[1:]]))
