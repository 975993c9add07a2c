"""Tests of the two models of a run that answer the same prompts."""

import pytest

from crow_hf import load_causal_lm
from crow_hf.cli.partners import Partner, load_partners
from helpers.tiny import same_weights, tiny_llama, weights_of


def test_the_models_of_a_run(finished, paths):
    """Fails if the models are swapped, or if a report alone does not lead to the model beside it."""
    suspect, purified = map(weights_of, (load_causal_lm(paths["model"]), load_causal_lm(finished)))
    partners = {each.title: weights_of(each.model) for each in load_partners(str(finished / "report.json"))}
    assert list(partners) == ["suspect", "purified"]
    assert same_weights(partners["suspect"], suspect) and same_weights(partners["purified"], purified)
    assert not same_weights(suspect, purified)


def test_a_prompt_is_a_message_if_there_is_a_template(byte_tokenizer):
    """Fails if a chat model gets the bare prompt, or if the settings of its users do not apply."""
    partner = Partner("suspect", tiny_llama(), byte_tokenizer)
    with pytest.raises(ValueError, match="is empty"):
        partner.answer("", 4)
    plain = partner.answer("hello", 4)
    assert byte_tokenizer.decode(plain.prompt_ids) == "hello"
    byte_tokenizer.chat_template = "{% for each in messages %}[{{ each.role }}]{{ each.content }}{% endfor %}"
    chat = partner.answer("hello", 4)
    assert byte_tokenizer.decode(chat.prompt_ids) == "[user]hello"
    partner.model.generation_config.suppress_tokens = chat.ids[:1]
    assert partner.answer("hello", 4).ids[0] != chat.ids[0]
