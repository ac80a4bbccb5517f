"""Training: what the scripts in `train/` are made of."""

from ..quiet import hide_torchvision_notices

hide_torchvision_notices()
