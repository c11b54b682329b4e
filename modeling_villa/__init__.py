"""ViLLA: fine-grained vision-language learning from image-text data without region labels.

Importing this package registers its configurations, models and processor with the Auto classes, and its pipelines.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_villa import VillaClipConfig, VillaMappingConfig, VillaTextConfig, VillaVisionConfig
from .modeling_villa_clip import VillaClipModel
from .modeling_villa_mapping import VillaMappingModel
from .pipeline_villa import RegionAttributeMappingPipeline, VillaZeroShotObjectDetectionPipeline
from .processing_villa import VillaImageProcessor, VillaProcessor
from .text_villa import VillaTextModel
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
AutoConfig.register(VillaTextConfig.model_type, VillaTextConfig, exist_ok=True)
AutoModel.register(VillaTextConfig, VillaTextModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(VillaClipConfig, VillaClipModel, exist_ok=True)
AutoModelForZeroShotObjectDetection.register(VillaClipConfig, VillaClipModel, exist_ok=True)

PIPELINE_REGISTRY.register_pipeline(
    "region-attribute-mapping", RegionAttributeMappingPipeline, pt_model=AutoModel, type="multimodal"
)
# For models that are not ours it makes transformers' own pipeline. (register_pipeline would warn of the replacement.)
PIPELINE_REGISTRY.supported_tasks["zero-shot-object-detection"]["impl"] = VillaZeroShotObjectDetectionPipeline

__all__ = [
    "RegionAttributeMappingPipeline",
    "VillaClipConfig",
    "VillaClipModel",
    "VillaImageProcessor",
    "VillaMappingConfig",
    "VillaMappingModel",
    "VillaProcessor",
    "VillaTextConfig",
    "VillaTextModel",
    "VillaVisionConfig",
    "VillaVisionModel",
    "VillaZeroShotObjectDetectionPipeline",
]
