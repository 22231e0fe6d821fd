"""Tiny depth models of transformers with random weights, and their image processors."""

import json

import torch
from transformers import (
    BeitConfig,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    DepthProConfig,
    DepthProForDepthEstimation,
    DepthProImageProcessor,
    Dinov2Config,
    DPTImageProcessor,
    GLPNConfig,
    GLPNForDepthEstimation,
    GLPNImageProcessor,
    ZoeDepthConfig,
    ZoeDepthForDepthEstimation,
    ZoeDepthImageProcessor,
)

VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}


def glpn(folder, **options):
    config = GLPNConfig(depths=[1] * 4, hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2],
                        decoder_hidden_size=8, mlp_ratios=[2] * 4, **options)  # fmt: skip
    torch.manual_seed(0)
    model = GLPNForDepthEstimation(config)
    stretch(model.head, 10)
    save(folder, model, GLPNImageProcessor())
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A tiny GLPN\n")


def depth_anything(folder, kind="metric"):
    backbone = Dinov2Config(image_size=28, patch_size=14, out_features=["stage2", "stage4"], **VIT,
                            reshape_hidden_states=False)  # fmt: skip
    config = DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=16, reassemble_factors=[2, 1],
                                 head_hidden_size=8, neck_hidden_sizes=[8, 8], fusion_hidden_size=8,
                                 depth_estimation_type=kind, max_depth=20)  # fmt: skip
    torch.manual_seed(0)
    model = DepthAnythingForDepthEstimation(config)
    stretch(model.neck, 12)
    stretch(model.head, 20)
    size = {"height": 56, "width": 56}
    save(folder, model, DPTImageProcessor(size=size, keep_aspect_ratio=True, ensure_multiple_of=14))


def zoedepth(folder):
    backbone = BeitConfig(image_size=32, out_features=[f"stage{k}" for k in range(1, 5)], **VIT,
                          reshape_hidden_states=False, use_relative_position_bias=True)  # fmt: skip
    bins = [{"name": "nyu", "n_bins": 8, "min_depth": 1e-3, "max_depth": 10.0}]
    config = ZoeDepthConfig(backbone_config=backbone, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8,
                            num_relative_features=4, bottleneck_features=8, bin_embedding_dim=8,
                            num_attractors=[4, 2, 2, 1], bin_configurations=bins)  # fmt: skip
    torch.manual_seed(0)
    model = ZoeDepthForDepthEstimation(config)
    stretch(model, 8)
    save(folder, model, ZoeDepthImageProcessor(size={"height": 32, "width": 48}, ensure_multiple_of=16))


def depth_pro(folder):
    vit = {"model_type": "dinov2", "image_size": 16, "patch_size": 8} | VIT
    towers = {f"{part}_model_config": vit for part in ("image", "patch", "fov")}
    config = DepthProConfig(patch_size=16, fusion_hidden_size=16, num_fov_head_layers=0, use_fov_model=True, **towers,
                            intermediate_hook_ids=[3, 1], intermediate_feature_dims=[16, 16],
                            scaled_images_ratios=[0.5, 1.0], scaled_images_overlap_ratios=[0.0, 0.2],
                            scaled_images_feature_dims=[16, 16], merge_padding_value=1)  # fmt: skip
    torch.manual_seed(0)
    model = DepthProForDepthEstimation(config)
    with torch.no_grad():  # inverse depth of some metres, and a field of view of some 60 degrees
        model.head.layers[-2].weight.mul_(0.002)
        model.head.layers[-2].bias.add_(0.3)
        model.fov_model.head.layers[-1].bias.add_(60)
    save(folder, model, DepthProImageProcessor(size={"height": 32, "width": 32}))


def stretch(module, factor):
    """Enlarge the weights, so that the output differs from place to place."""
    with torch.no_grad():
        for value in module.parameters():
            if value.ndim > 1:
                value.mul_(factor)


def save(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def config_only(folder, **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))


MODELS = {"glpn": glpn, "depth_anything": depth_anything, "zoedepth": zoedepth, "depth_pro": depth_pro}
