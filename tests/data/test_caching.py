"""What is cached by one release is not read by another."""

import copy

from datasets.fingerprint import Hasher

from crow_hf.attacks.poison import Poison
from crow_hf.attacks.targets import TARGETS
from crow_hf.attacks.triggers import TRIGGERS
from crow_hf.data import caching
from crow_hf.data.encoding import _TextRow, _TokenRow
from crow_hf.methods.invariance.views import ViewRow


def test_another_release_does_not_read_the_cache_of_this_one(byte_tokenizer, monkeypatch):
    """`datasets` does not see the code of a function object. Fails if an update of the package reads old results."""
    functions = (
        _TextRow(byte_tokenizer, 8),
        _TokenRow(8),
        ViewRow(byte_tokenizer, ["word"], 8, 0, 0.0),
        Poison(TRIGGERS["badnets"], TARGETS["insult"]),
    )
    before = [Hasher.hash(function) for function in functions]
    assert [Hasher.hash(copy.copy(function)) for function in functions] == before
    monkeypatch.setattr(caching, "__version__", "another")
    assert not set(before) & {Hasher.hash(function) for function in functions}
