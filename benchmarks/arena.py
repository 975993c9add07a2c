"""How well does each defence work against each attack? Runs the arena, like `crow-hf arena`.

    python benchmarks/arena.py --output_dir runs/arena --workers 2 --alpaca alpaca_data.json
    python benchmarks/arena.py --output_dir runs/quick --quick --workers 2

Run it again to continue a stopped arena. If all runs are finished, it only writes the tables again.
"""

import sys

from crow_hf.cli.main import main


# Spawned workers import this file, so the guard is necessary.
if __name__ == "__main__":
    sys.exit(main(["arena", *sys.argv[1:]]))
