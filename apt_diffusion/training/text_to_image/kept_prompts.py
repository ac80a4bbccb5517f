"""The prompts of a run whose texts are read by language models: encoded once, before the transformer is loaded."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...data.text_length import warn_of_cut_texts
from .encoder_outputs import EncoderOutputs
from .flow_transformer import MASK, FlowTransformerBase, plain
from .stable_diffusion import Embeddings

LoadEncoders = Callable[[], dict[str, nn.Module]]


class KeptPrompts:
    """Has the methods of `Prompts`. Embeddings stay in main memory, one row per prompt, padded to the longest.

    Args:
        prompts: where each prompt stands (a file, a flag), and the prompt.
        base: the base model.
    """

    def __init__(self, prompts: list[tuple[str, str]], base: FlowTransformerBase) -> None:
        self.base = base
        self.rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompt for _, prompt in prompts))}
        self.device = torch.device("cpu")
        self.embeddings: Embeddings = {}
        self.tokenizers = base.tokenizers()
        reader = self.tokenizers[base.text_parts[-1]]  # the language model's
        room = base.max_sequence_length - base.text_before(reader)
        if room < 1:
            raise ValueError(
                f"--max_sequence_length {base.max_sequence_length} has no room for prompts: {base.family} puts "
                f"{base.max_sequence_length - room} tokens of its own before each."
            )
        warn_of_cut_texts(prompts, plain(reader), room, "Shorten them, or raise --max_sequence_length.")

    def to(self, device: torch.device) -> "KeptPrompts":
        """Notes where the models are."""
        self.device = device
        return self

    @torch.no_grad()
    def keep_embeddings(
        self, load: LoadEncoders, trained: Sequence[str] = (), outputs: EncoderOutputs | None = None
    ) -> dict[str, nn.Module]:
        """As that of `Prompts`; returns encoders that are trained."""
        encoders = evaluated_once(load)
        pipeline = functools.cache(lambda: self.base.text_pipeline(encoders(), self.tokenizers))
        each = []
        for prompt in self.rows:

            def compute(prompt: str = prompt) -> Embeddings:
                encoded = self.base.encode(pipeline(), prompt, self.device)
                return {name: tensor.cpu() for name, tensor in encoded.items()}

            each.append(compute() if outputs is None else outputs.embeddings(prompt, compute))
        self.embeddings = {name: padded([one[name] for one in each]) for name in each[0]}
        if not any(part in trained for part in self.base.text_parts):
            return {}
        return {part: model for part, model in encoders().items() if part in trained}

    def __call__(self, prompts: list[str], text_encoders: dict[str, nn.Module]) -> Embeddings:
        """The kept embeddings, as long as the longest of these prompts; pooled text of a CLIP that is trained."""
        rows = torch.tensor([self.rows[prompt] for prompt in prompts])
        found = {name: tensor[rows] for name, tensor in self.embeddings.items()}
        if MASK in found:
            length = int(found[MASK].sum(1).max())
            found = {name: tensor[:, :length] for name, tensor in found.items()}
        found = {name: tensor.to(self.device) for name, tensor in found.items()}
        return found | (self._live(prompts, text_encoders) if text_encoders else {})

    def _live(self, prompts: list[str], text_encoders: dict[str, nn.Module]) -> Embeddings:
        distinct = list(dict.fromkeys(prompts))
        tokens = {}
        for part in text_encoders:
            tokenizer = self.tokenizers[part]
            encoded = tokenizer(
                distinct, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                return_tensors="pt",
            )  # fmt: skip
            tokens[part] = {"input_ids": encoded.input_ids.to(self.device)}
        places = torch.tensor([distinct.index(prompt) for prompt in prompts], device=self.device)
        return {name: tensor[places] for name, tensor in self.base.embed(text_encoders, tokens).items()}


def evaluated_once(load: LoadEncoders) -> LoadEncoders:
    """Loads them at its first call, without dropout."""

    @functools.cache
    def encoders() -> dict[str, nn.Module]:
        return {part: model.eval() for part, model in load().items()}

    return encoders


def padded(tensors: list[Tensor]) -> Tensor:
    """`(1, L, ...)` each, stacked to the longest L with zeros behind."""
    if tensors[0].ndim < 2 or len({tensor.shape[1] for tensor in tensors}) == 1:
        return torch.cat(tensors)
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat(
        [functional.pad(tensor, (*(0, 0) * (tensor.ndim - 2), 0, longest - tensor.shape[1])) for tensor in tensors]
    )
