"""Our DiT as diffusers' DiTTransformer2DModel: the same function."""

from typing import TYPE_CHECKING

from torch import Tensor

from models.nets.dit import DiT

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel  # slow to import

NO_CLASS = 1000  # DiTPipeline's label for "no class"


def to_diffusers_dit(net: DiT) -> "DiTTransformer2DModel":
    """Return our DiT as diffusers' class, with one embedder per block and 1,001 labels.

    Raises:
        ValueError: it has more classes than DiTPipeline.
    """
    from diffusers import DiTTransformer2DModel

    if net.classes > NO_CLASS:
        raise ValueError(
            f"export: the network has {net.classes} classes; DiTPipeline has at most {NO_CLASS}"
        )
    transformer = DiTTransformer2DModel(
        num_attention_heads=net.heads,
        attention_head_dim=net.width // net.heads,
        in_channels=net.channels,
        out_channels=net.channels,
        num_layers=net.depth,
        sample_size=net.size,
        patch_size=net.patch,
        num_embeds_ada_norm=NO_CLASS,
        norm_eps=1e-6,
    )
    transformer.load_state_dict(to_diffusers_weights(net))
    return transformer.eval()


def to_diffusers_weights(net: DiT) -> dict[str, Tensor]:
    """Return our DiT's weights by diffusers' names."""
    ours = net.state_dict()
    # Labels: classes without training are "no class".
    labels = ours["y_embedder.weight"]
    table = labels[-1].repeat(NO_CLASS + 1, 1)
    table[: net.classes] = labels[:-1]
    theirs = {}
    layers = {"pos_embed.proj": "embed", "proj_out_1": "modulation", "proj_out_2": "out"}
    for i in range(net.depth):
        block = f"transformer_blocks.{i}"
        our_block = f"blocks.{i}"
        # Every block of theirs has its own embedders.
        embedder = f"{block}.norm1.emb"
        theirs[f"{embedder}.class_embedder.embedding_table.weight"] = table
        layers[f"{embedder}.timestep_embedder.linear_1"] = "t_embedder.0"
        layers[f"{embedder}.timestep_embedder.linear_2"] = "t_embedder.2"
        layers[f"{block}.norm1.linear"] = f"{our_block}.modulation"
        layers[f"{block}.attn1.to_out.0"] = f"{our_block}.attention.out"
        layers[f"{block}.ff.net.0.proj"] = f"{our_block}.fc1"
        layers[f"{block}.ff.net.2"] = f"{our_block}.fc2"
        for kind in ("weight", "bias"):
            q, k, v = ours[f"{our_block}.attention.qkv.{kind}"].chunk(3)
            theirs[f"{block}.attn1.to_q.{kind}"] = q.clone()
            theirs[f"{block}.attn1.to_k.{kind}"] = k.clone()
            theirs[f"{block}.attn1.to_v.{kind}"] = v.clone()
    for name, layer in layers.items():
        theirs[f"{name}.weight"] = ours[f"{layer}.weight"]
        theirs[f"{name}.bias"] = ours[f"{layer}.bias"]
    return theirs
