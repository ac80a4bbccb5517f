#!/usr/bin/env python
"""Make the miniature CLIP, ViLT and METER from nothing: draw the world, train, grade, export.

    python tools/pretrain_miniature_vl.py --model clip --output_dir runs/clip
    python tools/pretrain_miniature_vl.py --model vilt --output_dir runs/vilt     # starts from the exported CLIP,
    python tools/pretrain_miniature_vl.py --model meter --output_dir runs/meter   # as this one does
    python tools/pretrain_miniature_vl.py --model vilt --grade                    # only grade the embedded weights

CLIP learns by contrast of captions; ViLT and METER learn whether a text fits a picture, and masked words. All see
captions and sentences of `apt_diffusion/miniature/tasks/captions.py:describe` about pictures of the world; never a
question, a statement about two pictures, a caption of the retrieval task's other wordings or a textured thing. An
interrupted run goes on where it stopped; every step draws from its own seed. docs/miniature.md has the grades.
"""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from stages import Stage, fit
from torch import Tensor, nn
from transformers import CLIPPreTrainedModel, RobertaPreTrainedModel

from apt_diffusion.miniature import MODELS
from apt_diffusion.miniature.knowledge import clip_grades, load, matching_grades
from apt_diffusion.miniature.muon import Muon
from apt_diffusion.miniature.start import TAKEN, start_meter, start_vilt
from apt_diffusion.miniature.tasks.captions import describe
from apt_diffusion.miniature.tasks.picture import Claim, Picture, read_picture
from apt_diffusion.miniature.tasks.similar import GROUP, similar_scenes
from apt_diffusion.miniature.vision_language import MAKERS, WordHead, export, load_word_head, make_word_head
from apt_diffusion.miniature.world import COLORS, SHAPES, render

MASKED = 0.3  # share of the words
MASKED_SEEN = 0.6  # of colours and shapes, which only the picture tells
INHERITED_RATE = 0.2  # of the learning rate, for the layers that ViLT takes from CLIP: what they know of shapes stays
Loss = Callable[[torch.Generator], Tensor]
OUTER = ("embedding", "position", "token", "logit_scale", "rank_output")  # for AdamW, not for Muon


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["clip", "vilt", "meter"], required=True)
    parser.add_argument("--output_dir", help="checkpoints and grades (default: runs/miniature-MODEL)")
    parser.add_argument("--export_dir", help="where the model goes, in fp16 (default: where the package has it)")
    parser.add_argument(
        "--clip", default=str(MODELS["miniature-clip"]), help="ViLT and METER start from its vision tower"
    )
    parser.add_argument("--grade", action="store_true", help="grade what is in --export_dir, and nothing else")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=128, help="pictures; a multiple of 4")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--save_every", type=int, default=200, help="steps between checkpoints and grades")
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or f"runs/miniature-{args.model}"
    args.export_dir = args.export_dir or str(MODELS[f"miniature-{args.model}"])
    return args


# Pictures and texts


def draw_batch(
    count: int, generator: torch.Generator, sentences: float
) -> tuple[Tensor, list[Picture], list[str], list[Claim], Random]:
    """Pixels `(B, 3, 64, 64)` in [-1, 1], what they show, a text about each and what it claims."""
    scenes = similar_scenes(count, generator)
    rng = Random(int(torch.randint(2**62, (), generator=generator)))
    pictures = [read_picture(scenes, index) for index in range(count)]
    texts, claims = zip(*(describe(picture, rng, sentences) for picture in pictures), strict=True)
    return render(scenes, generator), pictures, list(texts), list(claims), rng


def normalised(pixels: Tensor, image_processor: Any) -> Tensor:
    """As the image processor would give them, pixels `(B, 3, H, W)` in [-1, 1] coming in."""
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
    )
    return ((pixels + 1) / 2 - mean) / std


# Objectives


def clip_loss(args: argparse.Namespace, model: nn.Module, processor: Any) -> Loss:
    """Contrast within the batch; a caption that fits another picture too is no negative for it."""

    def loss(generator: torch.Generator) -> Tensor:
        pixels, pictures, texts, claims, rng = draw_batch(args.batch_size, generator, sentences=0.1)
        texts = [text + rng.choice(("", "", ".")) for text in texts]  # templates end in a full stop
        tokens = processor.tokenizer(texts, padding=True, return_tensors="pt")
        fits = torch.tensor([[claim.holds(picture) for claim in claims] for picture in pictures])
        pixel_values = normalised(pixels, processor.image_processor)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pixel_values=pixel_values, **tokens).logits_per_image.float()  # (images, texts)
        logits = logits.masked_fill(fits.fill_diagonal_(False), -1e4)
        own = torch.arange(len(logits))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    return loss


def matching_loss(args: argparse.Namespace, model: nn.Module, word_head: WordHead, processor: Any) -> Loss:
    """Half of the batch learns masked words; the other half, twice over, whether the text fits the picture."""
    tokenizer = processor.tokenizer
    special = torch.tensor(tokenizer.all_special_ids)
    seen = torch.tensor([tokenizer(f"a {word}").input_ids[2] for word in (*COLORS, *SHAPES)])
    half = args.batch_size // 2

    def loss(generator: torch.Generator) -> Tensor:
        pixels, pictures, texts, claims, rng = draw_batch(args.batch_size, generator, sentences=0.4)
        # Rows: half of the texts with their own pictures, the same with misfits, the other half to mask words in.
        shown = [*range(half), *(misfit(claims[row], row, pictures, rng) for row in range(half))]
        fits = torch.tensor([claims[row % half].holds(pictures[image]) for row, image in enumerate(shown)])
        rows = [*range(half), *range(half), *range(half, args.batch_size)]
        shown += rows[2 * half :]
        tokens = tokenizer([texts[row] for row in rows], padding=True, return_tensors="pt")
        ids = tokens.input_ids  # (3 half, T)
        share = torch.where(torch.isin(ids, seen), MASKED_SEEN, MASKED)
        masked = ~torch.isin(ids, special) & (torch.rand(ids.shape, generator=generator) < share)
        masked[: 2 * half] = False
        with torch.autocast("cpu", torch.bfloat16):
            states, pooled = encode(
                model,
                ids.masked_fill(masked, tokenizer.mask_token_id),
                tokens.attention_mask,
                normalised(pixels, processor.image_processor),
                shown,
            )
            logits = model.rank_output(pooled[: 2 * half])[:, 0]
            guesses = word_head(states[:, : ids.shape[1]][masked], model.get_input_embeddings())
        matching = F.binary_cross_entropy_with_logits(logits.float(), fits.float())
        return matching + F.cross_entropy(guesses.float(), ids[masked])

    return loss


def misfit(claim: Claim, row: int, pictures: list[Picture], rng: Random) -> int:
    """Every second time a picture of the same group for which the claim does not hold, if there is one; else any."""
    if row % 2:
        return rng.randrange(len(pictures))
    start = row - row % GROUP
    candidates = rng.sample([index for index in range(start, start + GROUP) if index != row], GROUP - 1)
    wrong = [index for index in candidates if not claim.holds(pictures[index])]
    return wrong[0] if wrong else rng.randrange(len(pictures))


def encode(
    model: nn.Module, ids: Tensor, mask: Tensor, pixel_values: Tensor, shown: list[int]
) -> tuple[Tensor, Tensor]:
    """Hidden states (text first) and the pooled state of texts with the pictures `shown`; each is embedded once."""
    base = model.base_model
    if model.config.model_type == "meter":
        image_embeds = base.get_image_features(pixel_values)[shown]
        # With attentions to give, METER multiplies them out: on a CPU that trains twice as fast as the fused kernel.
        outputs = base(input_ids=ids, attention_mask=mask, image_embeds=image_embeds, output_attentions=True)
    else:  # all pictures have one size: ViLT need not interpolate positions and sample patches of each
        embed = base.embeddings
        patches = embed.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)
        patches = torch.cat([embed.cls_token.expand(len(patches), -1, -1), patches], 1) + embed.position_embeddings
        present = torch.ones(len(ids), patches.shape[1], dtype=torch.long)
        outputs = base(input_ids=ids, attention_mask=mask, image_embeds=patches[shown], pixel_mask=present)
    return outputs.last_hidden_state, outputs.pooler_output


# Stages


def make_stage(args: argparse.Namespace) -> Stage:
    """The only stage: the model, its loss and two optimizers."""
    torch.manual_seed(args.seed)
    make_model, make_processor = MAKERS[args.model]
    model, processor = make_model(), make_processor()
    for part in model.modules():
        if isinstance(part, CLIPPreTrainedModel | RobertaPreTrainedModel):
            part.set_attn_implementation("eager")  # see `encode`
    modules = {"model": model}
    if args.model == "clip":
        loss = clip_loss(args, model, processor)
    else:
        {"vilt": start_vilt, "meter": start_meter}[args.model](model, load("clip", args.clip)[0].vision_model)
        modules["word_head"] = make_word_head(model)
        loss = matching_loss(args, model, modules["word_head"], processor)
    named = [pair for module in modules.values() for pair in module.named_parameters()]
    matrices = {name: p for name, p in named if p.ndim == 2 and not any(part in name for part in OUTER)}
    others = {name: p for name, p in named if name not in matrices}
    optimizers = [
        Muon(rate_groups(matrices)),
        torch.optim.AdamW(rate_groups(others), betas=(0.9, 0.98), weight_decay=0.0),
    ]
    return Stage(args.model, modules, optimizers, args.learning_rate, args.steps, loss, ema_decay=0.995)


def rate_groups(parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups: what ViLT took from CLIP's vision tower, at its own rate, and the rest."""
    taken = ("patch_embeddings", *(f"vilt.encoder.layer.{layer}." for layer in range(TAKEN)))
    inherited = [p for name, p in parameters.items() if any(part in name for part in taken)]
    chosen = {id(p) for p in inherited}
    rest = [p for p in parameters.values() if id(p) not in chosen]
    return [{"params": rest}, {"params": inherited, "lr_scale": INHERITED_RATE}]


def grades_of(name: str, folder: str | Path) -> dict[str, float]:
    """Of an exported model."""
    model, processor = load(name, folder)
    if name == "clip":
        return clip_grades(model, processor)
    return matching_grades(model, load_word_head(folder, model), processor)


def report(args: argparse.Namespace, folder: str | Path, name: str) -> None:
    """Grades an exported model, on the screen and as JSON."""
    grades = grades_of(args.model, folder)
    print("\n".join(f"{value:.3f}  {what}" for what, value in grades.items()))
    (Path(args.output_dir) / name).write_text(json.dumps(grades, indent=2))


def main(argv: list[str] | None = None) -> None:
    """Trains and exports."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = parse_args(argv)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if args.grade:
        report(args, args.export_dir, "grades.json")
        return
    stage = make_stage(args)
    model, word_head = stage.modules["model"], stage.modules.get("word_head")

    def save_and_grade(step: int) -> None:
        export(args.model, output_dir / "model", model, word_head)
        print(f"\nstep {step}")
        report(args, output_dir / "model", f"grades-{step:05d}.json")

    fit(stage, args.output_dir, args.seed, args.save_every, save_and_grade)
    export(args.model, args.export_dir, model, word_head)
    report(args, args.export_dir, "grades.json")


if __name__ == "__main__":
    main()
