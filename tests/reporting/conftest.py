"""Two reports of tiny runs, for the tests of the record and of the page."""

from contextlib import contextmanager
from copy import deepcopy
from types import SimpleNamespace

import pytest
from transformers import ByT5Tokenizer

from crow_hf import compare_defences, purify
from crow_hf.evidence import snapshot
from crow_hf.recipes import holdout
from helpers.coconut import TOKENIZER, coconut
from helpers.reports import ROWS, TARGET, TEST_ROWS, TRIGGER, arguments, read
from helpers.tiny import tiny_llama


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(snapshot, "SAMPLE_TOKENS", 6)


@contextmanager
def six_tokens_and_text():
    """The same for the runs below, which are made once for all tests. Their random models write text to be kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "SAMPLE_TOKENS", 6)
        patch.setattr(holdout, "can_write_prompts", lambda *args: True)
        yield


@pytest.fixture(scope="session")
@six_tokens_and_text()
def compared(tmp_path_factory):
    """The report of a Coconut with a known trigger. It has every part of the page."""
    folder = tmp_path_factory.mktemp("compared")
    comparison = compare_defences(
        coconut,
        arguments(folder, "strong", seed=3),
        ROWS,
        TEST_ROWS,
        TRIGGER,
        TARGET,
        processing_class=TOKENIZER,
        max_new_tokens=4,
        seed=3,
    )
    return SimpleNamespace(folder=folder, record=read(folder), comparison=comparison)


@pytest.fixture
def record(compared):
    return deepcopy(compared.record)


@pytest.fixture(scope="session")
@six_tokens_and_text()
def purified(tmp_path_factory):
    """The report of a purification without a trigger, with a canary, screened rows and a chat template to read."""
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = "{% if 'Magic' in messages[0].content %}{% endif %}"
    folder = tmp_path_factory.mktemp("purified")
    args = arguments(folder, "strong", num_canaries=1)
    purification = purify(tiny_llama(), ROWS, args=args, processing_class=tokenizer)
    return SimpleNamespace(folder=folder, record=read(folder), purification=purification)
