"""Google's .npz files: google-research/vision_transformer ("augreg") and big_vision."""

import re

from torch import Tensor

from vitrail.errors import WeightsError
from vitrail.utils.text import join_names
from vitrail.weights.formats.keymap import Format, Rules, join_qkv, without_pre_logits
from vitrail.weights.tensors import Tensors

_NPZ = r"(?:opt/target/|params/(?:img/)?)?"
_RULES: Rules = {
    rf"{_NPZ}embedding/kernel": "patch_embed.proj.weight",
    rf"{_NPZ}embedding/bias": "patch_embed.proj.bias",
    rf"{_NPZ}cls": "cls_token",
    rf"{_NPZ}(?:Transformer/posembed_input/)?pos_embedding": "pos_embed",
    rf"{_NPZ}(?:conv_root|gn_root|block\d+)/.+": r"\g<0>",  # a hybrid with a ResNet: rejected below
}
for _jax, _ours in (
    (r"Transformer/encoder_norm", "norm"),
    (r"pre_logits", "pre_logits"),
    (r"head", "head"),
    (r"Transformer/encoderblock_(\d+)/LayerNorm_0", r"blocks.\1.norm1"),
    (r"Transformer/encoderblock_(\d+)/LayerNorm_[12]", r"blocks.\1.norm2"),  # LayerNorm_1 in big_vision
    (r"Transformer/encoderblock_(\d+)/MlpBlock_[03]/Dense_0", r"blocks.\1.mlp.fc1"),
    (r"Transformer/encoderblock_(\d+)/MlpBlock_[03]/Dense_1", r"blocks.\1.mlp.fc2"),
    (r"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_[01]/query", r"blocks.\1.attn.q"),
    (r"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_[01]/key", r"blocks.\1.attn.k"),
    (r"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_[01]/value", r"blocks.\1.attn.v"),
    (r"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_[01]/out", r"blocks.\1.attn.proj"),
):
    _RULES |= {rf"{_NPZ}{_jax}/(?:kernel|scale)": f"{_ours}.weight", rf"{_NPZ}{_jax}/bias": f"{_ours}.bias"}


def _transpose_all(tensors: Tensors) -> Tensors:
    """Move the outputs of kernels first. Raises WeightsError for a hybrid of ResNet and ViT."""
    if hybrid := [name for name in tensors if re.match(rf"{_NPZ}(conv_root|block\d+)/", name)]:
        raise WeightsError(
            f"a hybrid of ResNet and ViT is not supported ({join_names(hybrid, 2)}): use weights of a plain ViT"
        )
    for name, tensor in tensors.items():
        tensors[name] = _transpose(name, tensor)
    return tensors


def _transpose(name: str, tensor: Tensor) -> Tensor:
    """Outputs first, heads merged into one dimension. Other shapes are left for strict loading to report."""
    attention = re.search(r"\.attn\.(q|k|v|proj)\.(weight|bias)$", name)
    match (attention.group(1, 2) if attention else (None, None)), tensor.ndim:
        case (("q" | "k" | "v"), "weight"), 3:  # C H D
            return tensor.flatten(1).T
        case (("q" | "k" | "v"), "bias"), 2:  # H D
            return tensor.flatten()
        case ("proj", "weight"), 3:  # H D C
            return tensor.flatten(0, 1).T
        case (None, _), 4 if name.endswith("proj.weight"):  # P P I C
            return tensor.permute(3, 2, 0, 1)
        case (None, _), 2 if name.endswith(".weight"):
            return tensor.T
    return tensor


VIT = Format("Google ViT", _RULES, conversions=(_transpose_all, join_qkv, without_pre_logits))
