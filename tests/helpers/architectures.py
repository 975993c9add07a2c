"""A tiny model of every causal LM that the installed transformers registers."""

from transformers import CONFIG_MAPPING, AutoModelForCausalLM, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from helpers.tiny import VOCABULARY


DEPTH = 4
# Values by the names that configs give to them.
SIZES = [
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (
        32,
        "hidden_size n_embd d_model embedding_size embedding_dim word_embed_proj_dim dim embed_dim lru_width "
        "cross_attention_hidden_size hidden_dim attention_hidden_size",
    ),
    (DEPTH, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth num_blocks"),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
        "num_local_experts n_routed_experts moe_num_experts index_n_heads linear_num_value_heads linear_num_heads "
        "mamba_n_heads mamba_num_heads index_topk hidden_size_per_layer_input state_size mamba_d_state ssm_state_size "
        "conv_kernel mamba_d_conv",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads multi_query_group_num num_experts_per_tok moe_topk moe_k moe_top_k "
        "num_experts_per_token top_k_experts linear_num_key_heads mamba_n_groups n_groups mamba_ngroups",
    ),
    (
        8,
        "head_dim dim_head global_head_dim rotary_dim kv_channels v_head_dim qk_nope_head_dim qk_rope_head_dim "
        "swa_head_dim d_kv kv_lora_rank q_lora_rank index_head_dim linear_key_head_dim linear_value_head_dim "
        "linear_head_dim o_lora_rank sliding_window attention_window_size block_size chunk_size mamba_chunk_size "
        "attention_chunk_size qk_head_dim",
    ),
    (
        48,
        "intermediate_size ffn_dim n_inner d_ff dff dim_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim "
        "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
        "expert_ffn_hidden_size shared_experts_intermediate_size",
    ),
    (
        1,
        "bos_token_id eos_token_id n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace "
        "moe_num_shared_experts decoder_sparse_step moe_layer_start_index num_expert_group",
    ),
    (64, "max_position_embeddings n_positions n_ctx max_seq_len"),
    (16, "mamba_d_head mamba_head_dim time_step_rank mamba_dt_rank"),
    (
        0.0,
        "dropout attention_dropout embd_pdrop attn_pdrop resid_pdrop hidden_dropout activation_dropout "
        "hidden_dropout_prob attention_probs_dropout_prob resid_dropout emb_pdrop classifier_dropout",
    ),
    (0, "pad_token_id"),
    (0.2, "initializer_range init_std"),
]
TINY = {name: value for value, names in SIZES for name in names.split()}

ALL_HEADS = {"num_key_value_heads": 4}
ALTERNATING = {"layers_block_type": ["linear_attention", "hybrid"] * 2}
ZAMBA = ALTERNATING | ALL_HEADS | {"attention_hidden_size": 64, "attention_head_dim": 16, "use_mamba_kernels": False}
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2}
# What the names alone do not say. A value of None leaves a field to the config.
OTHERS = {
    **dict.fromkeys(
        ["axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu"], ALL_HEADS
    ),
    **dict.fromkeys(
        ["hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "nemotron"], {"head_dim": 8, "num_key_value_heads": 2}
    ),
    "bailing_hybrid": ALL_HEADS | SPARSE | {"qk_head_dim": 16},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v2": ALL_HEADS | SPARSE,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "dots3_note_text": ALL_HEADS | {"head_dim": 16, "index_head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 64, "ssm_multipliers": [1.0] * 5, "mlp_multipliers": [1.0, 1.0]},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"num_layers_per_stack": 4, "H_cycles": 1, "L_cycles": 1, "L_bp_cycles": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "layers_block_type": None},
    "kimi_linear": ALL_HEADS,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": ALL_HEADS | {"qk_head_dim": 16, "num_hidden_layers": None},
    "mamba2": {"num_heads": 8},
    "prophetnet": {"num_decoder_layers": 4, "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4},
    "qwen4_exp_text": SPARSE
    | {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 4,
        "ple_embed_dim": 16,
        "ngram_vocab_size_base": 50,
        "split_ngram_parts": 2,
        "heads_per_ngram": 2,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"] * 2,
    },
    "xlnet": {"d_head": 8},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "ffn_round_up_to_multiple_of": 8, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": ZAMBA,
    "zamba2": ZAMBA | {"mamba_headdim": 16, "n_mamba_heads": 4, "hybrid_layer_ids": [1, 3], "num_query_groups": 4},
    "zaya": {"num_experts_per_tok": 1},
}
# They have other inputs than text, or are parts of another model.
NOT_OF_TEXT = {
    "blt",  # see `helpers.blt`
    "dots3_note",
    "gemma3n",
    "gemma4_assistant",
    "gemma4_unified_assistant",
    "musicgen",
    "musicgen_melody",
    "qwen4_exp",
}
ARCHITECTURES = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NOT_OF_TEXT]


def tiny_architecture(model_type, **changes):
    """A model of four layers of the given type, in evaluation mode."""
    config_class = CONFIG_MAPPING[model_type]
    fields = _shrunk(config_class().to_dict()) | OTHERS.get(model_type, {}) | changes
    for name in ("architectures", "model_type", "transformers_version", "_name_or_path"):
        fields.pop(name, None)
    set_seed(0)
    config = config_class(**{name: value for name, value in fields.items() if value is not None})
    return AutoModelForCausalLM.from_config(config).eval()


def _shrunk(fields):
    return {name: _shrunk_value(name, value) for name, value in fields.items() if name != "per_layer_config"}


def _shrunk_value(name, value):
    if name in TINY and value and not isinstance(value, dict):
        return [TINY[name]] * DEPTH if isinstance(value, list) and not name.endswith("token_id") else TINY[name]
    if name in ("vision_config", "audio_config") and value:
        # A tower of another depth than the decoder's.
        return _shrunk(value) | {
            key: 2 for key in ("num_hidden_layers", "num_layers", "depth", "num_blocks") if key in value
        }
    if isinstance(value, dict) and not name.startswith("rope_"):
        return _shrunk(value)
    if isinstance(value, list) and len(value) > DEPTH:
        # Every kind of layer, once or several times.
        kinds = list({str(each): each for each in value}.values())
        return (kinds[:DEPTH] * DEPTH)[:DEPTH]
    return value
