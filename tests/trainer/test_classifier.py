"""What all evaluations of a set share is made once: the classifier that measures, and the floors."""

from concurrent.futures import ThreadPoolExecutor
from shutil import copytree

import torch

from data.images import Images
from models.codec import Identity
from trainer import evaluate
from trainer.evaluate import classifier


def sets(folder):
    return [Images(str(folder / split)) for split in ("train", "heldout")]


def test_evaluations_side_by_side_train_one_classifier(workspace, tmp_path, monkeypatch):
    for split in ("train", "heldout"):
        copytree(workspace.path / "runs/demo/images" / split, tmp_path / split)
    began, fit = [], classifier._fit
    monkeypatch.setattr(classifier, "STEPS", 3)
    monkeypatch.setattr(classifier, "_fit", lambda *words: (began.append(1), fit(*words)))
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: classifier.trained(tmp_path, *sets(tmp_path)), range(3)))
    assert len(began) == 1 and len({score for _, score in found}) == 1
    one, *others = (model.state_dict() for model, _ in found)
    assert all(torch.equal(value, other[key]) for other in others for key, value in one.items())


def test_floors_are_kept_for_the_next_evaluation_alike(workspace, tmp_path, monkeypatch):
    images, counted, floors = sets(workspace.path / "runs/demo/images"), [], evaluate.floors
    monkeypatch.setattr(evaluate, "floors", lambda *words: (counted.append(1), floors(*words))[1])

    def look(x):
        return x.flatten(1)[:, ::64], None

    found = [evaluate.kept_floors(tmp_path, {"name": name}, Identity(), look, images, 200, 0) for name in ("a", "a", "b")]
    assert found[0] == found[1] == found[2] and len(counted) == 2 and found[0]["autoencoder"] < found[0]["bootstrap"]
    assert evaluate.kept_floors(tmp_path, {"name": "a"}, Identity(), look, images, 200, 1) != found[0]
