"""Small text encoders with random weights, in the layout of published ones."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from tests.published import LETTERS, clip, t5


def write_bert(folder: Path, kind: type = transformers.BertModel) -> Path:
    """Write a BERT that reads letters, and its tokenizer."""
    folder.mkdir(parents=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"), model_max_length=32)
    config = transformers.BertConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    torch.manual_seed(3)
    network = kind(config)
    for value in network.parameters():
        torch.nn.init.normal_(value, std=0.3)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_sentence_encoder(folder: Path, **modes: bool) -> Path:
    """Write a BERT with the files that say how a sentence is embedded."""
    write_bert(folder)
    modules = [
        {"type": f"sentence_transformers.models.{name}"}
        for name in ("Transformer", "Pooling", "Normalize")
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, **(modes or {"pooling_mode_mean_tokens": True})}
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24}))
    return folder


def write_clip(folder: Path, kind: type = transformers.CLIPTextModelWithProjection) -> Path:
    """Write a CLIP text encoder as a part of a pipeline: its tokenizer is beside it."""
    (folder.parent / "tokenizer").mkdir(parents=True)
    tokenizer, encoder = clip(folder.parent / "tokenizer", 0, kind)
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder.parent / "tokenizer")
    return folder


def write_whole_clip(folder: Path) -> Path:
    """Write a CLIP with its vision tower, and its tokenizer in the same folder."""
    folder.mkdir(parents=True)
    tokenizer, encoder = clip(folder, 0)
    vision = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=encoder.config.to_dict(), vision_config={**vision, **layers}, projection_dim=8
    )
    torch.manual_seed(4)
    network = transformers.CLIPModel(config)
    for value in network.parameters():
        torch.nn.init.normal_(value, std=0.3)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_t5(folder: Path) -> Path:
    """Write T5's encoder, with its tokenizer in a folder inside."""
    tokenizer, encoder = t5(16)
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def write_whole_t5(folder: Path) -> Path:
    """Write a T5 with its decoder."""
    tokenizer, encoder = t5(16)
    torch.manual_seed(5)
    transformers.T5ForConditionalGeneration(encoder.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "bert": write_bert,
    "masked bert": lambda folder: write_bert(folder, transformers.BertForMaskedLM),
    "sentences": write_sentence_encoder,
    "clip": lambda folder: write_clip(folder / "text_encoder", transformers.CLIPTextModel),
    "projected clip": lambda folder: write_clip(folder / "text_encoder"),
    "whole clip": write_whole_clip,
    "t5": write_t5,
    "whole t5": write_whole_t5,
}
