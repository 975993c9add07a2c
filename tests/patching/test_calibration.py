"""Tests of the calibration of patch thresholds."""

from itertools import cycle

import datasets
import pytest
from datasets import Dataset

from crow_hf import EntropyPatcher
from crow_hf.patching.calibration import calibrate_threshold
from helpers.documents import words
from helpers.tiny import tiny_predictor


WINDOWED = tiny_predictor(sliding_window=6, max_position_embeddings=32)


@pytest.mark.parametrize("rule", ["either", "global", "monotonic", "both", "running_minimum"])
@pytest.mark.parametrize("target", [3.0, 4.5])
def test_calibration_reaches_the_target_and_reports_the_size(rule, target):
    documents = [words(b"abcdefgh ", 1000, seed) for seed in range(5)]
    kwargs = {"rule": rule, "threshold": 0.75, "relative_threshold": 0.09375}
    found = calibrate_threshold(documents, WINDOWED, target, **kwargs)
    assert found.relative_threshold == pytest.approx(found.threshold / 8)
    assert found.num_bytes == 5000
    if rule != "running_minimum":
        assert found.patch_size == pytest.approx(target, rel=0.02)
    patcher = EntropyPatcher(WINDOWED, found.threshold, found.relative_threshold, rule=rule)
    assert found.patch_size == pytest.approx(
        5000 / sum(len(patcher.patches(document)) for document in documents), rel=1e-3
    )


def test_calibration_reads_no_more_than_it_needs():
    endless = cycle([{"text": "some words of a text\n"}])
    assert calibrate_threshold(endless, WINDOWED, 3.0, max_bytes=1000).num_bytes == 1000


@pytest.mark.parametrize(
    ("documents", "kwargs", "said"),
    [
        ([], {}, "no bytes"),
        ([""], {}, "no bytes"),
        (["a"], {"target_patch_size": 0.9}, "target_patch_size"),
        (["a"], {"rule": "whitespace"}, "whitespace"),
        ([{"words": "a"}], {}, "column"),
        ([{"text": "a"}], {"column": "other"}, "other"),
        ([None], {}, "NoneType"),
        ("one text", {}, "list of texts"),
        (datasets.DatasetDict(train=Dataset.from_dict({"text": ["a"]})), {}, "one split"),
    ],
)
def test_unusable_data_and_settings_are_refused(documents, kwargs, said):
    with pytest.raises(ValueError, match=said):
        calibrate_threshold(documents, WINDOWED, **kwargs)


def test_an_unreachable_size_gives_a_warning(patching_warnings):
    calibrate_threshold([b"\0" * 50], WINDOWED, 4.5)
    assert "No thresholds" in patching_warnings()[0]
