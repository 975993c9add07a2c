"""GGUF files of tiny Llamas, written by the package of llama.cpp."""

import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode


gguf = pytest.importorskip("gguf")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def write_gguf(file, model, quantized=False, template=TEMPLATE, **metadata):
    """
    Write a Llama as llama.cpp's converter does, with a tokenizer of 256 bytes and an end token.

    `quantized` matrices become blocks of 8 bits. Their rows must consist of whole blocks of 32. `metadata` are more
    integers, texts and lists by name, with `__` for each dot, and `extra` is the name of a tensor that no Llama has.
    """
    config, extra = model.config, metadata.pop("extra", None)
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if "llama__block_count" not in metadata:
        writer.add_block_count(config.num_hidden_layers)
    tokens = [*bytes_to_unicode().values(), "ab", "<end>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_pad_token_id(len(tokens) - 1)
    writer.add_chat_template(template)
    for name, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_array if isinstance(value, list) else None
        (add or writer.add_uint32)(name.replace("__", "."), value)
    for name, tensor in model.state_dict().items():
        layer, values = name.removesuffix(".weight"), tensor.float().numpy()
        if layer.startswith("model.layers."):
            _, _, number, layer = layer.split(".", 3)
        if layer in ("self_attn.q_proj", "self_attn.k_proj"):
            # llama.cpp turns neighbouring pairs, and transformers the halves of a head.
            rows, columns = values.shape
            values = values.reshape(-1, 2, config.head_dim // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        place = f"blk.{number}.{NAMES[layer]}" if name.startswith("model.layers.") else NAMES[layer]
        kind = gguf.GGMLQuantizationType.Q8_0 if quantized and values.ndim == 2 else None
        values = values if kind is None else gguf.quants.quantize(values, kind)
        writer.add_tensor(f"{place}.weight", values, raw_dtype=kind)
    if extra is not None:
        writer.add_tensor(extra, model.model.norm.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
