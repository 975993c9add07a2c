"""Attack success and utility, measured on every prompt."""

from pathlib import Path


# `evaluate.load(str(METRICS / "attack_success_rate"))`
METRICS = Path(__file__).parent / "metrics"
