"""What all evaluations of an image set share is made once: the classifier and the floors."""

from concurrent.futures import ThreadPoolExecutor
from shutil import copytree

import torch

from data.images import Images
from models.codec import Identity
from models.tensors import read_safetensors, sort_metadata, to_safetensors
from trainer.jobs import evaluate
from trainer.metrics import classifier


def load_sets(folder):
    return [Images(str(folder / split)) for split in ("train", "heldout")]


def test_evaluations_side_by_side_train_one_classifier(workspace, tmp_path, monkeypatch):
    for split in ("train", "heldout"):
        copytree(workspace.path / "runs/demo/images" / split, tmp_path / split)
    trainings = []
    fit = classifier._fit

    def counted_fit(*arguments):
        trainings.append(1)
        fit(*arguments)

    monkeypatch.setattr(classifier, "TRAINING_STEPS", 3)
    monkeypatch.setattr(classifier, "_fit", counted_fit)

    def load_or_train(_):
        return classifier.load_or_train_classifier(tmp_path, *load_sets(tmp_path))

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(load_or_train, range(3)))

    # One training, one score, and the same weights for all three.
    assert len(trainings) == 1
    assert len({score for _, score in found}) == 1
    first, *others = [model.state_dict() for model, _ in found]
    for other in others:
        for key, value in first.items():
            assert torch.equal(value, other[key])


def test_equal_classifiers_are_equal_files(tmp_path):
    tensors = {"b": torch.ones(3), "a": torch.zeros(2)}
    metadata = dict.fromkeys("fedcba", "é")
    found = {sort_metadata(to_safetensors(tensors, metadata)) for _ in range(5)}
    assert len(found) == 1
    (tmp_path / "file").write_bytes(found.pop())
    read, described = read_safetensors(tmp_path / "file")
    assert torch.equal(read["b"], tensors["b"])
    assert described.items() >= metadata.items()


def test_floors_are_computed_once_for_each_network_of_features(workspace, tmp_path, monkeypatch):
    images = load_sets(workspace.path / "runs/demo/images")
    computations = []
    compute = evaluate.measure_floors

    def counted_floors(*arguments):
        computations.append(1)
        return compute(*arguments)

    monkeypatch.setattr(evaluate, "measure_floors", counted_floors)

    def pixels(x):
        return x.flatten(1)[:, ::64], None

    def floors(name, seed):
        description = {"name": name}
        return evaluate.load_or_measure_floors(
            tmp_path, description, Identity(), pixels, images, 200, seed
        )

    found = [floors(name, 0) for name in ("a", "a", "b")]
    assert found[0] == found[1] == found[2]
    assert len(computations) == 2
    assert found[0]["autoencoder"] < found[0]["bootstrap"]
    assert floors("a", 1) != found[0]
