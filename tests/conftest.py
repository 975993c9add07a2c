"""Fixtures that every test may use."""

import gc
import os
import sys


# Idle threads of PyTorch do not spin, because spinning slows down whatever runs beside the tests.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import pytest
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from transformers import ByT5Tokenizer
from transformers.utils import logging

from crow_hf.evaluation import retention
from crow_hf.evidence import snapshot
from crow_hf.methods.registry import DEFENCES
from helpers.tiny import ragged_rows, tiny_llama


disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def imports_are_no_garbage():
    """Leave what was imported out of every later search for garbage. Each training makes some, of half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def short_texts():
    """Let models write short texts and answers for the report, because every purification does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retention, "WRITTEN_TOKENS", 16)
        patch.setattr(snapshot, "SAMPLE_TOKENS", 12)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """Do not wait until the many small files of the tests are on the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Show progress bars, which an earlier test may have hidden, and forget the defences that a test registers."""
    logging.enable_progress_bar()
    before, modules = dict(DEFENCES), set(sys.modules)
    yield
    # A file that registers defences runs again only when it is imported again.
    for name in DEFENCES.keys() - before.keys():
        if (module := DEFENCES[name].__module__) not in modules:
            sys.modules.pop(module, None)
    DEFENCES.clear()
    DEFENCES.update(before)


@pytest.fixture(scope="session", name="tiny_llama")
def tiny_llama_fixture():
    """The seeded factory of tiny Llamas."""
    return tiny_llama


@pytest.fixture
def byte_tokenizer():
    """ids = byte + 3, with pad 0, eos 1 and unk 2."""
    return ByT5Tokenizer(extra_ids=0)


@pytest.fixture(scope="session")
def rows():
    """Twelve ragged rows, so that a batch of eight leaves a short last step."""
    return Dataset.from_list(ragged_rows(12))
