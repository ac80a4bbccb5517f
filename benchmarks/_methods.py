"""What is compared: APT in several forms, LoRA, textual inversion and full tuning of the cross-attention."""

from dataclasses import dataclass, field
from typing import Any

import torch
from _families import TRANSFORMER, Family
from torch import Tensor, nn

from apt_diffusion import APTConfig, add_apt, freeze_base, set_apt_adapters

# Name of an adapter's parameter -> its kind.
KINDS = {
    "prompts": "prompts",
    "low_rank_down": "keys",
    "low_rank_up": "keys",
    "log_scale": "scale and gate",
    "gate": "scale and gate",
}


@dataclass(frozen=True)
class Method:
    """What is trained, and how.

    Args:
        lr: the learning rate.
        kind: `apt`, `lora`, `inversion` or `cross-attention`.
        unet, text_encoder, transformer: settings of each part: `APTConfig`'s, or LoRA's rank.
        asked_twice: half of the UNet's prompts are asked by the attention's input, half by its output.
        rates: factors on the learning rate, by `KINDS`.
        average: decay of an average of the weights, which draws in their place.
        keeps_predictions: what class pictures hold on to is the base model's prediction, not the noise that was added.
    """

    lr: float
    kind: str = "apt"
    unet: dict[str, Any] = field(default_factory=dict)
    text_encoder: dict[str, Any] = field(default_factory=dict)
    transformer: dict[str, Any] = field(default_factory=dict)
    asked_twice: bool = False
    rates: dict[str, float] = field(default_factory=dict)
    average: float = 0.0
    keeps_predictions: bool = False

    def attach(self, pipeline: Any, family: Family, words: str) -> list[dict[str, Any]]:
        """Prepares the pipeline for training; groups of parameters with their rates. `words` name what is taught."""
        named = self.add(pipeline, family, words)
        rate = {name: self.lr * self.rates.get(KINDS.get(name.rsplit(".", 1)[-1], ""), 1.0) for name, _ in named}
        return [
            {"params": [parameter for name, parameter in named if rate[name] == value], "lr": value}
            for value in dict.fromkeys(rate.values())
        ]

    def add(self, pipeline: Any, family: Family, words: str) -> list[tuple[str, nn.Parameter]]:
        """What is trained, by name; all else is frozen."""
        parts = {part: getattr(pipeline, part) for part in family.parts}
        for model in parts.values():
            model.requires_grad_(False)
        if self.kind == "inversion":
            return [("words", invert(pipeline, words))]
        if self.kind == "cross-attention":
            chosen = [(name, p) for name, p in pipeline.unet.named_parameters() if ".attn2." in name]
            return [(name, parameter.requires_grad_(True)) for name, parameter in chosen]
        for part, model in parts.items():
            settings = getattr(self, part)
            if self.kind == "lora":
                from peft import LoraConfig, inject_adapter_in_model

                rank = settings["rank"]
                config = LoraConfig(
                    r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=family.lora_modules[part]
                )
                inject_adapter_in_model(config, model)
            elif self.asked_twice and part == "unet":
                for source in ("hidden_states", "attn_output"):
                    add_apt(model, APTConfig(**settings, query_source=source), source)
                set_apt_adapters(model, ["hidden_states", "attn_output"])
                freeze_base(model)
            else:
                add_apt(model, APTConfig(**settings))
                freeze_base(model)
        return [pair for model in parts.values() for pair in model.named_parameters() if pair[1].requires_grad]


class InvertedEmbedding(nn.Module):
    """A frozen embedding in which the rows of a few tokens are learnt."""

    def __init__(self, embedding: nn.Embedding, tokens: list[int]) -> None:
        super().__init__()
        self.embedding, self.tokens = embedding, tokens
        self.rows = nn.Parameter(embedding.weight[tokens].detach().clone())

    def forward(self, ids: Tensor) -> Tensor:
        """`(B, T)` to `(B, T, d)`."""
        states = self.embedding(ids)
        for token, row in zip(self.tokens, self.rows, strict=True):
            states = torch.where((ids == token)[..., None], row, states)
        return states


def invert(pipeline: Any, words: str) -> nn.Parameter:
    """Textual inversion: the embeddings of these words, `(W, d)`."""
    tokens = pipeline.tokenizer(words, add_special_tokens=False).input_ids
    embedding = InvertedEmbedding(pipeline.text_encoder.get_input_embeddings(), tokens)
    pipeline.text_encoder.set_input_embeddings(embedding)
    return embedding.rows


def apt(lr: float, num_prompts: int = 200, training: dict[str, Any] | None = None, **unet: Any) -> Method:
    """APT on the cross-attention and the text encoder; `unet` holds settings of the UNet's part alone."""
    prompts = {"num_prompts": num_prompts}
    return Method(lr, "apt", prompts | unet, prompts, **training or {})


def lora(lr: float, rank: int, training: dict[str, Any] | None = None) -> Method:
    """LoRA on all projections of the attentions."""
    return Method(lr, "lora", {"rank": rank}, {"rank": rank}, **training or {})


METHODS = {
    "APT, lr 3e-3": apt(3e-3),
    "APT, lr 1.5e-3": apt(1.5e-3),
    "APT, lr 6e-3": apt(6e-3),
    "APT, asked by O": apt(3e-3, query_source="attn_output"),
    "APT, asked by O, context too": apt(3e-3, query_source="attn_output", streams=("query", "context")),
    "APT, context too": apt(3e-3, streams=("query", "context")),
    "APT, asked by X and by O": Method(3e-3, "apt", {"num_prompts": 100}, asked_twice=True),
    "APT, self-attention too": apt(3e-3, 100, target_modules=("attn1", "attn2")),
    "APT, self-attention too, asked by O": apt(
        3e-3, 100, target_modules=("attn1", "attn2"), query_source="attn_output"
    ),
    "APT, 200 prompts, self-attention too": apt(3e-3, 200, target_modules=("attn1", "attn2")),
    "APT, the up blocks alone": apt(3e-3, target_modules=r".*up_blocks.*\.attn2"),
    "APT, more prompts in the middle": apt(3e-3, num_prompts_pattern={r"mid_block.*": 400, r".*_blocks\..*": 150}),
    "APT, 50 prompts": apt(3e-3, 50),
    "APT, 400 prompts": apt(3e-3, 400),
    "APT, dropout 0.1": Method(3e-3, "apt", {"dropout": 0.1}, {"dropout": 0.1}),
    "APT, averaged weights": apt(3e-3, 200, {"average": 0.98}),
    "APT, slow scale and gate": apt(3e-3, 200, {"rates": {"scale and gate": 0.3}}),
    "APT, fast scale and gate": apt(3e-3, 200, {"rates": {"scale and gate": 3.0}}),
    "APT, slow keys": apt(3e-3, 200, {"rates": {"keys": 0.3}}),
    "APT, keeps predictions": apt(3e-3, 200, {"keeps_predictions": True}),
    "LoRA r16 keeps predictions, lr 2e-3": lora(2e-3, 16, {"keeps_predictions": True}),
    "LoRA r16, lr 2e-3": lora(2e-3, 16),
    "LoRA r16, lr 1e-3": lora(1e-3, 16),
    "LoRA r16, lr 4e-3": lora(4e-3, 16),
    # As in the table of shapes, where APT has as many parameters as LoRA of rank 15.
    "LoRA r15, lr 1e-3": lora(1e-3, 15),
    "LoRA r15, lr 2e-3": lora(2e-3, 15),
    "LoRA r15, lr 4e-3": lora(4e-3, 15),
    "LoRA r4, lr 2e-3": lora(2e-3, 4),
    "textual inversion, lr 1e-2": Method(1e-2, "inversion"),
    "textual inversion, lr 3e-2": Method(3e-2, "inversion"),
    "full cross-attention, lr 3e-4": Method(3e-4, "cross-attention"),
    "full cross-attention, lr 1e-3": Method(1e-3, "cross-attention"),
}


def of_transformer(kind: str, lr: float, **settings: Any) -> Method:
    """APT or LoRA on the joint attentions of a diffusion transformer, whose text encoders stay as they are."""
    return Method(lr, kind, transformer=settings)


BOTH = ("query", "text")
# LoRA of rank 13 has as many parameters as APT on the image stream, of rank 24 as many as on both streams.
TRANSFORMER_METHODS = {
    "APT, image stream, lr 3e-3": of_transformer("apt", 3e-3, num_prompts=200),
    "APT, image stream, lr 1.5e-3": of_transformer("apt", 1.5e-3, num_prompts=200),
    "APT, image stream, lr 6e-3": of_transformer("apt", 6e-3, num_prompts=200),
    "APT, image and text, lr 3e-3": of_transformer("apt", 3e-3, num_prompts=200, streams=BOTH),
    "APT, image and text, lr 1.5e-3": of_transformer("apt", 1.5e-3, num_prompts=200, streams=BOTH),
    "LoRA r13, lr 2e-3": of_transformer("lora", 2e-3, rank=13),
    "LoRA r13, lr 1e-3": of_transformer("lora", 1e-3, rank=13),
    "LoRA r13, lr 4e-3": of_transformer("lora", 4e-3, rank=13),
    "LoRA r24, lr 2e-3": of_transformer("lora", 2e-3, rank=24),
}


def methods_of(family: Family) -> dict[str, Method]:
    """Those that can be compared on a model of this family."""
    return TRANSFORMER_METHODS if family is TRANSFORMER else METHODS
