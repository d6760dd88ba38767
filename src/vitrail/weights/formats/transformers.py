"""Names of transformers: those of its files, and those of its modules since version 5 (taken from 5.23)."""

import re

from vitrail.weights.formats.keymap import PARAM, WHY_BUFFER, Format, Rules, drop_head, join_qkv, shift_merging
from vitrail.weights.tensors import Tensors

_HF_TOP = r"(?:vit\.|deit\.|dinov2\.|dinov2_with_registers\.)?"
_HF_LAYER = rf"{_HF_TOP}(?:encoder\.layer|layers|encoder\.layers)\.(\d+)\."
_HF_EMBEDDINGS = rf"{_HF_TOP}embeddings\."
_WHY_POOLER = "transformers' pooler or mask token, which does not affect the logits"


def _hf_attention(layer: str, here: str, inner: str) -> Rules:
    """Query, key, value and output projection of one layer; `inner`: module in the old names."""
    last = re.compile(layer).groups + 1
    rules: Rules = {
        rf"{layer}attention\.(?:{inner}\.{name}|{name[0]}_proj){PARAM}": rf"{here}.attn.{name[0]}.\g<{last}>"
        for name in ("query", "key", "value")
    }
    return {**rules, rf"{layer}attention\.(?:output\.dense|o_proj){PARAM}": rf"{here}.attn.proj.\g<{last}>"}


def _hf_mlp(layer: str, here: str) -> Rules:
    last = re.compile(layer).groups + 1
    return {
        rf"{layer}(?:intermediate\.dense|mlp\.fc1){PARAM}": rf"{here}.mlp.fc1.\g<{last}>",
        rf"{layer}(?:output\.dense|mlp\.fc2){PARAM}": rf"{here}.mlp.fc2.\g<{last}>",
        rf"{layer}layernorm_before{PARAM}": rf"{here}.norm1.\g<{last}>",
        rf"{layer}layernorm_after{PARAM}": rf"{here}.norm2.\g<{last}>",
    }


_HF_VIT_COMMON: Rules = {
    rf"{_HF_EMBEDDINGS}cls_token": "cls_token",
    rf"{_HF_EMBEDDINGS}position_embeddings": "pos_embed",
    rf"{_HF_EMBEDDINGS}mask_token": None,
    rf"{_HF_EMBEDDINGS}patch_embeddings\.projection{PARAM}": r"patch_embed.proj.\1",
    **_hf_attention(_HF_LAYER, r"blocks.\1", "attention"),
    rf"{_HF_TOP}layernorm{PARAM}": r"norm.\1",
    rf"{_HF_TOP}pooler\.dense{PARAM}": None,
}
# ViT, and DeiT with a teacher (two heads) or without (one head, on the class token).
VIT = Format(
    "transformers ViT",
    {
        **_HF_VIT_COMMON,
        **_hf_mlp(_HF_LAYER, r"blocks.\1"),
        rf"{_HF_EMBEDDINGS}distillation_token": "dist_token",
        rf"(?:cls_)?classifier{PARAM}": r"head.\1",
        rf"distillation_classifier{PARAM}": r"head_dist.\1",
    },
    _WHY_POOLER,
    (join_qkv,),
)


def _without_concatenated_head(tensors: Tensors) -> Tensors:
    """Remove the head of `Dinov2ForImageClassification`."""
    head, token = tensors.get("head.weight"), tensors.get("cls_token")
    if head is not None and token is not None and head.shape[-1:] == (2 * token.shape[-1],):
        why = "its input is the class token and the mean patch token concatenated, which this model does not support"
        drop_head(tensors, why)
    return tensors


# With registers or without.
DINOV2 = Format(
    "transformers DINOv2",
    {
        **_HF_VIT_COMMON,
        rf"{_HF_EMBEDDINGS}register_tokens": "reg_token",
        rf"{_HF_LAYER}(norm1|norm2|mlp\.fc1|mlp\.fc2){PARAM}": r"blocks.\1.\2.\3",
        rf"{_HF_LAYER}layer_scale([12])\.lambda1": r"blocks.\1.ls\2.gamma",
        rf"classifier{PARAM}": r"head.\1",
    },
    _WHY_POOLER,
    (join_qkv, _without_concatenated_head),
)
_HF_SWIN_BLOCK = r"(?:swin\.)?encoder\.layers\.(\d+)\.blocks\.(\d+)\."
SWIN = Format(
    "transformers Swin",
    {
        rf"(?:swin\.)?embeddings\.patch_embeddings\.projection{PARAM}": r"patch_embed.proj.\1",
        rf"(?:swin\.)?embeddings\.norm{PARAM}": r"patch_embed.norm.\1",
        r"(?:swin\.)?embeddings\.mask_token": None,
        **_hf_attention(_HF_SWIN_BLOCK, r"layers.\1.blocks.\2", "self"),
        **_hf_mlp(_HF_SWIN_BLOCK, r"layers.\1.blocks.\2"),
        rf"{_HF_SWIN_BLOCK}attention\.(?:self|relative_position_bias)\.relative_position_bias_table": (
            r"layers.\1.blocks.\2.attn.relative_position_bias_table"
        ),
        rf"{_HF_SWIN_BLOCK}attention\.(?:self|relative_position_bias)\.relative_position_index": None,
        rf"(?:swin\.)?encoder\.layers\.(\d+)\.downsample\.(norm|reduction){PARAM}": r"layers.\1.downsample.\2.\3",
        rf"(?:swin\.)?layernorm{PARAM}": r"norm.\1",
        rf"classifier{PARAM}": r"head.fc.\1",
    },
    WHY_BUFFER,
    (join_qkv, shift_merging),
)
