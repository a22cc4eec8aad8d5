"""Pipelines that are told texts as others publish them, small and with random weights: latents of 4 x 8 x 8, but Flux's."""

import json

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def loud(net, *names):
    """Make a network's texts matter: random weights where a new one hardly hears them; return it."""
    for name, value in net.named_parameters():
        if any(part in name for part in names):
            torch.nn.init.normal_(value)
    return net


def unet(**changes):
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
    }
    sizes = {"sample_size": 8, "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 4}
    torch.manual_seed(0)
    return loud(UNet2DConditionModel(**{**blocks, **sizes, **changes}), "attn2.to_out.0.weight")


def clip(path, seed, kind=transformers.CLIPTextModelWithProjection):
    """Return a tokenizer of letters, of twelve tokens, and a text encoder."""
    known = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(known)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"), model_max_length=12)
    ends = {"bos_token_id": len(known) - 2, "eos_token_id": len(known) - 1, "pad_token_id": len(known) - 1}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 8}
    torch.manual_seed(seed)
    encoder = kind(transformers.CLIPTextConfig(vocab_size=len(known), max_position_embeddings=12, **small, **ends))
    for value in encoder.parameters():
        torch.nn.init.normal_(value, std=0.3)  # texts differ much
    return tokenizer, encoder


def t5(width):
    """Return a tokenizer of letters and a text encoder."""
    known = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0), *((letter, -2.0) for letter in LETTERS)]
    sizes = {"vocab_size": len(known), "d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(2)
    return transformers.T5Tokenizer(vocab=known, extra_ids=0), transformers.T5EncoderModel(transformers.T5Config(**sizes))


def pixart(**changes):
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24, "sample_size": 8}
    torch.manual_seed(0)
    net = PixArtTransformer2DModel(in_channels=4, out_channels=8, caption_channels=32, **{**sizes, **changes})
    return loud(net, "attn2.to_out.0.weight", "scale_shift_table", "proj_out.weight")


def pipeline(kind, path) -> DiffusionPipeline:
    """Return a pipeline of a kind: sd, sdxl, sd3, flux or pixart."""
    pair = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    shift = {"shift_factor": 0.1} if kind in ("sd3", "flux") else {}
    torch.manual_seed(1)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.5, **pair, **shift)
    chain = PNDMScheduler(skip_prk_steps=True, steps_offset=1, **BETAS)
    if kind == "pixart":
        words, encoder = t5(32)
        return PixArtAlphaPipeline(words, encoder, vae, pixart(), DPMSolverMultistepScheduler())
    if kind == "sd3":
        small = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "sample_size": 8, "patch_size": 2}
        told = {"joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 16, "pos_embed_max_size": 16}
        torch.manual_seed(0)
        net = loud(SD3Transformer2DModel(in_channels=4, out_channels=4, **small, **told), "norm1", "norm_out")
        (one, first), (two, second), (three, third) = clip(path, 0), clip(path, 1), t5(32)
        flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return StableDiffusion3Pipeline(net, flow, vae, first, one, second, two, third, three)
    one, first = clip(path, 0, transformers.CLIPTextModel)
    if kind == "flux":  # its states are 4 x 128 x 128
        small = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 16}
        told = {"joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (2, 2, 4), "guidance_embeds": True}
        two, second = t5(32)
        torch.manual_seed(0)
        net = loud(FluxTransformer2DModel(patch_size=1, **small, **told), "norm1", "norm_out", "time_text_embed")
        return FluxPipeline(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae, first, one, second, two, net)
    if kind == "sd":
        return StableDiffusionPipeline(vae, first, one, unet(), chain, None, None, requires_safety_checker=False)
    two, second = clip(path, 1)
    told = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}
    return StableDiffusionXLPipeline(
        vae, first, second, one, two, unet(cross_attention_dim=32, **told), chain, add_watermarker=False
    )
