"""Names of timm, and those of the authors of DeiT, DINO, DINOv2, Swin and ConvNeXt.

Taken from timm 1.0.31, facebookresearch/deit, dino, dinov2 and ConvNeXt, microsoft/Swin-Transformer.
"""

from vitrail.weights.formats.keymap import BUFFERS, PARAM, WHY_BUFFER, Format, shift_merging, without_pre_logits

# VisionTransformer and VisionTransformerDistilled; the DeiT and DINO authors' files are the same.
VIT = Format(
    "timm ViT",
    {
        rf"patch_embed\.(proj|convs\.\d+){BUFFERS}": r"patch_embed.\1.\2",
        r"(cls_token|dist_token|reg_token|pos_embed)": r"\1",
        rf"(blocks\.\d+)\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2){PARAM}": r"\1.\2.\3",
        r"(blocks\.\d+)\.(ls[12])\.gamma": r"\1.\2.gamma",
        rf"(norm|fc_norm|head|head_dist){PARAM}": r"\1.\2",
        rf"pre_logits(\.fc)?{PARAM}": r"pre_logits.\2",
    },
    conversions=(without_pre_logits,),
)
AUTHORS_VIT = Format(
    "authors' ViT",
    {
        r"(blocks\.\d+)\.gamma_([12])": r"\1.ls\2.gamma",  # DeiT III
        r"register_tokens": "reg_token",  # DINOv2
        r"mask_token": None,
        # blocks in chunks, as in DINOv2's training code
        rf"blocks\.\d+\.(\d+)\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2){PARAM}": r"blocks.\1.\2.\3",
        r"blocks\.\d+\.(\d+)\.(ls[12])\.gamma": r"blocks.\1.\2.gamma",
        **VIT.rules,
    },
    "a token for masked image modeling",
)
_SWIN_BLOCK = r"(layers\.\d+\.blocks\.\d+)\."
SWIN = Format(
    "timm Swin",
    {
        rf"patch_embed\.(proj|norm){PARAM}": r"patch_embed.\1.\2",
        rf"{_SWIN_BLOCK}(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2){PARAM}": r"\1.\2.\3",
        rf"{_SWIN_BLOCK}attn\.relative_position_bias_table": r"\1.attn.relative_position_bias_table",
        rf"(layers\.[1-9]\d*\.downsample\.(?:norm|reduction)){PARAM}": r"\1.\2",
        rf"norm{PARAM}": r"norm.\1",
        rf"head\.fc{PARAM}": r"head.fc.\1",
        rf"{_SWIN_BLOCK}(attn\.relative_position_index|attn_mask)": None,
    },
    WHY_BUFFER,
)
AUTHORS_SWIN = Format(
    "authors' Swin",
    {
        rf"layers\.(\d+)\.downsample\.(norm|reduction){PARAM}": r"layers.\1.downsample.\2.\3",
        rf"head{PARAM}": r"head.fc.\1",
        **{
            pattern: new for pattern, new in SWIN.rules.items() if "head" not in pattern and "downsample" not in pattern
        },
    },
    WHY_BUFFER,
    (shift_merging,),
)
# timm's and torchvision's.
RESNET = Format(
    "ResNet",
    {
        r"conv1\.weight": "conv1.weight",
        rf"bn1{BUFFERS}": r"bn1.\1",
        r"(layer[1-4]\.\d+\.conv[123])\.weight": r"\1.weight",
        rf"(layer[1-4]\.\d+\.bn[123]){BUFFERS}": r"\1.\2",
        rf"(layer[1-4]\.\d+\.downsample\.[01]){BUFFERS}": r"\1.\2",
        rf"fc{PARAM}": r"fc.\1",
    },
)
CONVNEXT = Format(
    "timm ConvNeXt",
    {
        rf"stem\.([01]){PARAM}": r"stem.\1.\2",
        r"(stages\.\d+\.blocks\.\d+\.gamma)": r"\1",
        rf"(stages\.\d+\.blocks\.\d+\.(?:conv_dw|norm|mlp\.fc[12])){PARAM}": r"\1.\2",
        rf"(stages\.\d+\.downsample\.[01]){PARAM}": r"\1.\2",
        rf"(head\.(?:norm|fc)){PARAM}": r"\1.\2",
    },
)
AUTHORS_CONVNEXT = Format(
    "authors' ConvNeXt",
    {
        rf"downsample_layers\.0\.([01]){PARAM}": r"stem.\1.\2",
        rf"downsample_layers\.([1-9])\.([01]){PARAM}": r"stages.\1.downsample.\2.\3",
        r"stages\.(\d+)\.(\d+)\.gamma": r"stages.\1.blocks.\2.gamma",
        rf"stages\.(\d+)\.(\d+)\.dwconv{PARAM}": r"stages.\1.blocks.\2.conv_dw.\3",
        rf"stages\.(\d+)\.(\d+)\.norm{PARAM}": r"stages.\1.blocks.\2.norm.\3",
        rf"stages\.(\d+)\.(\d+)\.pwconv([12]){PARAM}": r"stages.\1.blocks.\2.mlp.fc\3.\4",
        rf"norm{PARAM}": r"head.norm.\1",
        rf"head{PARAM}": r"head.fc.\1",
    },
)
