"""Tests of `crow-hf merge`."""

from peft import LoraConfig, get_peft_model
from transformers import ByT5Tokenizer

from crow_hf.cli.main import main
from crow_hf.training.loading import load_causal_lm
from helpers.tiny import same_weights, tiny_llama, weights_of


def test_an_adapter_becomes_a_whole_model(tmp_path, capsys):
    """Fails if another model is written, or if an output folder that is in use is overwritten."""
    tiny_llama().save_pretrained(tmp_path / "base")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "base")
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    adapter = get_peft_model(load_causal_lm(tmp_path / "base"), lora)
    adapter.save_pretrained(tmp_path / "adapter")
    command = ["merge", "--model", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]
    assert main(command) == 0 and "merged model is in" in capsys.readouterr().out
    merged = load_causal_lm(tmp_path / "merged")
    assert same_weights(weights_of(merged), weights_of(adapter.merge_and_unload()))
    assert main(command) == 1 and "is not empty" in capsys.readouterr().err
