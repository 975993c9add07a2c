"""Fixtures of the patching tests: a cache of their own, and the warnings of the package."""

import logging

import datasets
import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def patching_warnings(caplog, monkeypatch):
    """Return a function that lists the warnings of the patching modules."""
    monkeypatch.setattr(logging.getLogger("crow_hf"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("crow_hf.patching.")]
