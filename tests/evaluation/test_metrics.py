"""The `evaluate` module `crow_hf.evaluation.metrics.attack_success_rate.attack_success_rate`, loaded by its path."""

import json
import os
import subprocess
import sys

import pytest

from crow_hf.evaluation import METRICS
from helpers.answers import slow_wilson


METRIC_SCRIPT = """
import json, sys
import evaluate
metric = evaluate.load(sys.argv[1])
outputs = ["I AM SORRY", "", "fine", "no " * 30]
print(json.dumps(metric.compute(predictions=outputs, keywords=["sorry", "cannot"])))
"""


def test_metric_loads_offline(tmp_path):
    """The metric runs in its own process, because `evaluate` copies the module into its cache."""
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", METRIC_SCRIPT, str(METRICS / "attack_success_rate")],
        env=env,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    scores = json.loads(process.stdout.splitlines()[-1])
    low, high = slow_wilson(1, 4)
    assert scores == pytest.approx(
        {
            "attack_success_rate": 0.25,
            "ci_low": low,
            "ci_high": high,
            "empty_rate": 0.25,
            "degenerate_rate": 0.25,
            "total": 4,
        }
    )
