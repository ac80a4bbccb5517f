"""The prompts of a run as embeddings: computed once and kept, or anew in every step where text encoders learn."""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...data.text_length import warn_of_cut_texts
from ...words import TOKENIZERS
from .encoder_outputs import EncoderOutputs
from .flow_transformer import FlowTransformerBase
from .kept_prompts import KeptPrompts, LoadEncoders, evaluated_once
from .new_words import taught, warn_of_prompts_without
from .stable_diffusion import Embeddings, StableDiffusionBase, Tokens


def make_prompts(
    prompts: list[tuple[str, str]], base: StableDiffusionBase, args: argparse.Namespace
) -> "Prompts | KeptPrompts":
    """The prompts of a run.

    Args:
        prompts: as for `Prompts`.
        base: the base model.
        args: the script's flags.
    """
    if isinstance(base, FlowTransformerBase):
        return KeptPrompts(prompts, base)
    return Prompts(
        prompts, base, args.tokenizer_name, args.tokenizer_max_length, args.text_encoder_use_attention_mask,
        args.new_tokens or (),
    )  # fmt: skip


class Prompts:
    """Tokenizes all prompts of a run at once, and warns of those that the text encoders cannot read whole.

    Other prompts, as shuffled captions are, are tokenized when they are asked for.

    Args:
        prompts: where each prompt stands (a file, a flag), and the prompt.
        base: the base model.
        tokenizer_name: hub id or folder of another tokenizer than its own.
        max_length: tokens per prompt; as many as the text encoder reads if `None`.
        use_attention_mask: hide padding from the text encoders.
        new_words: that the tokenizers of CLIP learn.

    Raises:
        ValueError: for a `max_length` that a text encoder cannot read, or a tokenizer of another one, or words that
            are known already.
    """

    def __init__(
        self,
        prompts: list[tuple[str, str]],
        base: StableDiffusionBase,
        tokenizer_name: str | None = None,
        max_length: int | None = None,
        use_attention_mask: bool = False,
        new_words: Sequence[str] = (),
    ) -> None:
        distinct = list(dict.fromkeys(prompt for _, prompt in prompts))
        self.base = base
        self.rows = {prompt: row for row, prompt in enumerate(distinct)}
        self.use_attention_mask = use_attention_mask
        self.tokenizers = base.tokenizers(tokenizer_name)
        self.own_tokenizers = dict(self.tokenizers)
        if new_words:
            self.tokenizers |= taught(self.tokenizers, new_words)
            warn_of_prompts_without(new_words, prompts)
        self.lengths: dict[str, int] = {}  # in tokens, by text encoder
        longest = base.longest_texts()
        for part, tokenizer in self.tokenizers.items():
            if max_length is not None and max_length > longest[part]:
                raise ValueError(
                    f"--tokenizer_max_length {max_length}: this text encoder reads at most {longest[part]} tokens."
                )
            length = max_length or min(tokenizer.model_max_length, longest[part])
            if not self.lengths:  # text encoders of one model read equally much
                warn_of_cut_texts(prompts, tokenizer, length, "Shorten them, the trigger word first.")
            self.lengths[part] = length
        self.tokens = self._tokenize(distinct)  # by text encoder; each tensor (n, L)
        for part, tokens in self.tokens.items():
            known = base.text_config(part).vocab_size + (len(new_words) if part in TOKENIZERS else 0)
            if tokens["input_ids"].max() >= known:
                raise ValueError(
                    f"The tokenizer of the {part} knows more than the {known} tokens that the text encoder has: "
                    f"{tokenizer_name or base.path} is not its tokenizer."
                )
        self.embeddings: Embeddings | None = None
        self.device = torch.device("cpu")

    def _tokenize(self, prompts: list[str]) -> dict[str, Tokens]:
        found = {}
        for part, tokenizer in self.tokenizers.items():
            tokens = tokenizer(
                prompts, truncation=True, padding="max_length", max_length=self.lengths[part], return_tensors="pt"
            )
            mask = {"attention_mask": tokens.attention_mask} if self.use_attention_mask else {}
            found[part] = {"input_ids": tokens.input_ids} | mask
        return found

    def to(self, device: torch.device) -> "Prompts":
        """Moves the tokens to the text encoders' device."""
        self.device = device
        self.tokens = _on(device, self.tokens)
        return self

    @torch.no_grad()
    def keep_embeddings(
        self, load: LoadEncoders, trained: Sequence[str] = (), outputs: EncoderOutputs | None = None
    ) -> dict[str, nn.Module]:
        """Encodes all prompts, one by one so that none depends on the others; returns text encoders to keep: none.

        Args:
            load: loads the text encoders; not called where `outputs` has all prompts.
            trained: parts that are.
            outputs: those on disk.
        """
        encoders = evaluated_once(load)
        each = []
        for prompt, row in self.rows.items():

            def compute(row: int = row) -> Embeddings:
                return self._encode(torch.tensor([row]), encoders())

            each.append(compute() if outputs is None else _moved(self.device, outputs.embeddings(prompt, compute)))
        self.embeddings = {name: torch.cat([one[name] for one in each]) for name in each[0]}
        return {}

    def __call__(self, prompts: list[str], text_encoders: dict[str, nn.Module]) -> Embeddings:
        """The kept embeddings, or those of `text_encoders`, which read each distinct prompt once."""
        if any(prompt not in self.rows for prompt in prompts):
            new = list(dict.fromkeys(prompts))
            encoded = self.base.embed(text_encoders, _on(self.device, self._tokenize(new)))
            places = torch.tensor([new.index(prompt) for prompt in prompts])
            return {name: embedding[places.to(embedding.device)] for name, embedding in encoded.items()}
        rows = torch.tensor([self.rows[prompt] for prompt in prompts])
        if self.embeddings is not None:
            return {name: embedding[rows.to(embedding.device)] for name, embedding in self.embeddings.items()}
        distinct, places = rows.unique(return_inverse=True)
        encoded = self._encode(distinct, text_encoders)
        return {name: embedding[places.to(embedding.device)] for name, embedding in encoded.items()}

    def _encode(self, rows: Tensor, text_encoders: dict[str, nn.Module]) -> Embeddings:
        tokens = {
            part: {name: tensor[rows.to(tensor.device)] for name, tensor in own.items()}
            for part, own in self.tokens.items()
        }
        return self.base.embed(text_encoders, tokens)


def _moved(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _on(device: torch.device, tokens: dict[str, Tokens]) -> dict[str, Tokens]:
    return {part: _moved(device, own) for part, own in tokens.items()}
