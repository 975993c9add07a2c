"""How well does each defence do against each attack? The arena, as `crow-hf arena` runs it.

    python benchmarks/arena.py --output_dir runs/arena --workers 2 --alpaca alpaca_data.json
    python benchmarks/arena.py --output_dir runs/quick --quick --workers 2

Called again it goes on where it stopped; called when nothing is left it writes the tables anew.
"""

import sys

from crow_hf.cli.main import main


# Spawned workers import this file.
if __name__ == "__main__":
    sys.exit(main(["arena", *sys.argv[1:]]))
