"""Small random checkpoints under the official keys of METER and ViLT, and their arithmetic in plain torch, float64.

Written from the descriptions of the models, on the official tensors as they are, with none of the package's code.
"""

import math

import torch

D, TEXT, PATCH, GRID, WORDS, LAYERS = 128, 192, 8, 3, 60, 2  # heads are 64 wide
PROMPTS, RANK = 5, 2
State = dict[str, torch.Tensor]


class Maker:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.state: State = {}

    def random(self, key: str, *shape: int, size: float = 0.1) -> None:
        self.state[key] = torch.randn(shape, generator=self.generator) * size

    def linear(self, key: str, out: int, into: int) -> None:
        self.random(f"{key}.weight", out, into)
        self.random(f"{key}.bias", out)

    def norm(self, key: str, width: int) -> None:
        self.random(f"{key}.weight", width)
        self.state[f"{key}.weight"] += 1
        self.random(f"{key}.bias", width)

    def apt(self, key: str) -> None:
        self.random(f"{key}.mm_tokens", PROMPTS, D, size=0.2)
        self.random(f"{key}.mm.0.weight", RANK, D, size=0.3)
        self.random(f"{key}.mm.1.weight", D, RANK, size=0.3)
        self.random(f"{key}.scale", 1, size=0.2)

    def bert_embeddings(self, key: str, width: int, positions: int, kinds: int) -> None:
        self.random(f"{key}.word_embeddings.weight", WORDS, width, size=0.5)
        self.random(f"{key}.position_embeddings.weight", positions, width, size=0.5)
        self.random(f"{key}.token_type_embeddings.weight", kinds, width, size=0.5)
        self.norm(f"{key}.LayerNorm", width)
        self.state[f"{key}.position_ids"] = torch.arange(positions)[None]

    def classifier(self, key: str, into: int, hidden: int, labels: int) -> None:
        self.linear(f"{key}.0", hidden, into)
        self.norm(f"{key}.1", hidden)
        self.linear(f"{key}.3", labels, hidden)


def make_meter_state(task: str | None = None, apt: bool = False, images: int = 1, seed: int = 0) -> State:
    """Pre-training where `task` is `None`, else fine-tuned on `vqa`, `nlvr2` or `retrieval`."""
    make = Maker(seed)
    visual = "vit_model.visual"
    make.random(f"{visual}.class_embedding", D, size=0.5)
    make.random(f"{visual}.positional_embedding", GRID**2 + 1, D, size=0.5)
    make.random(f"{visual}.conv1.weight", D, 3, PATCH, PATCH)
    make.norm(f"{visual}.ln_pre", D)
    make.norm(f"{visual}.ln_post", D)
    for layer in range(LAYERS):
        block = f"{visual}.transformer.resblocks.{layer}"
        make.random(f"{block}.attn.in_proj_weight", 3 * D, D)
        make.random(f"{block}.attn.in_proj_bias", 3 * D)
        make.linear(f"{block}.attn.out_proj", D, D)
        make.norm(f"{block}.ln_1", D)
        make.norm(f"{block}.ln_2", D)
        make.linear(f"{block}.mlp.c_fc", 80, D)
        make.linear(f"{block}.mlp.c_proj", D, 80)
    make.random("vit_model.positional_embedding", 7, 16)
    make.norm("vit_model.ln_final", 16)
    make.bert_embeddings("text_transformer.embeddings", TEXT, 20, 1)
    for layer in range(LAYERS):
        block = f"text_transformer.encoder.layer.{layer}"
        _bert_attention(make, f"{block}.attention", TEXT)
        _bert_feed_forward(make, block, TEXT, 100)
    make.linear("text_transformer.pooler.dense", TEXT, TEXT)
    make.linear("cross_modal_text_transform", D, TEXT)
    make.linear("cross_modal_image_transform", D, D)
    make.random("token_type_embeddings.weight", 3 if images == 2 else 2, D, size=0.5)
    for tower in ("text", "image"):
        for layer in range(LAYERS):
            block = f"cross_modal_{tower}_layers.{layer}"
            for kind in ("attention", "crossattention"):
                _bert_attention(make, f"{block}.{kind}", D)
                if apt:
                    make.apt(f"{block}.{kind}.output.APT")
            _bert_feed_forward(make, block, D, 90)
        make.linear(f"cross_modal_{tower}_pooler.dense", D, D)
    if task is None or task == "retrieval":
        make.linear("itm_score.fc", 2, 2 * D)
    if task is None:
        make.linear("mlm_score.transform.dense", D, D)
        make.norm("mlm_score.transform.LayerNorm", D)
        make.random("mlm_score.decoder.weight", WORDS, D)
        make.random("mlm_score.bias", WORDS)
    elif task == "retrieval":
        make.linear("rank_output", 1, 2 * D)
    else:
        make.classifier(f"{task}_classifier", 2 * D * images, 2 * D, 7 if task == "vqa" else 2)
    if apt:
        make.random("token4classifier", 1, 1, D, size=0.5)
    return make.state


def _bert_attention(make: Maker, key: str, width: int) -> None:
    for name in ("query", "key", "value"):
        make.linear(f"{key}.self.{name}", width, width)
    make.linear(f"{key}.output.dense", width, width)
    make.norm(f"{key}.output.LayerNorm", width)


def _bert_feed_forward(make: Maker, key: str, width: int, hidden: int) -> None:
    make.linear(f"{key}.intermediate.dense", hidden, width)
    make.linear(f"{key}.output.dense", width, hidden)
    make.norm(f"{key}.output.LayerNorm", width)


def make_vilt_state(task: str | None = None, apt: bool = False, images: int = 1, seed: int = 0) -> State:
    make = Maker(seed)
    make.bert_embeddings("text_embeddings", D, 12, 2)
    make.random("token_type_embeddings.weight", 3 if images == 2 else 2, D, size=0.5)
    make.random("transformer.cls_token", 1, 1, D, size=0.5)
    make.random("transformer.pos_embed", 1, GRID**2 + 1, D, size=0.5)
    make.random("transformer.patch_embed.proj.weight", D, 3, PATCH, PATCH)
    make.random("transformer.patch_embed.proj.bias", D)
    for layer in range(LAYERS):
        block = f"transformer.blocks.{layer}"
        make.norm(f"{block}.norm1", D)
        make.norm(f"{block}.norm2", D)
        make.linear(f"{block}.attn.qkv", 3 * D, D)
        make.linear(f"{block}.attn.proj", D, D)
        if apt:
            make.apt(f"{block}.attn.APT")
        make.linear(f"{block}.mlp.fc1", 80, D)
        make.linear(f"{block}.mlp.fc2", D, 80)
    make.norm("transformer.norm", D)
    make.linear("pooler.dense", D, D)
    if task is None or task == "retrieval":
        make.linear("itm_score.fc", 2, D)
    if task is None:
        make.linear("mlm_score.transform.dense", D, D)
        make.norm("mlm_score.transform.LayerNorm", D)
        make.random("mlm_score.decoder.weight", WORDS, D)
        make.random("mlm_score.bias", WORDS)
    elif task == "retrieval":
        make.linear("rank_output", 1, D)
    else:
        make.classifier(f"{task}_classifier", D * images, 2 * D, 7 if task == "vqa" else 2)
    if apt:
        make.random("token4classifier", 1, 1, D, size=0.5)
    return make.state


# The arithmetic


def linear(state: State, key: str, x: torch.Tensor) -> torch.Tensor:
    return x @ state[f"{key}.weight"].T + state[f"{key}.bias"]


def norm(state: State, key: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{key}.weight"] + state[f"{key}.bias"]


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """Heads one after the other, each 64 wide; `keep` `(B, M)` are the keys that exist."""
    outputs = []
    for start in range(0, q.shape[-1], 64):
        part = slice(start, start + 64)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / 8
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None], -math.inf)
        outputs.append(scores.softmax(-1) @ v[..., part])
    return torch.cat(outputs, -1)


def diffuse(state: State, key: str, x: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
    """APT at one attention, where the checkpoint has it: `exp(s) (x + max(A) A P)`, `A = relu(res (P + P DᵀUᵀ)ᵀ)`."""
    if f"{key}.mm_tokens" not in state:
        return x
    prompts = state[f"{key}.mm_tokens"]
    keys = prompts + (prompts @ state[f"{key}.mm.0.weight"].T) @ state[f"{key}.mm.1.weight"].T
    affinity = (res @ keys.T).clamp(min=0)
    return (x + affinity.max(-1, keepdim=True)[0] * (affinity @ prompts)) * state[f"{key}.scale"].exp()


def patches_of(pixels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A convolution whose stride is its size: each patch times the flat kernel."""
    batch, _, height, width = pixels.shape
    cut = pixels.reshape(batch, 3, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(batch, -1, 3 * PATCH * PATCH) @ weight.reshape(len(weight), -1).T


def bert_attention(state: State, key: str, x: torch.Tensor, context: torch.Tensor, keep, eps: float) -> torch.Tensor:
    q = linear(state, f"{key}.self.query", x)
    k, v = (linear(state, f"{key}.self.{name}", context) for name in ("key", "value"))
    out = linear(state, f"{key}.output.dense", attend(q, k, v, keep))
    return norm(state, f"{key}.output.LayerNorm", diffuse(state, f"{key}.output.APT", out, x) + x, eps)


def bert_feed_forward(state: State, key: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    hidden = gelu(linear(state, f"{key}.intermediate.dense", x))
    return norm(state, f"{key}.output.LayerNorm", linear(state, f"{key}.output.dense", hidden) + x, eps)


def meter_features(state: State, ids, mask, pixels, kind: int = 1) -> torch.Tensor:
    """`cls_feats` (B, 2 D) of METER; RoBERTa's padding is token 1."""
    state = {key: tensor.double() for key, tensor in state.items()}
    visual, keep = "vit_model.visual", mask.bool()
    image = patches_of(pixels.double(), state[f"{visual}.conv1.weight"])
    token = state[f"{visual}.class_embedding"].expand(len(image), 1, -1)
    image = torch.cat([token, image], 1) + state[f"{visual}.positional_embedding"]
    image = norm(state, f"{visual}.ln_pre", image, 1e-5)
    for layer in range(LAYERS):
        block = f"{visual}.transformer.resblocks.{layer}"
        x = norm(state, f"{block}.ln_1", image, 1e-5)
        weight, bias = state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"]
        q, k, v = (x @ weight[i * D : (i + 1) * D].T + bias[i * D : (i + 1) * D] for i in range(3))
        image = image + linear(state, f"{block}.attn.out_proj", attend(q, k, v, None))
        hidden = linear(state, f"{block}.mlp.c_fc", norm(state, f"{block}.ln_2", image, 1e-5))
        image = image + linear(state, f"{block}.mlp.c_proj", hidden * torch.sigmoid(1.702 * hidden))
    image = norm(state, f"{visual}.ln_post", image, 1e-5)

    words = "text_transformer.embeddings"
    positions = torch.where(ids != 1, (ids != 1).cumsum(1) + 1, 1)
    text = state[f"{words}.word_embeddings.weight"][ids] + state[f"{words}.position_embeddings.weight"][positions]
    text = norm(state, f"{words}.LayerNorm", text + state[f"{words}.token_type_embeddings.weight"][0], 1e-5)
    for layer in range(LAYERS):
        block = f"text_transformer.encoder.layer.{layer}"
        text = bert_attention(state, f"{block}.attention", text, text, keep, 1e-5)
        text = bert_feed_forward(state, block, text, 1e-5)

    text = linear(state, "cross_modal_text_transform", text)
    image = linear(state, "cross_modal_image_transform", image)
    if "token4classifier" in state:
        text = torch.cat([state["token4classifier"].expand(len(text), 1, -1), text[:, 1:]], 1)
    text = text + state["token_type_embeddings.weight"][0]
    image = image + state["token_type_embeddings.weight"][kind]
    for layer in range(LAYERS):
        stepped = []
        for tower, x, y, keep_x, keep_y in (("text", text, image, keep, None), ("image", image, text, None, keep)):
            block = f"cross_modal_{tower}_layers.{layer}"
            x = bert_attention(state, f"{block}.attention", x, x, keep_x, 1e-12)
            x = bert_attention(state, f"{block}.crossattention", x, y, keep_y, 1e-12)
            stepped.append(bert_feed_forward(state, block, x, 1e-12))
        text, image = stepped
    pooled = [linear(state, f"cross_modal_{t}_pooler.dense", x[:, 0]) for t, x in (("text", text), ("image", image))]
    return torch.cat(pooled, -1).tanh()


def vilt_features(state: State, ids, mask, pixels, kind: int = 1) -> torch.Tensor:
    """`cls_feats` (B, D) of ViLT for pictures of the table's own size, all of whose patches take part."""
    state = {key: tensor.double() for key, tensor in state.items()}
    words = "text_embeddings"
    text = state[f"{words}.word_embeddings.weight"][ids] + state[f"{words}.token_type_embeddings.weight"][0]
    text = text + state[f"{words}.position_embeddings.weight"][: ids.shape[1]]
    text = norm(state, f"{words}.LayerNorm", text, 1e-12)
    if "token4classifier" in state:
        text = torch.cat([state["token4classifier"].expand(len(text), 1, -1), text[:, 1:]], 1)
    image = patches_of(pixels.double(), state["transformer.patch_embed.proj.weight"])
    image = image + state["transformer.patch_embed.proj.bias"]
    image = torch.cat([state["transformer.cls_token"].expand(len(image), 1, -1), image], 1)
    image = image + state["transformer.pos_embed"] + state["token_type_embeddings.weight"][kind]
    x = torch.cat([text + state["token_type_embeddings.weight"][0], image], 1)
    keep = torch.cat([mask.bool(), torch.ones(image.shape[:2], dtype=torch.bool)], 1)
    for layer in range(LAYERS):
        block = f"transformer.blocks.{layer}"
        normed = norm(state, f"{block}.norm1", x, 1e-6)
        q, k, v = linear(state, f"{block}.attn.qkv", normed).chunk(3, -1)
        out = linear(state, f"{block}.attn.proj", attend(q, k, v, keep))
        x = x + diffuse(state, f"{block}.attn.APT", out, normed)
        hidden = gelu(linear(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x, 1e-6)))
        x = x + linear(state, f"{block}.mlp.fc2", hidden)
    x = norm(state, "transformer.norm", x, 1e-6)
    return linear(state, "pooler.dense", x[:, 0]).tanh()


def classify(state: State, key: str, features: torch.Tensor) -> torch.Tensor:
    state = {name: tensor.double() for name, tensor in state.items() if name.startswith(key)}
    hidden = gelu(norm(state, f"{key}.1", linear(state, f"{key}.0", features), 1e-5))
    return linear(state, f"{key}.3", hidden)


def resize_table(table: torch.Tensor, grid: int) -> torch.Tensor:
    """Bicubic (Keys' kernel, a = -0.75) along rows, then columns; the first row is the class token's."""
    before = math.isqrt(len(table) - 1)
    weights = torch.zeros(grid, before, dtype=torch.float64)
    for out in range(grid):
        centre = (out + 0.5) * before / grid - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            t = abs(centre - tap)
            value = (1.25 * t - 2.25) * t * t + 1 if t <= 1 else -0.75 * (((t - 5) * t + 8) * t - 4)
            weights[out, min(max(tap, 0), before - 1)] += value
    patches = table[1:].double().reshape(before, before, -1)
    resized = torch.einsum("ai,bj,ijd->abd", weights, weights, patches)
    return torch.cat([table[:1].double(), resized.reshape(grid * grid, -1)])


def inputs(images: int = 1, size: int = PATCH * GRID, pad: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(ids, mask, pixels)`; the second text is shorter."""
    ids = torch.tensor([[0, 5, 6, 7, 2], [0, 9, 2, pad, pad]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    pixels = torch.randn(2, images, 3, size, size, generator=torch.Generator().manual_seed(5))
    return ids, mask, pixels if images > 1 else pixels[:, 0]
