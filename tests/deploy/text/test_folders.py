"""Folders of text-to-image pipelines: what is read from them, and what is refused."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint import fingerprint, load_checkpoint
from models.diffusers.networks import Pretrained
from models.diffusers.pipeline import find_components
from models.diffusers.text import Prompts, copy_untrained
from tests.deploy.text.conftest import TEXTS, assert_diffusers_loads_adapters, words_to_pair
from tests.helpers.refusals import assert_refused, refused
from tests.helpers.teachers import edit_json
from tests.helpers.training import fit_words, study_config
from trainer.module import Generator

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'rectify[text]'"
)

from tests import published  # noqa: E402  (it needs transformers)

CPU = torch.device("cpu")


def test_a_text_teacher_without_prompts_is_refused(folder, tmp_path, capfd):
    assert_refused(capfd, words_to_pair(folder, tmp_path / "x"), folder, "--prompts")


def test_prompts_for_a_teacher_without_texts_are_refused(workspace, prompts, tmp_path, capfd):
    digits = workspace.path / "runs/demo/teacher"
    words = words_to_pair(digits, tmp_path / "x", "--prompts", prompts)
    assert_refused(capfd, words, "prompts", digits)


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"", ()), (b"\xe9\n", ("UTF-8",)), (None, ())],
    ids=["empty", "Latin 1", "missing"],
)
def test_a_bad_file_of_prompts_is_refused(folder, tmp_path, capfd, content, named):
    file = tmp_path / "bad.txt"
    if content is not None:
        file.write_bytes(content)
    words = words_to_pair(folder, tmp_path / "x", "--prompts", file)
    assert_refused(capfd, words, "bad.txt", *named)


def remove_tokenizer(bad: Path) -> tuple[str, ...]:
    """Remove the tokenizer; return what the refusal names."""
    shutil.rmtree(bad / "tokenizer")
    return ("bad", "tokenizer")


def remove_vocabulary(bad: Path) -> tuple[str, ...]:
    """Leave only the tokenizer's config; return what the refusal names."""
    for file in [*(bad / "tokenizer").iterdir()]:
        if file.name != "tokenizer_config.json":
            file.unlink()
    return ("bad/tokenizer", "vocab")


def name_custom_class(bad: Path) -> tuple[str, ...]:
    """Make the pipeline one with custom code; return what the refusal names."""
    edit_json(bad / "model_index.json", _class_name=["pipeline", "Mine"])
    return ("bad", "Mine")


def change_vocabulary_size(bad: Path) -> tuple[str, ...]:
    """Give the text encoder another size than its weights; return what the refusal names."""
    edit_json(bad / "text_encoder/config.json", vocab_size=7)
    return ("bad", "text_encoder")


def change_text_width(bad: Path) -> tuple[str, ...]:
    """Give the network another width than its weights; return what the refusal names."""
    network = find_components(bad)[0]
    edit_json(network / "config.json", cross_attention_dim=8, joint_attention_dim=8)
    kind = json.loads((network / "config.json").read_text())["_class_name"]
    return (network.name, kind)


def change_pooled_width(bad: Path) -> tuple[str, ...]:
    """Give the second encoder's pooled text another width; return what the refusal names."""
    if not (bad / "text_encoder_2").is_dir():
        pytest.skip("the pipeline has one text encoder")
    clip = transformers.CLIPTextModelWithProjection
    config = clip.from_pretrained(bad / "text_encoder_2").config.to_dict()
    other = clip(transformers.CLIPTextConfig(**{**config, "projection_dim": 5}))
    other.save_pretrained(bad / "text_encoder_2")
    return ("bad", "pooled", "channels")


def remove_third_text_model(bad: Path) -> tuple[str, ...]:
    """Leave out the third encoder; return what the refusal names."""
    if not (bad / "text_encoder_3").is_dir():
        pytest.skip("the pipeline has no third text encoder")
    absent = [None, None]
    edit_json(bad / "model_index.json", text_encoder_3=absent, tokenizer_3=absent)
    return ("bad", "text_encoder_3")


def lengthen_tokenizer(bad: Path) -> tuple[str, ...]:
    """Make the tokenizer's texts longer than the encoder's; return what the refusal names."""
    if find_components(bad)[0].name != "unet":
        pytest.skip("another kind of tokenizer")
    edit_json(bad / "tokenizer/tokenizer_config.json", model_max_length=13)
    return ("bad", "text encoders", "tokenizers")


@pytest.mark.parametrize(
    "damage",
    [
        remove_tokenizer,
        remove_vocabulary,
        name_custom_class,
        change_vocabulary_size,
        change_text_width,
        change_pooled_width,
        remove_third_text_model,
        lengthen_tokenizer,
    ],
)
def test_a_folder_with_parts_that_do_not_fit_is_refused(folder, prompts, tmp_path, capfd, damage):
    bad = shutil.copytree(folder, tmp_path / "bad")
    named = damage(bad)
    words = words_to_pair(bad, tmp_path / "x", "--prompts", prompts)
    assert_refused(capfd, words, *named)


@pytest.fixture
def student_words(folder, pairs, tmp_path):
    """Return the command that trains a student on the pairs, but for the condition's file."""
    return fit_words(
        study_config("text", "student"),
        tmp_path / "run",
        *("--model.denoiser.folder", folder, "--model.initial", folder),
        *("--model.codec", folder / "vae", "--model.condition.encoder", folder),
        *("--data.source.path", pairs, "--data.batch", "8"),
    )


def test_pairs_of_other_prompts_are_refused(student_words, pairs, tmp_path, capfd):
    (tmp_path / "other.txt").write_text("a dog\n")
    words = (*student_words, "--model.condition.path", tmp_path / "other.txt")
    assert_refused(capfd, words, pairs, "prompts")


def test_a_text_network_without_texts_is_refused(student_words, folder, capfd):
    words = (*student_words, "--model.condition", "Unconditional")
    tokens = load_checkpoint(folder)[0].net.tokens
    assert_refused(capfd, words, "model.condition", f"{tokens} (0", "Prompts")


def test_a_network_that_reads_the_text_otherwise_is_refused(tmp_path):
    net = published.unet(addition_embed_type="text", addition_embed_type_num_heads=2)
    net.save_pretrained(tmp_path)
    with refused(tmp_path, "addition_embed_type", "text", "text_time"):
        Pretrained(str(tmp_path), tokens=12)


def test_a_network_that_reads_texts_and_classes_is_refused(tmp_path):
    published.unet(num_class_embeds=3).save_pretrained(tmp_path)
    with refused(tmp_path, "num_class_embeds", 3):
        Pretrained(str(tmp_path), tokens=12)


def test_a_text_network_needs_the_number_of_tokens(folder):
    network = find_components(folder)[0]
    with refused(network, "tokens", 0):
        Pretrained(str(network))


def test_the_conditions_text_model_must_be_the_networks(folder, tmp_path):
    denoiser = load_checkpoint(folder)[0]
    Generator(denoiser, condition=Prompts(str(folder)))

    other = shutil.copytree(folder, tmp_path / "other")
    kind = json.loads((folder / "model_index.json").read_text())["text_encoder"][1]
    encoder = getattr(transformers, kind).from_pretrained(folder / "text_encoder")
    torch.nn.init.normal_(encoder.get_input_embeddings().weight)
    encoder.save_pretrained(other / "text_encoder")
    if Prompts(str(folder)).zero_if_empty:
        return  # all encoders give zeros for no text, so they cannot be told apart
    with refused("model.condition.encoder", other):
        Generator(denoiser, condition=Prompts(str(other)))


def test_rounding_of_the_empty_text_does_not_change_the_fingerprint(folder):
    """Machines differ in the last bits of the encoded empty text."""
    denoiser = load_checkpoint(folder)[0]
    before = fingerprint(denoiser)
    denoiser.net.empty_text.add_(1e-6)
    assert fingerprint(denoiser) == before


def test_a_changed_weight_changes_the_fingerprint(folder):
    denoiser = load_checkpoint(folder)[0]
    before = fingerprint(denoiser)
    next(denoiser.parameters()).data.add_(1e-6)
    assert fingerprint(denoiser) != before


def gradients_and_memory(folder: Path, recompute: bool, inputs: Any) -> tuple[list[Any], int]:
    """Return the gradients of a training step, and how many numbers it kept for them."""
    denoiser = load_checkpoint(folder)[0].requires_grad_(True)
    prompts = Prompts(str(folder))
    Generator(denoiser, condition=prompts, recompute=recompute).configure_model()
    sizes: list[int] = []

    def count(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        loss = sum(part.square().mean() for part in denoiser(*inputs))
    loss.backward()
    gradients = [value.grad for value in denoiser.parameters() if value.grad is not None]
    return gradients, sum(sizes)


def test_recomputed_blocks_give_the_same_gradients_with_less_memory(folder):
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]))
    expected, kept = gradients_and_memory(folder, False, inputs)
    found, kept_recomputed = gradients_and_memory(folder, True, inputs)
    assert len(expected) == len(found) > 10
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)
    assert kept_recomputed < 0.7 * kept


@pytest.fixture
def sized_pixart(tmp_path):
    """Return a PixArt for 1024 x 1024 pixels, which reads the size of its images."""
    published.pixart(use_additional_conditions=True).save_pretrained(tmp_path)
    return Pretrained(str(tmp_path), tokens=6, pixels=1024)


PIXART_STATES = (torch.randn(2, 4, 8, 8), torch.tensor([900, 1]))
PIXART_TEXTS = torch.randn(2, 6, 32)
PIXART_MASK = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])


def test_pixart_reads_the_size_of_its_images(sized_pixart):
    """The call is the pipeline's own, which gives sizes only to networks of 1024 x 1024."""
    x_t, timestep = PIXART_STATES
    settings = {
        "encoder_hidden_states": PIXART_TEXTS,
        "encoder_attention_mask": PIXART_MASK,
        "timestep": timestep,
        "added_cond_kwargs": {
            "resolution": torch.tensor([[1024.0, 1024.0], [1024.0, 1024.0]]),
            "aspect_ratio": torch.ones(2, 1),
        },
    }
    with torch.no_grad():
        found = sized_pixart(x_t, timestep, torch.cat([PIXART_TEXTS, PIXART_MASK[..., None]], -1))
        expected = sized_pixart.model(x_t, **settings).sample[:, :4]
    torch.testing.assert_close(found, expected)


def test_pixart_does_not_read_padding(sized_pixart):
    changed = PIXART_TEXTS.clone()
    changed[0, 3] += 1
    with torch.no_grad():
        expected, found = (
            sized_pixart(*PIXART_STATES, torch.cat([texts, PIXART_MASK[..., None]], -1))
            for texts in (PIXART_TEXTS, changed)
        )
    torch.testing.assert_close(found, expected)


@pytest.fixture
def sentencepiece_folder(tmp_path):
    """Return a PixArt with a tokenizer of sentencepiece: a model file alone, as it is published."""
    sentencepiece = pytest.importorskip(
        "sentencepiece", reason="needs sentencepiece: pip install 'rectify[text]'"
    )
    settings = {"vocab_size": 30, "hard_vocab_limit": False}
    tokens = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    with (tmp_path / "model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 50), model_writer=file, **settings, **tokens
        )
    folder = tmp_path / "teacher"
    published.pipeline("pixart", tmp_path).save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    (tmp_path / "model").rename(folder / "tokenizer/spiece.model")
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_sentencepiece_tokenizer_is_read(sentencepiece_folder):
    import sentencepiece

    texts = ["a red dog", "a cat"]
    encoded = Prompts(str(sentencepiece_folder)).encode(texts, CPU)
    model = str(sentencepiece_folder / "tokenizer/spiece.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=model)
    lengths = [1 + len(pieces.encode(text)) for text in texts]
    assert encoded[..., -1].sum(1).tolist() == lengths


def test_without_sentencepiece_its_tokenizer_is_refused(sentencepiece_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with refused("tokenizer", "sentencepiece", "pip install 'rectify[text]'"):
        Prompts(str(sentencepiece_folder)).encode(["a cat"], CPU)


@pytest.mark.parametrize("folder", ["sd", "sdxl", "sd3"], indirect=True)
def test_diffusers_loads_adapters_alone(folder, tmp_path):
    pytest.importorskip("peft", reason="needs peft: pip install 'rectify[lora]'")
    assert_diffusers_loads_adapters(folder, tmp_path / "lora")


@pytest.mark.parametrize(
    ("weights", "copied"),
    [
        (("model.safetensors", "model.fp16.safetensors"), {"model.safetensors"}),
        (("model.fp16.safetensors",), {"model.safetensors"}),
        (("model.safetensors", "pytorch_model.bin", "model.onnx"), {"model.safetensors"}),
    ],
    ids=["a variant beside", "a variant alone", "other formats"],
)
def test_only_the_weights_that_are_read_are_copied(tmp_path, weights, copied):
    source = tmp_path / "source"
    (source / "text_encoder").mkdir(parents=True)
    index = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "Clip"]}
    (source / "model_index.json").write_text(json.dumps(index))
    for name in ("config.json", ".cache", *weights):
        (source / "text_encoder" / name).write_text(name)
    assert copy_untrained(source, tmp_path) == {"text_encoder": ["transformers", "Clip"]}
    found = {path.name for path in (tmp_path / "text_encoder").iterdir()}
    assert found == {"config.json", *copied}


def test_a_byte_order_mark_is_no_part_of_a_prompt(folder, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa dog\r\na\xe2\x80\xa8cat")
    assert Prompts(str(folder), str(file)).lines == ["a dog", "a\u2028cat"]


def test_an_index_without_the_negative_has_diffusers_default(folder, tmp_path):
    older = shutil.copytree(folder, tmp_path / "older")
    index = json.loads((older / "model_index.json").read_text())
    index.pop("force_zeros_for_empty_prompt", None)
    (older / "model_index.json").write_text(json.dumps(index))
    assert torch.equal(Prompts(str(folder)).empty, Prompts(str(older)).empty)
