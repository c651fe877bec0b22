"""Models of transformers at tiny sizes, with random weights, from their default configurations."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

SIZES = [
    (r"(.*_)?(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|num_encoder_layers|depth)", 2),
    (r"(num_decoder_layers|decoder_num_layers|encoder_num_layers|num_blocks_per_stage|n_enc_layer|n_dec_layer)", 2),
    (r"(.*_)?(hidden_size|d_model|n_embd|embedding_size|emb_dim|model_dim|dim|embed_dim|width|n_embed)", 32),
    (r"(.*_)?(hidden_dim|projection_dim|text_embed_dim|word_embed_proj_dim|embd_size|ngram_embed|d_embed)", 32),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|n_inner|d_inner|feed_forward_size|inner_dim|ffn_hidden_size)", 64),
    (r"(.*_)?(num_attention_heads|num_heads|n_heads?|encoder_attention_heads|decoder_attention_heads)", 4),
    (r"(.*_)?(num_key_value_heads|n_kv_heads?|num_kv_heads|multi_query_group_num)", 2),
    (r"(.*_)?(head_dim|d_kv|d_head|attention_head_size|kv_channels|v_head_dim)", 8),
    (r"vocab_size", 99),
    (r"(.*_)?(num_experts|num_local_experts|n_routed_experts|moe_num_experts)", 4),
    (r"(.*_)?(num_experts_per_tok|moe_topk|top_k_experts|num_selected_experts)", 2),
    (r"(moe_intermediate_size|expert_ffn_hidden_size|shared_expert_intermediate_size)", 32),
    (r"(q_lora_rank|kv_lora_rank)", 16),
    (r"(qk_nope_head_dim|qk_rope_head_dim)", 8),
    (r"(max_position_embeddings|n_positions|max_target_positions|max_seq_len|max_source_positions)", 128),
    (r"(sliding_window|attention_window)", 8),
    (r"image_size", 48),
]
"""Names of sizes in configurations, and small ones for them."""


FILLED = {
    "head_dim": 8,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "axial_pos_embds_dim": (16, 16),
    "axial_pos_shape": (8, 8),
    "prediction_length": 8,
    "pad_token_id": 0,
}
"""What some configurations leave open, or must have with these sizes."""


def shrink(config: Any, depth: int = 0, fill: bool = False) -> Any:
    """The configuration with small sizes where its names are known, and those within it."""
    for name in FILLED if fill else ():
        if name in vars(config) and (getattr(config, name) is None or isinstance(getattr(config, name), (tuple, list))):
            with contextlib.suppress(Exception):
                setattr(config, name, FILLED[name])
    for name in sorted(set(vars(config)) | set(getattr(config, "attribute_map", {}))):
        value = vars(config).get(name)
        if type(value).__name__.endswith("Config") and depth < 3:
            shrink(value, depth + 1, fill)
            continue
        if isinstance(value, float) and "drop" in name:
            with contextlib.suppress(Exception):
                setattr(config, name, 0.0)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        small = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
        if small is not None and value > small:
            with contextlib.suppress(Exception):
                setattr(config, name, small)
    for name in ("layer_types", "mlp_layer_types"):
        types = getattr(config, name, None)
        if isinstance(types, list):
            layers = getattr(config, "num_hidden_layers", 2)
            with contextlib.suppress(Exception):
                setattr(config, name, [*types[: layers - 1], types[-1]])
    for name in (
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "decoder_start_token_id",
        "sep_token_id",
        "cls_token_id",
    ):
        value = getattr(config, name, None)
        if isinstance(value, (int, list)) and not isinstance(value, bool) and (isinstance(value, list) or value > 90):
            with contextlib.suppress(Exception):
                setattr(config, name, 1 if name != "eos_token_id" else 2)
    return config


def names_of_models() -> list[tuple[str, str]]:
    """(model type, class) of every model that may take text: the bare one, else one with a head."""
    from transformers.models.auto import modeling_auto as auto

    found: dict[str, str] = {}
    for mapping in (
        auto.MODEL_MAPPING_NAMES,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ):
        for kind, name in mapping.items():
            found.setdefault(kind, name[0] if isinstance(name, (tuple, list)) else name)
    return sorted(found.items())


def build(name: str) -> nn.Module:
    """A tiny model of the class ``name``, in evaluation mode."""
    import transformers

    cls = getattr(transformers, name)
    torch.manual_seed(0)
    try:
        model: nn.Module = cls(shrink(cls.config_class()))
    except (TypeError, ValueError, AttributeError):
        model = cls(shrink(cls.config_class(), fill=True))
    return model.float().eval()


def takes_text(model: nn.Module) -> bool:
    return "input_ids" in inspect.signature(model.forward).parameters


def blocks(model: nn.Module) -> list[str]:
    """The modules in lists of several of one class that are not inside another such list."""
    found: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(outer + ".") for outer in found):
            continue
        nested = isinstance(module, nn.ModuleList) and any(isinstance(child, nn.ModuleList) for child in module)
        if isinstance(module, nn.ModuleList) and not nested and len({type(child) for child in module}) == 1:
            found.append(name)
    return [f"{name}.{key}" for name in found for key, _ in model.get_submodule(name).named_children()]


def every(step: int, offset: int = 0) -> Iterator[tuple[str, str]]:
    yield from names_of_models()[offset::step]
