"""Folders of pipelines that are told texts: what is read of them, and what is refused, in one line."""

import json
import shutil
import sys

import pytest
import torch

from deploy.cli import main
from models import pipeline, teacher
from models.nets.pretrained import Pretrained
from models.text import Prompts
from tests.conftest import REPOSITORY
from tests.deploy.text.conftest import TEXTS
from trainer.module import Generator

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'rectify[text]'")

from tests import published  # noqa: E402  (it needs transformers)


def test_what_does_not_fit_is_one_line(folder, prompts, pairs, workspace, tmp_path, capfd):
    def refused(said, *words):
        assert main(list(map(str, words))) == 2
        lines = capfd.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("rectify: error: ") and said in lines[-1] and "Traceback" not in "".join(lines)

    collect = ("collect", "--out", tmp_path / "x", "--pairs", "8", "--steps", "1", "--teacher")
    refused("is told texts; give them", *collect, folder)
    refused("is told no texts; leave them out", *collect, workspace.path / "runs/demo/teacher", "--prompts", prompts)
    for name, text, said in (("none.txt", b"", "holds no prompt"), ("latin.txt", b"\xe9\n", "not UTF-8")):
        (tmp_path / name).write_bytes(text)
        refused(said, *collect, folder, "--prompts", tmp_path / name)
    refused("No such file", *collect, folder, "--prompts", tmp_path / "missing.txt")
    shutil.copytree(folder, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare/tokenizer")
    refused("no tokenizer in it", *collect, tmp_path / "bare", "--prompts", prompts)
    for file in [*(shutil.copytree(folder, tmp_path / "wordless") / "tokenizer").iterdir()]:
        _ = file.unlink() if file.name != "tokenizer_config.json" else None
    refused("wordless/tokenizer: has no vocabulary", *collect, tmp_path / "wordless", "--prompts", prompts)
    index = shutil.copytree(folder, tmp_path / "custom") / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": ["pipeline", "Mine"]}))
    refused("custom: is a ['pipeline', 'Mine'] of", *collect, tmp_path / "custom", "--prompts", prompts)
    network = pipeline.components(folder)[0]
    kind = teacher.load(folder)[0].net.kind
    for place, said, change in (
        ("text_encoder", "its text_encoder", {"vocab_size": 7}),
        (network.name, f"not a readable {kind}", {"cross_attention_dim": 8, "joint_attention_dim": 8}),
    ):
        shutil.copytree(folder, tmp_path / place)
        file = tmp_path / place / place / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        refused(said, *collect, tmp_path / place, "--prompts", prompts)
    if (folder / "text_encoder_2").is_dir():  # what it says of a whole text is of another width
        two = transformers.CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
        other = transformers.CLIPTextModelWithProjection(type(two.config)(**{**two.config.to_dict(), "projection_dim": 5}))
        other.save_pretrained(shutil.copytree(folder, tmp_path / "narrow") / "text_encoder_2")
        refused("its whole texts have", *collect, tmp_path / "narrow", "--prompts", prompts)
    if (folder / "text_encoder_3").is_dir():
        index = shutil.copytree(folder, tmp_path / "two") / "model_index.json"
        absent = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
        index.write_text(json.dumps({**json.loads(index.read_text()), **absent}))
        refused("has no text_encoder_3", *collect, tmp_path / "two", "--prompts", prompts)
    if kind == "UNet2DConditionModel":
        file = shutil.copytree(folder, tmp_path / "longer") / "tokenizer/tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 13}))
        refused("its text encoders do not fit", *collect, tmp_path / "longer", "--prompts", prompts)
    (tmp_path / "other.txt").write_text("a dog\n")
    fit = ("fit", "--config", REPOSITORY / "configs/text/student.yaml", "--out", tmp_path / "run", "--trainer.logger", "false")
    fit += ("--model.denoiser.folder", folder, "--model.initial", folder, "--model.codec", folder / "vae", "--data.batch", "8")
    fit += ("--model.condition.encoder", folder, "--data.source.path", pairs, "--trainer.accelerator", "cpu")
    refused("collected with prompts", *fit, "--model.condition.path", tmp_path / "other.txt")
    refused(f"the network reads {teacher.load(folder)[0].net.tokens}", *fit, "--model.condition", "Unconditional")


def test_networks_that_are_told_more_are_refused(folder, tmp_path):
    net = published.unet(addition_embed_type="text", addition_embed_type_num_heads=2)
    net.save_pretrained(tmp_path / "more")
    with pytest.raises(ValueError, match="its addition_embed_type is text, Pretrained knows text_time"):
        Pretrained(str(tmp_path / "more"), tokens=12)
    published.unet(num_class_embeds=3).save_pretrained(tmp_path / "classes")
    with pytest.raises(ValueError, match="told more than a text"):
        Pretrained(str(tmp_path / "classes"), tokens=12)
    with pytest.raises(ValueError, match="tokens is 0"):
        Pretrained(str(pipeline.components(folder)[0]))
    denoiser = teacher.load(folder)[0]
    shutil.copytree(folder, tmp_path / "other")
    encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    torch.nn.init.normal_(encoder.get_input_embeddings().weight)
    encoder.save_pretrained(tmp_path / "other/text_encoder")
    Generator(denoiser, condition=Prompts(str(folder)))
    if not Prompts(str(folder)).zeros:  # else no text is encoded alike by all
        with pytest.raises(ValueError, match="has not the text encoder"):
            Generator(denoiser, condition=Prompts(str(tmp_path / "other")))


def test_a_teacher_is_the_same_whatever_machine_encoded_its_texts(folder):
    denoiser = teacher.load(folder)[0]
    before = teacher.fingerprint(denoiser)
    denoiser.net.nothing.add_(1e-6)
    assert teacher.fingerprint(denoiser) == before
    next(denoiser.parameters()).data.add_(1e-6)
    assert teacher.fingerprint(denoiser) != before


def test_blocks_are_computed_again(folder):
    """With `model.recompute` the gradients are the same, of activations that were not kept."""
    denoisers = [teacher.load(folder)[0].requires_grad_(True) for _ in range(2)]
    x_t, t, kept = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), []
    for denoiser, recompute in zip(denoisers, (False, True)):
        Generator(denoiser, condition=Prompts(str(folder)), recompute=recompute).configure_model()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept[-1].append(x.numel()) or x, lambda x: x):
            kept.append([])
            loss = sum(part.square().mean() for part in denoiser(x_t, t))
        loss.backward()
    one, two = ([value.grad for value in denoiser.parameters() if value.grad is not None] for denoiser in denoisers)
    assert len(one) == len(two) > 10 and sum(kept[1]) < 0.7 * sum(kept[0])
    for a, b in zip(one, two):
        torch.testing.assert_close(a, b)


def test_a_network_is_told_the_size_of_its_images_where_it_reads_it(tmp_path):
    """As PixArt's of 1024 x 1024 are: the pipeline's own call, which gives sizes to no smaller network."""
    published.pixart(use_additional_conditions=True).save_pretrained(tmp_path)
    net, (x_t, clock) = Pretrained(str(tmp_path), tokens=6, pixels=1024), (torch.randn(2, 4, 8, 8), torch.tensor([900, 1]))
    states, mask = torch.randn(2, 6, 32), torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6])
    sizes = {"resolution": torch.tensor([[1024.0, 1024.0]] * 2), "aspect_ratio": torch.ones(2, 1)}
    asked = {"encoder_hidden_states": states, "encoder_attention_mask": mask, "timestep": clock, "added_cond_kwargs": sizes}
    with torch.no_grad():
        told = net(x_t, clock, torch.cat([states, mask[..., None]], -1))
        torch.testing.assert_close(told, net.model(x_t, **asked).sample[:, :4])
        states[0, 3] += 1  # pads, and is not read
        torch.testing.assert_close(told, net(x_t, clock, torch.cat([states, mask[..., None]], -1)))


def test_a_tokenizer_of_sentencepiece_is_read(tmp_path, monkeypatch):
    """As PixArt's folders have it: a model file, and nothing that tokenizers reads."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece: pip install 'rectify[text]'")
    with (tmp_path / "model").open("wb") as file:
        pieces = {"vocab_size": 30, "hard_vocab_limit": False, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS * 50), model_writer=file, **pieces)
    published.pipeline("pixart", tmp_path).save_pretrained(tmp_path / "teacher")
    place = tmp_path / "teacher/tokenizer"
    shutil.rmtree(place)
    place.mkdir()
    (tmp_path / "model").rename(place / "spiece.model")
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    told = Prompts(str(tmp_path / "teacher")).encode(["a red dog", "a cat"], torch.device("cpu"))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(place / "spiece.model"))
    assert told[..., -1].sum(1).tolist() == [1 + len(pieces.encode(text)) for text in ("a red dog", "a cat")]
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"a tokenizer of sentencepiece; pip install 'rectify\[text\]'"):
        Prompts(str(shutil.copytree(tmp_path / "teacher", tmp_path / "again"))).encode(["a cat"], torch.device("cpu"))


def test_files_that_other_programs_wrote_mean_what_they_mean_there(folder, tmp_path):
    """A byte order mark is no part of a prompt; an index that does not state the negative has diffusers' default."""
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa dog\r\na\xe2\x80\xa8cat")
    assert Prompts(str(folder), str(tmp_path / "prompts.txt")).lines == ["a dog", "a\u2028cat"]
    shutil.copytree(folder, tmp_path / "older")
    told = json.loads((folder / "model_index.json").read_text())
    index = {key: value for key, value in told.items() if key != "force_zeros_for_empty_prompt"}
    (tmp_path / "older/model_index.json").write_text(json.dumps(index))
    found = [Prompts(str(place)).empty for place in (folder, tmp_path / "older")]
    assert torch.equal(*found)
