"""The smallest models that the tests build: both towers, in one place."""

VISION = {
    "backbone": "resnet18",
    "backbone_kwargs": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 32]},
    "roi_size": 4,
    "projection_dim": 32,
    "image_size": 32,
}
# CLIP's text tower pools in another way where the end token is 2.
TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 3,
    "pad_token_id": 1,
}
VLM = {"vision_config": VISION, "text_config": TEXT}
