"""ViLT, METER and CLIP behind their embeddings, with each of the compared methods, written out in numpy.

Weights are read by name, each method is taken from its definition; no model's or method's code is called. One sample
at a time, float64: N tokens, M keys, d width. `real` is false for padding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CHILD = "compared_method"  # what a module calls what a method adds to it
HEADS = 4


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def quick_gelu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-1.702 * x))


@dataclass
class PreNorm:
    """What the parts of a ViLT or CLIP layer are called."""

    layers: str
    attention: str
    maps: tuple[str, str, str, str]  # query, key, value, output
    norms: tuple[str, str]
    feed_forward: tuple[str, str]
    eps: float
    activation: Callable[[np.ndarray], np.ndarray]


VILT = PreNorm(
    "layer", "attention", ("attention.query", "attention.key", "attention.value", "output.dense"),
    ("layernorm_before", "layernorm_after"), ("intermediate.dense", "output.dense"), 1e-12, gelu,
)  # fmt: skip
CLIP = PreNorm(
    "layers", "self_attn", ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("layer_norm1", "layer_norm2"), ("mlp.fc1", "mlp.fc2"), 1e-5, quick_gelu,
)  # fmt: skip


@dataclass
class Reference:
    """Weights by name, and the method that they hold."""

    weights: dict[str, np.ndarray]
    method: str

    # Models

    def vilt(self, states: np.ndarray, real: np.ndarray) -> list[np.ndarray]:
        return [self.norm("layernorm", self.pre_norm_encoder("encoder", VILT, 2, states, real), 1e-12)]

    def clip(self, words: np.ndarray, image: np.ndarray, real: np.ndarray) -> list[np.ndarray]:
        text = self.pre_norm_encoder("text_model.encoder", CLIP, 3, words, real, causal=True)
        all_real = np.ones(len(image), bool)
        return [
            self.norm("text_model.final_layer_norm", text, 1e-5),
            self.pre_norm_encoder("vision_model.encoder", CLIP, 2, image, all_real),
        ]

    def meter(self, text: np.ndarray, image: np.ndarray, real: np.ndarray) -> list[np.ndarray]:
        """Two stacks, each of which reads the other's states from before the step."""
        seen, all_seen, words, patches = real, np.ones(len(image), bool), len(text), len(image)
        if self.method == "shallow_prompt":  # tokens of either stack; their place is nothing to attention
            text, seen = self.join(text, self.weights[f"{CHILD}.text_prompts"]), self.open(seen)
            image, all_seen = self.join(image, self.weights[f"{CHILD}.image_prompts"]), self.open(all_seen)
        for index in range(2):
            text, image = (
                self.meter_layer(f"cross_modal_text_layers.{index}", text, image, seen, all_seen),
                self.meter_layer(f"cross_modal_image_layers.{index}", image, text, all_seen, seen),
            )
        return [np.concatenate([text[-words:], image[-patches:]])]

    # Layers

    def pre_norm_encoder(
        self, encoder: str, names: PreNorm, depth: int, x: np.ndarray, real: np.ndarray, causal: bool = False
    ) -> np.ndarray:
        """Shallow prompts are tokens before all others, dropped at the end."""
        count = len(x)
        if self.method == "shallow_prompt":
            x, real = self.join(x, self.weights[f"{encoder}.{CHILD}.prompts"]), self.open(real)
        seen = np.ones((len(x), len(x)), bool) & real
        for index in range(depth):
            layer = f"{encoder}.{names.layers}.{index}"
            x = self.pre_norm_layer(layer, names, x, np.tril(seen) if causal else seen)
        return x[-count:]

    def pre_norm_layer(self, layer: str, names: PreNorm, x: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Deep prompts are keys and values that every token sees, behind the norm that the tokens go through."""
        attention, (before, after), (up, down) = f"{layer}.{names.attention}", names.norms, names.feed_forward
        normed = context = self.norm(f"{layer}.{before}", x, names.eps)
        if self.method == "deep_prompt":
            prompts = self.weights[f"{attention}.{CHILD}.prompts"]
            context, seen = self.join(normed, self.norm(f"{layer}.{before}", prompts, names.eps)), self.open(seen)
        x = x + self.attend(attention, names.maps, normed, context, seen) + self.parallel(attention, normed)
        fed = names.activation(self.linear(f"{layer}.{up}", self.norm(f"{layer}.{after}", x, names.eps)))
        return x + self.branch_output(f"{layer}.{down}", fed)

    def meter_layer(
        self, layer: str, x: np.ndarray, context: np.ndarray, seen: np.ndarray, context_seen: np.ndarray
    ) -> np.ndarray:
        """Deep prompts join the other stack's states alone; parallel adapters come in behind the norms."""
        own, cross, maps = f"{layer}.attention", f"{layer}.crossattention", ("query", "key", "value", "dense")
        if self.method == "deep_prompt":
            context = self.join(context, self.weights[f"{cross}.{CHILD}.prompts"])
            context_seen = self.open(context_seen)
        attended = self.attend(own, maps, x, x, seen)
        x = self.norm(f"{layer}.attention_layer_norm", attended + x, 1e-12) + self.parallel(own, x)
        attended = self.attend(cross, maps, x, context, context_seen)
        x = self.norm(f"{layer}.crossattention_layer_norm", attended + x, 1e-12) + self.parallel(cross, x)
        fed = self.branch_output(f"{layer}.output", gelu(self.linear(f"{layer}.intermediate", x)))
        return self.norm(f"{layer}.output_layer_norm", fed + x, 1e-12)

    def attend(
        self, place: str, maps: tuple[str, ...], x: np.ndarray, context: np.ndarray, seen: np.ndarray
    ) -> np.ndarray:
        """`(N, d)` attends to `context` (M, d) where `seen`, (N, M) or (M,)."""
        query, key, value, dense = (f"{place}.{name}" for name in maps)
        query, key, value = self.with_lora(query, x), self.linear(key, context), self.with_lora(value, context)
        width = x.shape[-1] // HEADS
        parts = []
        for head in range(HEADS):
            q, k, v = (states[:, head * width : (head + 1) * width] for states in (query, key, value))
            scores = np.where(seen, q @ k.T / math.sqrt(width), -np.inf)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            parts.append(scores / scores.sum(-1, keepdims=True) @ v)
        return self.branch_output(dense, np.concatenate(parts, -1))

    # Maps

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: np.ndarray, eps: float) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def with_lora(self, name: str, x: np.ndarray) -> np.ndarray:
        """`W x + B A x` of the query and the value map."""
        if self.method != "lora":
            return self.linear(name, x)
        a, b = (self.weights[f"{name}.lora_{matrix}.default.weight"] for matrix in "AB")
        return self.linear(f"{name}.base_layer", x) + x @ a.T @ b.T

    def branch_output(self, name: str, x: np.ndarray) -> np.ndarray:
        """A branch's last map; an adapter is `z + W_up relu(W_down z)` of what that gives."""
        z = self.linear(name, x)
        return z + self.bottleneck(f"{name}.{CHILD}", z) if self.method == "adapter" else z

    def parallel(self, place: str, x: np.ndarray) -> np.ndarray | float:
        """A scaled parallel adapter is `4 W_up relu(W_down LN(x))` of a branch's input."""
        if self.method != "scaled_pa":
            return 0.0
        return 4 * self.bottleneck(f"{place}.{CHILD}", self.norm(f"{place}.{CHILD}.norm", x, 1e-5))

    def bottleneck(self, place: str, x: np.ndarray) -> np.ndarray:
        return self.linear(f"{place}.up", np.maximum(self.linear(f"{place}.down", x), 0))

    # Prompts

    def join(self, tokens: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        return np.concatenate([prompts, tokens])

    def open(self, seen: np.ndarray) -> np.ndarray:
        """Prompts are seen by all; how many there are is known from any of them."""
        count = next(len(value) for name, value in self.weights.items() if name.endswith("prompts"))
        return np.pad(seen, [(0, 0)] * (seen.ndim - 1) + [(count, 0)], constant_values=True)
