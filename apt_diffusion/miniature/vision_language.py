"""Miniature CLIP, ViLT and METER, untrained: the classes of the real models, small, with tokenizers made here.

Pictures of 64 pixels are 4 × 4 patches. Every word of the world and of its tasks is one token in each vocabulary, and
any other text still encodes, letter by letter.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..io.atomic import new_folder
from ..io.files import write_safetensors
from .models import MAX_TOKENS, byte_symbols, make_merges, make_tokenizer
from .tasks.picture import PLURAL
from .world import COLORS, LAYOUTS, PATTERNS, SHAPES, SIZE

if TYPE_CHECKING:
    from transformers import BertTokenizer, CLIPModel, CLIPProcessor, CLIPTokenizer, RobertaTokenizer, ViltProcessor
    from transformers import ViltForImageAndTextRetrieval as Vilt

    from ..models.meter import MeterForImageAndTextRetrieval as Meter
    from ..models.meter import MeterProcessor

PATCH = 16
GRAMMAR = [
    "a", "an", "the", "on", "and", "or", "in", "of", "with", "is", "are", "there", "it", "its", "that", "we", "see",
    "no", "one", "two", "three", "four", "background", "picture", "pictures", "photo", "shape", "shapes", "what",
    "which", "how", "many", "color", "kind", "same", "more", "than", "larger", "higher", "farther", "side", "top",
    "bottom", "yes", "around", "front", "behind", "middle", "over", "under", "within", "has", "show", "shows",
    "both", "exactly", "neither", "total", "texture",
]  # fmt: skip
WORDS = tuple(dict.fromkeys((*COLORS, *SHAPES, *PLURAL.values(), *PATTERNS, *" ".join(LAYOUTS).split(), *GRAMMAR)))


def make_clip_tokenizer() -> "CLIPTokenizer":
    """Words of the drawn world as CLIP tokens."""
    return make_tokenizer(WORDS)


def make_bert_tokenizer() -> "BertTokenizer":
    """WordPiece."""
    from transformers import BertTokenizer

    letters = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]
    pieces = [f"##{letter}" for letter in letters if letter.isalnum()]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = dict.fromkeys([*special, *letters, *pieces, *WORDS])
    return BertTokenizer({word: index for index, word in enumerate(vocabulary)}, model_max_length=MAX_TOKENS)


def make_roberta_tokenizer() -> "RobertaTokenizer":
    """Byte-level BPE; a text starts as if a space came before it, so that its first word is a word like others."""
    from transformers import RobertaTokenizer

    symbols = byte_symbols()
    merges = make_merges(list(WORDS), start="Ġ", end="")
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *symbols, *("".join(pair) for pair in merges), "<mask>"]
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    return RobertaTokenizer(ids, merges, add_prefix_space=True, model_max_length=MAX_TOKENS)


def make_clip_image_processor() -> Any:
    """Pictures as squares of the embedded models' size, with CLIP's normalisation."""
    from transformers import CLIPImageProcessorPil

    size = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=size)


def make_clip_processor() -> "CLIPProcessor":
    """Processor of the embedded CLIP."""
    from transformers import CLIPProcessor

    return CLIPProcessor(make_clip_image_processor(), make_clip_tokenizer())


def make_vilt_processor() -> "ViltProcessor":
    """Processor of the embedded ViLT."""
    from transformers import ViltImageProcessorPil, ViltProcessor

    image_processor = ViltImageProcessorPil(size={"shortest_edge": SIZE}, size_divisor=PATCH)
    return ViltProcessor(image_processor, make_bert_tokenizer())


def make_meter_processor() -> "MeterProcessor":
    """Processor of the embedded METER."""
    from ..models.meter import MeterProcessor

    return MeterProcessor(make_clip_image_processor(), make_roberta_tokenizer())


VISION = {
    "hidden_size": 160, "intermediate_size": 640, "num_attention_heads": 5, "image_size": SIZE, "patch_size": PATCH,
}  # fmt: skip
TEXT = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
VISION_LAYERS = 5


def make_clip() -> "CLIPModel":
    """An untrained embedded CLIP."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = make_clip_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {
        **TEXT, **ids, "pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer), "num_hidden_layers": 4,
        "max_position_embeddings": MAX_TOKENS,
    }  # fmt: skip
    vision = {**VISION, "num_hidden_layers": VISION_LAYERS}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def make_vilt() -> "Vilt":
    """An untrained embedded ViLT, with its head for image-text matching."""
    from transformers import ViltConfig, ViltForImageAndTextRetrieval

    tokenizer = make_bert_tokenizer()
    config = ViltConfig(
        **VISION,
        num_hidden_layers=6,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=MAX_TOKENS,
        max_image_length=-1,
        hidden_act="quick_gelu",  # CLIP's, from whose vision tower it starts
        tie_word_embeddings=True,
    )
    return ViltForImageAndTextRetrieval(config)


def make_meter() -> "Meter":
    """The vision tower lacks the last layer of the miniature CLIP's, as METER's lacks that of CLIP's."""
    from ..models.meter import MeterConfig, MeterForImageAndTextRetrieval

    tokenizer = make_roberta_tokenizer()
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    text = {
        **TEXT, **dropout, "vocab_size": len(tokenizer), "num_hidden_layers": 3,
        "max_position_embeddings": MAX_TOKENS + 2, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    vision = {**VISION, "num_hidden_layers": VISION_LAYERS - 1, "hidden_act": "quick_gelu"}
    config = MeterConfig(text_config=text, vision_config=vision, num_hidden_layers=3, **TEXT, **dropout)
    return MeterForImageAndTextRetrieval(config)


class WordHead(nn.Module):
    """Which word stands behind a text state `(..., d)`; its output map is the model's own word embedding table."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, states: Tensor, embeddings: nn.Embedding) -> Tensor:
        """Logits `(..., vocabulary)` from states `(..., width)` and the model's word embeddings."""
        return F.linear(self.norm(F.gelu(self.dense(states))), embeddings.weight, self.bias)


def make_word_head(model: nn.Module) -> WordHead:
    """An untrained head for masked words, of this model's widths."""
    embeddings = model.get_input_embeddings()
    return WordHead(embeddings.embedding_dim, embeddings.num_embeddings)


MAKERS = {
    "clip": (make_clip, make_clip_processor),
    "vilt": (make_vilt, make_vilt_processor),
    "meter": (make_meter, make_meter_processor),
}
WORD_HEAD_FILE = "word_head.safetensors"
CARD = """---
library_name: transformers
---
# miniature-{name}

A real, small {title} of a drawn world, made by `tools/pretrain_miniature_vl.py`; see docs/miniature.md. {more}
Pictures are 64 x 64, weights are stored in fp16 and load in fp32.
"""
_HEADS = "`rank_output` says how well a text fits a picture; `word_head.safetensors` guesses masked words."
MORE = {
    "clip": ("CLIP", "Texts look like `a photo of a red circle`."),
    "vilt": ("ViLT", _HEADS),
    "meter": ("METER", _HEADS),
}


def export(name: str, folder: str | Path, model: nn.Module, word_head: WordHead | None = None) -> None:
    """Writes model and processor to a new folder, then puts it in the place of the old one."""
    with new_folder(folder, replace=True) as temporary:
        half = {key: value.half() for key, value in model.state_dict().items()}
        model.save_pretrained(temporary, state_dict=half)
        MAKERS[name][1]().save_pretrained(temporary)
        config = temporary / "config.json"  # so that nobody gets half precision on a CPU unasked
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
        if word_head is not None:
            tensors = {key: value.detach().half().contiguous() for key, value in word_head.state_dict().items()}
            write_safetensors(tensors, temporary / WORD_HEAD_FILE, {"format": "pt"})
        title, more = MORE[name]
        (temporary / "README.md").write_text(CARD.format(name=name, title=title, more=more))
        for file in temporary.iterdir():
            file.chmod(0o644)  # weights come out readable for their owner only


def load_word_head(folder: str | Path, model: nn.Module) -> WordHead:
    """The head for masked words that was kept in a model's folder."""
    from safetensors.torch import load_file

    head = make_word_head(model)
    head.load_state_dict({key: value.float() for key, value in load_file(Path(folder) / WORD_HEAD_FILE).items()})
    return head.eval()
