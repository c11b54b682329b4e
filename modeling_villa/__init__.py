"""ViLLA: fine-grained vision-language learning from image-text data without region labels.

Importing this package registers its configurations, models and processor with the Auto classes.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

from .configuration_villa import VillaClipConfig, VillaMappingConfig, VillaVisionConfig
from .modeling_villa_clip import VillaClipModel
from .modeling_villa_mapping import VillaMappingModel
from .processing_villa import VillaImageProcessor, VillaProcessor
from .vision_villa import VillaVisionModel

for _config, _model in (
    (VillaVisionConfig, VillaVisionModel),
    (VillaClipConfig, VillaClipModel),
    (VillaMappingConfig, VillaMappingModel),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoProcessor.register(_config, VillaProcessor, exist_ok=True)
    AutoImageProcessor.register(_config, image_processor_classes={"torchvision": VillaImageProcessor}, exist_ok=True)

__all__ = [
    "VillaClipConfig",
    "VillaClipModel",
    "VillaImageProcessor",
    "VillaMappingConfig",
    "VillaMappingModel",
    "VillaProcessor",
    "VillaVisionConfig",
    "VillaVisionModel",
]
