"""Tiny versions of Hugging Face models of any type: their configs are shrunk by the names of their fields."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

#: What a field is set to, if a config has one of that name.
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ["hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "decoder_hidden_size"], 64
    ),
    **dict.fromkeys(["model_dim", "input_hidden_size", "word_embed_proj_dim", "kv_dim", "emb_dim", "backbone_dim"], 64),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"], 96),
    **dict.fromkeys(["ffn_hidden_size", "shared_intermediate_size", "shared_expert_intermediate_size"], 96),
    **dict.fromkeys(["moe_intermediate_size", "expert_intermediate_size", "intermediate_size_mlp"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"], 2),
    **dict.fromkeys(["num_encoder_layers", "num_decoder_layers", "decoder_num_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"], 4),
    **dict.fromkeys(["decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "multi_query_group_num"], 2),
    **dict.fromkeys(["head_dim", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"], 16),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 32),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "n_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts"], 2),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts"], 1),
    **dict.fromkeys(["vocab_size", "text_vocab_size", "vocab_size_per_layer_input"], 199),
    "hidden_size_per_layer_input": 16,
    "rotary_dim": 8,
    **dict.fromkeys(["chunk_size", "mamba_chunk_size"], 8),
    "image_size": 32,
    "patch_size": 8,
    # The dropout of residual branches, which fuse joins to their sums; measure.py turns it off before it compares.
    **dict.fromkeys(["hidden_dropout_prob", "dropout", "resid_pdrop", "hidden_dropout", "drop_path_rate"], 0.1),
    **dict.fromkeys(["dropout_rate", "residual_dropout", "resid_dropout"], 0.1),
    **dict.fromkeys(["attention_dropout", "attention_probs_dropout_prob", "embd_pdrop", "attn_pdrop"], 0.0),
    **dict.fromkeys(["activation_dropout", "classifier_dropout", "layerdrop", "embedding_dropout"], 0.0),
    **dict.fromkeys(["encoder_layerdrop", "decoder_layerdrop", "embeddings_dropout", "emb_dropout"], 0.0),
    **dict.fromkeys(["attn_dropout", "mlp_dropout", "classifier_dropout_prob"], 0.0),
    **dict.fromkeys(["pad_token_id", "bos_token_id"], 1),
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "use_cache": False,
}

#: Where the sizes above do not fit together, or a list of sizes is the model's shape.
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
}

FAMILIES = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The default config of ``model_type``, with every field of a known name made small."""
    cls = type(AutoConfig.for_model(model_type))
    return _build(cls, SPECIAL.get(model_type, {}))


def _build(cls: type[PreTrainedConfig], special: dict[str, Any]) -> PreTrainedConfig:
    fields = {name: field.default for name, field in inspect.signature(cls.__init__).parameters.items()}
    fields |= {alias: fields.get(name) for alias, name in cls.attribute_map.items() if name not in SIZES}
    # A list in the place of a number is a shape that no single number stands for.
    values = {name: value for name, value in SIZES.items() if not isinstance(fields.get(name, ()), (list, tuple))}
    for name, part in cls.sub_configs.items():
        if part is not AutoConfig and issubclass(part, PreTrainedConfig):
            values[name] = _build(part, {}).to_dict()
    if "qk_rope_head_dim" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]  # multi-head latent attention has no groups
    values |= special
    return cls(**values)
