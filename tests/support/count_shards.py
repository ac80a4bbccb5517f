"""Runs a script as `count_shards.py SCRIPT ARGS` and prints the share of the frozen model that this process holds."""

import runpy
import sys
from pathlib import Path

from torch.distributed.tensor import DTensor

from apt_diffusion.training import sharding

plain_shard = sharding.shard


def shard(accelerator, model, optimizer):
    model, optimizer = plain_shard(accelerator, model, optimizer)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    here = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in frozen)
    whole = not any(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)
    share = here / sum(parameter.numel() for parameter in frozen)
    sys.stdout.write(f"<share: {share:.2f}, adapter whole: {whole}>\n")  # in one piece: another process prints, too
    return model, optimizer


sharding.shard = shard
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
