"""torchvision's names (0.28, and those of its older files). Its ResNet has timm's names (`timm.py`)."""

from vitrail.weights.formats.keymap import PARAM, WHY_BUFFER, Format, Rules, without_pre_logits
from vitrail.weights.tensors import Tensors

_TV_BLOCK = r"encoder\.layers\.encoder_layer_(\d+)\."
_VIT: Rules = {
    r"class_token": "cls_token",
    r"encoder\.pos_embedding": "pos_embed",
    rf"conv_proj{PARAM}": r"patch_embed.proj.\1",
    rf"{_TV_BLOCK}ln_([12]){PARAM}": r"blocks.\1.norm\2.\3",
    rf"{_TV_BLOCK}self_attention\.in_proj_(weight|bias)": r"blocks.\1.attn.qkv.\2",
    rf"{_TV_BLOCK}self_attention\.out_proj{PARAM}": r"blocks.\1.attn.proj.\2",
    rf"{_TV_BLOCK}mlp\.(?:0|linear_1){PARAM}": r"blocks.\1.mlp.fc1.\2",  # linear_1: files from before 0.12
    rf"{_TV_BLOCK}mlp\.(?:3|linear_2){PARAM}": r"blocks.\1.mlp.fc2.\2",
    rf"encoder\.ln{PARAM}": r"norm.\1",
    rf"heads\.head{PARAM}": r"head.\1",
    rf"heads\.pre_logits{PARAM}": r"pre_logits.\1",
}
_SWIN: Rules = {
    rf"features\.0\.0{PARAM}": r"patch_embed.proj.\1",
    rf"features\.0\.2{PARAM}": r"patch_embed.norm.\1",
    rf"norm{PARAM}": r"norm.\1",
    rf"head{PARAM}": r"head.fc.\1",
}
_CONVNEXT: Rules = {
    rf"features\.0\.([01]){PARAM}": r"stem.\1.\2",
    rf"classifier\.0{PARAM}": r"head.norm.\1",
    rf"classifier\.2{PARAM}": r"head.fc.\1",
}
for _stage in range(4):  # stages and the downsampling between them: features.1 to features.7
    _block, _downsample = rf"features\.{2 * _stage + 1}\.(\d+)\.", rf"features\.{2 * _stage}\."
    _SWIN |= {
        rf"{_block}(norm1|norm2|attn\.qkv|attn\.proj){PARAM}": rf"layers.{_stage}.blocks.\1.\2.\3",
        rf"{_block}mlp\.0{PARAM}": rf"layers.{_stage}.blocks.\1.mlp.fc1.\2",
        rf"{_block}mlp\.3{PARAM}": rf"layers.{_stage}.blocks.\1.mlp.fc2.\2",
        rf"{_block}attn\.relative_position_bias_table": rf"layers.{_stage}.blocks.\1.attn.relative_position_bias_table",
        rf"{_block}attn\.relative_position_index": None,
    }
    _CONVNEXT |= {
        rf"{_block}layer_scale": rf"stages.{_stage}.blocks.\1.gamma",
        rf"{_block}block\.0{PARAM}": rf"stages.{_stage}.blocks.\1.conv_dw.\2",
        rf"{_block}block\.2{PARAM}": rf"stages.{_stage}.blocks.\1.norm.\2",
        rf"{_block}block\.3{PARAM}": rf"stages.{_stage}.blocks.\1.mlp.fc1.\2",
        rf"{_block}block\.5{PARAM}": rf"stages.{_stage}.blocks.\1.mlp.fc2.\2",
    }
    if _stage:
        _SWIN[rf"{_downsample}(norm|reduction){PARAM}"] = rf"layers.{_stage}.downsample.\1.\2"
        _CONVNEXT[rf"{_downsample}([01]){PARAM}"] = rf"stages.{_stage}.downsample.\1.\2"


def _flatten_layer_scale(tensors: Tensors) -> Tensors:
    """C 1 1 to C."""
    for name, tensor in tensors.items():
        if name.endswith(".gamma") and tensor.shape[1:] == (1, 1):
            tensors[name] = tensor.flatten()
    return tensors


VIT = Format("torchvision ViT", _VIT, conversions=(without_pre_logits,))
SWIN = Format("torchvision Swin", _SWIN, WHY_BUFFER)
CONVNEXT = Format("torchvision ConvNeXt", _CONVNEXT, conversions=(_flatten_layer_scale,))
