"""Small text-to-image pipelines in the layout of published ones, with random weights.

Their latents are 4 x 8 x 8, except Flux's.
"""

import json
from pathlib import Path

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
from safetensors.torch import load_file, save_file

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def amplify_text(net, *names):
    """Draw new weights for the named parameters, so that the text changes the output; return net.

    In a freshly initialised network the text hardly changes it.
    """
    for name, value in net.named_parameters():
        if any(part in name for part in names):
            torch.nn.init.normal_(value)
    return net


def unet(**changes):
    """Return the denoising network of Stable Diffusion."""
    arguments = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "sample_size": 8,
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
    }
    torch.manual_seed(0)
    return amplify_text(UNet2DConditionModel(**{**arguments, **changes}), "attn2.to_out.0.weight")


def clip(path, seed, kind=transformers.CLIPTextModelWithProjection):
    """Return a tokenizer of letters, at most twelve tokens long, and a text encoder."""
    # The tokenizer reads its vocabulary from files.
    endings = [letter + "</w>" for letter in LETTERS]
    tokens = [*LETTERS, *endings, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = path / "vocab.json"
    merges = path / "merges.txt"
    vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    merges.write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(vocabulary), str(merges), model_max_length=12)
    # The encoder's weights are larger than usual, so that texts differ much.
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens),
        max_position_embeddings=12,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=8,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
    )
    torch.manual_seed(seed)
    encoder = kind(config)
    for value in encoder.parameters():
        torch.nn.init.normal_(value, std=0.3)
    return tokenizer, encoder


def t5(width):
    """Return a tokenizer of letters and a text encoder of an embedding width."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(letter, -2.0) for letter in LETTERS]
    tokens = [*special, ("\u2581", -1.0), *letters]
    tokenizer = transformers.T5Tokenizer(vocab=tokens, extra_ids=0)
    config = transformers.T5Config(
        vocab_size=len(tokens),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
    )
    torch.manual_seed(2)
    return tokenizer, transformers.T5EncoderModel(config)


def pixart(**changes):
    """Return the denoising network of PixArt."""
    arguments = {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 8,
        "caption_channels": 32,
    }
    torch.manual_seed(0)
    net = PixArtTransformer2DModel(**{**arguments, **changes})
    return amplify_text(net, "attn2.to_out.0.weight", "scale_shift_table", "proj_out.weight")


def small_vae(**changes):
    """Return the codec that every pipeline has."""
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        **changes,
    )


def pndm() -> PNDMScheduler:
    """Return the scheduler of Stable Diffusion."""
    return PNDMScheduler(skip_prk_steps=True, steps_offset=1, **BETAS)


def pixart_pipeline(path) -> DiffusionPipeline:
    vae = small_vae()
    tokenizer, encoder = t5(32)
    return PixArtAlphaPipeline(tokenizer, encoder, vae, pixart(), DPMSolverMultistepScheduler())


def sd_pipeline(path) -> DiffusionPipeline:
    vae = small_vae()
    tokenizer, encoder = clip(path, 0, transformers.CLIPTextModel)
    return StableDiffusionPipeline(
        vae, encoder, tokenizer, unet(), pndm(), None, None, requires_safety_checker=False
    )


def sdxl_pipeline(path) -> DiffusionPipeline:
    vae = small_vae()
    tokenizer, encoder = clip(path, 0, transformers.CLIPTextModel)
    tokenizer_2, encoder_2 = clip(path, 1)
    net = unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )
    return StableDiffusionXLPipeline(
        vae, encoder, encoder_2, tokenizer, tokenizer_2, net, pndm(), add_watermarker=False
    )


def sd3_pipeline(path) -> DiffusionPipeline:
    vae = small_vae(shift_factor=0.1)
    torch.manual_seed(0)
    net = SD3Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        sample_size=8,
        patch_size=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
    )
    net = amplify_text(net, "norm1", "norm_out")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    tokenizer, encoder = clip(path, 0)
    tokenizer_2, encoder_2 = clip(path, 1)
    tokenizer_3, encoder_3 = t5(32)
    return StableDiffusion3Pipeline(
        net,
        scheduler,
        vae,
        encoder,
        tokenizer,
        encoder_2,
        tokenizer_2,
        encoder_3,
        tokenizer_3,
    )


def flux_pipeline(path) -> DiffusionPipeline:
    """Return a Flux pipeline, whose states are 4 x 128 x 128."""
    vae = small_vae(shift_factor=0.1)
    tokenizer, encoder = clip(path, 0, transformers.CLIPTextModel)
    tokenizer_2, encoder_2 = t5(32)
    torch.manual_seed(0)
    net = FluxTransformer2DModel(
        patch_size=1,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=16,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    net = amplify_text(net, "norm1", "norm_out", "time_text_embed")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return FluxPipeline(scheduler, vae, encoder, tokenizer, encoder_2, tokenizer_2, net)


PIPELINES = {
    "sd": sd_pipeline,
    "sdxl": sdxl_pipeline,
    "sd3": sd3_pipeline,
    "flux": flux_pipeline,
    "pixart": pixart_pipeline,
}


def pipeline(kind, path) -> DiffusionPipeline:
    """Return a pipeline of a kind: sd, sdxl, sd3, flux or pixart.

    Args:
        kind: which one.
        path: a folder for the tokenizers' files.
    """
    return PIPELINES[kind](path)


def rewrite_for_transformers_4(folder: Path) -> None:
    """Give a pipeline's folder the layout of transformers 4, in which most pipelines are published.

    Its names of CLIP's weights begin with `text_model.`, and CLIP's tokenizer has two files.
    """
    index = json.loads((folder / "model_index.json").read_text())
    parts = {name: part for name, part in index.items() if isinstance(part, list)}
    for name, (_, kind) in parts.items():
        part = folder / name
        if kind == "CLIPTextModel":
            weights = load_file(part / "model.safetensors")
            named = {f"text_model.{key}": value for key, value in weights.items()}
            save_file(named, part / "model.safetensors", {"format": "pt"})
        elif kind == "CLIPTokenizer":
            model = json.loads((part / "tokenizer.json").read_text())["model"]
            (part / "vocab.json").write_text(json.dumps(model["vocab"]))
            (part / "merges.txt").write_text("#version: 0.2\n")
            (part / "tokenizer.json").unlink()
        elif kind == "T5Tokenizer":
            index[name][1] = "T5TokenizerFast"
            config = json.loads((part / "tokenizer_config.json").read_text())
            config.pop("extra_special_tokens")  # a list, which version 4 does not read
            (part / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
