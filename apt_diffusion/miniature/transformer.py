"""The miniature Stable Diffusion 3: its parts, untrained, and its objective.

The autoencoder and the first text encoder are those of the miniature Stable Diffusion, frozen. The transformer, a
small second CLIP and a T5 that is only an embedding of words are trained. Axes: B batch, T text tokens, C latent
channels, H = W = 16 latent pixels.
"""

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import LATENT_SIZE, MAX_TOKENS, WORDS

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

WIDTHS = (128, 64)  # of the two CLIPs; T5 and joint attention have the sum
T5_TOKENS = 256  # to which the stock pipeline pads T5's input
T5_WORDS = 16  # the longest caption, with its end
SHIFT = 2.0


def make_transformer() -> "SD3Transformer2DModel":
    """Depth equals the number of heads, as in SD3; modulation and output start at zero, as in DiT."""
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        num_attention_heads=5,
        attention_head_dim=32,
        joint_attention_dim=sum(WIDTHS),
        caption_projection_dim=160,
        pooled_projection_dim=sum(WIDTHS),
        pos_embed_max_size=LATENT_SIZE,  # in patches: pictures of up to twice the usual side
        qk_norm="rms_norm",
    )
    modulations = [block.norm1.linear for block in transformer.transformer_blocks]
    modulations += [block.norm1_context.linear for block in transformer.transformer_blocks]
    for linear in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def project_text_encoder(text_encoder: "CLIPTextModel") -> "CLIPTextModelWithProjection":
    """The same encoder as SD3 wants it: with a projection of the pooled state, here the identity."""
    from transformers import CLIPTextModelWithProjection

    config = copy.deepcopy(text_encoder.config)
    config.projection_dim = config.hidden_size
    projected = CLIPTextModelWithProjection(config)
    projected.text_model.load_state_dict(text_encoder.state_dict())
    nn.init.eye_(projected.text_projection.weight)
    return projected.eval().requires_grad_(False)


def make_second_text_encoder(tokenizer: "CLIPTokenizer") -> "CLIPTextModelWithProjection":
    """Smaller than the first; trained together with the transformer."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTHS[1],
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=WIDTHS[1],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def make_t5_tokenizer() -> "T5Tokenizer":
    """Unigram pieces: every word of the world is one, letters spell the rest."""
    from transformers import T5Tokenizer

    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pieces = [(f"▁{word}", -1.0) for word in WORDS] + [(letter, -10.0) for letter in ("▁", *letters)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0), *pieces]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=T5_TOKENS)


def make_t5(tokenizer: "T5Tokenizer") -> "T5EncoderModel":
    """A T5 without layers: normalised embeddings of the words. Padding is zero, and stays so in training."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=sum(WIDTHS),
        d_kv=32,
        d_ff=2 * sum(WIDTHS),
        num_layers=0,
        num_heads=sum(WIDTHS) // 32,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    encoder = T5EncoderModel(config)
    nn.init.normal_(encoder.shared.weight)
    encoder.encoder.embed_tokens.padding_idx = 0  # no gradient for it
    nn.init.zeros_(encoder.shared.weight[0])
    return encoder


def make_flow_scheduler() -> "FlowMatchEulerDiscreteScheduler":
    """Euler steps along straight paths, more of them where much is noise: shape is decided there."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def encode_captions(text_encoders: Sequence[nn.Module], ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
    """As the stock pipeline encodes.

    Args:
        text_encoders: two CLIPs and a T5.
        ids: of the CLIPs `(B, 32)`.
        t5_ids: `(B, T5_WORDS)`, or longer.

    Returns:
        States `(B, 32 + T5_WORDS, 192)` and pooled states `(B, 192)`.
    """
    *clips, t5 = text_encoders
    outputs = [encoder(ids, output_hidden_states=True) for encoder in clips]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
    return torch.cat([states, t5(t5_ids).last_hidden_state], dim=1), pooled


def sample_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels `(B,)`: four fifths logit-normal and the rest uniform, then shifted as the sampler's are."""
    normal = torch.randn(count, generator=generator, device=generator.device).sigmoid()
    uniform, choice = torch.rand(2, count, generator=generator, device=generator.device)
    times = torch.where(choice < 0.8, normal, uniform)
    return SHIFT * times / (1 + (SHIFT - 1) * times)


def sample_repeats(count: int, generator: torch.Generator) -> Tensor:
    """How many paddings follow T5's words `(B,)`: mostly as many as in the stock pipeline, else anything fewer."""
    choice, power = torch.rand(2, count, generator=generator, device=generator.device)
    few = (power * math.log(T5_TOKENS - T5_WORDS + 1)).exp().floor() - 1
    return torch.where(choice < 0.6, float(T5_TOKENS - T5_WORDS), few)


def flow_loss(
    transformer: nn.Module, text_encoders: Sequence[nn.Module], clean: Tensor, ids: Tensor, t5_ids: Tensor,
    noise: Tensor, sigmas: Tensor, repeats: Tensor,
) -> Tensor:  # fmt: skip
    """Mean squared error of the velocity `noise − clean` at `(1 − σ) clean + σ noise`.

    Args:
        transformer: with `CountedJointAttnProcessor` in every attention.
        text_encoders: see `encode_captions`, which also takes `ids` and `t5_ids`.
        clean: scaled latents `(B, C, H, W)`.
        ids: captions for the CLIPs.
        t5_ids: captions for T5.
        noise: as `clean`.
        sigmas: `(B,)` in (0, 1).
        repeats: `(B,)`: a last text token, which is zero as padding is, counts so many times.
    """
    states, pooled = encode_captions(text_encoders, ids, t5_ids)
    states = F.pad(states, (0, 0, 0, 1))  # (B, 49, 192)
    level = sigmas[:, None, None, None]
    prediction = transformer(
        hidden_states=(1 - level) * clean + level * noise,
        timestep=sigmas * 1000,
        encoder_hidden_states=states,
        pooled_projections=pooled,
        joint_attention_kwargs={"attention_mask": repeats.log()},
    ).sample
    return F.mse_loss(prediction.float(), noise - clean)


class CountedJointAttnProcessor:
    """SD3's joint attention in which the last text token stands for several that are equal.

    Text tokens have no positions, so n equal ones stay equal: they are one whose keys have log n added to their
    logits. A batch with 256 paddings costs as much as one with a single one, and gradients are the same.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`attention_mask` is the logarithm of the count, `(B,)`."""
        projections = (
            (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k, hidden_states),
            (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k,
             encoder_hidden_states),
        )  # fmt: skip
        parts = []
        for to_query, to_key, to_value, norm_query, norm_key, states in projections:
            query, key, value = (
                project(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for project in (to_query, to_key, to_value)
            )
            parts.append((norm_query(query), norm_key(key), value))
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(*parts, strict=True))  # (B, heads, N + T, d)
        bias = F.pad(attention_mask[:, None], (key.shape[2] - 1, 0))[:, None, None].to(query.dtype)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
        image, text = output.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)
