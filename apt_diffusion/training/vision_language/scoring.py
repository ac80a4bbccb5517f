"""Scores every picture with every caption; the processes divide the pairs among themselves."""

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm import tqdm

from ...data.image_text import ModelInputs
from ...data.retrieval import RetrievalSplit
from ...models.retrieval import score_all_pairs
from ..loading import make_loader
from ..session import Session
from .predict import gather_by_index

IMAGES_PER_BATCH = 16  # that are encoded together


def score_split(
    session: Session, model: nn.Module, inputs: ModelInputs, split: RetrievalSplit, prefix: str = ""
) -> Tensor:
    """Scores `(I, C)` of all pairs, on every process.

    Args:
        session: whose processes share the pictures.
        model: ViLT or METER for retrieval, within `evaluating`.
        inputs: collate pictures and texts.
        split: pictures and captions.
        prefix: put before every caption.
    """
    accelerator, size = session.accelerator, session.args.eval_batch_size
    own = range(accelerator.process_index, len(split.images), accelerator.num_processes)
    batches = [range(len(own))[start : start + IMAGES_PER_BATCH] for start in range(0, len(own), IMAGES_PER_BATCH)]
    pictures = make_loader(
        [(split.images[image], None) for image in own], batches, inputs.pictures, session.args.dataloader_num_workers
    )
    captions = [prefix + caption for caption in split.captions]
    texts = [inputs.texts(captions[start : start + size]) for start in range(0, len(captions), size)]
    torch.manual_seed(session.seed)  # ViLT shuffles its patches
    with (
        accelerator.autocast(),
        tqdm(total=len(own) * len(captions), desc="pairs", disable=not accelerator.is_local_main_process) as bar,
    ):
        scores = score_all_pairs(
            model,
            (send_to_device(batch, accelerator.device) for batch in pictures),
            [send_to_device(batch, accelerator.device) for batch in texts],
            bar.update,
        )
    return gather_by_index(accelerator, own, scores, len(split.images))
