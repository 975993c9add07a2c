"""Tests of the forms in which a saved model may be deployed. bitsandbytes itself need not be installed."""

import pytest
import torch

from crow_hf.training import quantization
from crow_hf.training.loading import is_quantized, load_causal_lm
from crow_hf.training.quantization import QUANTIZATIONS, quantized
from helpers.tiny import tiny_llama


def test_what_cannot_be_quantized_is_refused(monkeypatch):
    assert quantized(None) == {}
    with pytest.raises(ValueError, match="one of nf4, int8, got 'int3'"):
        quantized("int3")
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match=r"pip install crow-hf\[qlora\]"):
        quantized("nf4")


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_the_model_is_quantized_while_it_is_loaded(name, tmp_path):
    """Fails if the weights stay as they are, or are not those of the model."""
    pytest.importorskip("bitsandbytes")
    # Small weights, with which the errors of the layers do not add up.
    model = tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.02)
    model.save_pretrained(tmp_path)
    found = load_causal_lm(tmp_path, device_map="auto", **quantized(name))
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        logits, expected = (each.eval()(ids).logits.float() for each in (found, model))
    distance = (logits - expected).norm() / expected.norm()
    assert is_quantized(found)
    assert 1e-5 < distance < (0.3 if name == "nf4" else 0.05)
