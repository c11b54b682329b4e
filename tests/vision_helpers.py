"""Small image towers, and what makes them less regular than a new one."""

import torch

from modeling_villa import VillaVisionConfig, VillaVisionModel

# CLIP's ResNet-50 under its real name, an eighth as wide.
SMALL_CLIP = {"width_factor": 0.125, "stem_chs": 64, "stem_type": "deep"}
SMALL_RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 32]}
BACKBONES = [
    ("resnet18", {}),
    ("resnet50_clip", SMALL_CLIP),
    ("convnext_atto", {}),
    ("regnetx_002", {}),
    ("efficientnet_b0", {}),
    ("resnetv2_50", {"layers": [1, 1, 1, 1]}),
]


def tiny(**changes):
    settings = {"backbone": "resnet18", "backbone_kwargs": SMALL_RESNET, "roi_size": 4, "projection_dim": 12}
    return VillaVisionModel(VillaVisionConfig(**{**settings, "image_size": 64, **changes})).eval()


def run(backbone, steps, x):
    for step in steps:
        x = backbone.get_submodule(step)(x)
    return x


def shake_batchnorm(model):
    """Statistics and gains as after training: an untrained BatchNorm in eval mode hides mistakes."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
