"""The settings that several of the compared methods share, with the sizes of the published tables."""

from .families import FAMILIES
from .registry import Setting

NUM_PROMPTS = Setting("num_prompts", 200, "Learnable prompts; 200 in the paper's tables.", is_size=True)
RANK = Setting("rank", 4, "Rank of low-rank maps; 4 in the paper's tables.", is_size=True)
BOTTLENECK = Setting("bottleneck", 96, "Width of bottlenecks; 96 in the paper's tables.", is_size=True)
MODEL_CLASSES = tuple(family.model_class for family in FAMILIES)
