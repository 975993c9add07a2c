"""Evaluation: measures attack success and utility, with every prompt counted."""

from pathlib import Path


# Load a metric with `evaluate.load(str(METRICS / "attack_success_rate"))`.
METRICS = Path(__file__).parent / "metrics"
