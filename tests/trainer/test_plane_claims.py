"""Rectification of every form in the plane, measured: what is counted, what is kept of a run before, what is refused."""

import json
import math

import pytest

from data.files import read_json, write_json
from data.form import conform
from trainer.evaluate.measures import energy, first_orderness
from trainer.picture import forms, train
from trainer.picture.forms import FORMS, plane

PAIRS, BATCH, FINE = 64, 32, 8
SMALL = {"seeds": 2, "updates": 3, "samples": 50}


@pytest.fixture(autouse=True)
def trained(monkeypatch):
    """Make everything that is counted small; return the list of the seeds that were trained."""
    seeds, whole = [], train.Rectification
    for module, name, value in ((train, "PAIRS", PAIRS), (train, "BATCH", BATCH), (train, "FINE", FINE), (forms, "FINE", FINE)):
        monkeypatch.setattr(module, name, value)

    def counted(x, interpolant, prediction, updates, seed, shown):
        seeds.append(seed)
        return whole(x, interpolant, prediction, updates, seed, shown)

    monkeypatch.setattr(forms, "Rectification", counted)
    return seeds


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_form_is_measured_before_and_after_for_every_seed(tmp_path, capsys):
    plane(tmp_path, **SMALL)
    found = read_json(tmp_path / "plane.json")
    conform(found, forms.FIGURES, "plane.json")
    assert [(row["form"], row["when"]) for row in found["rows"]] == [(form, when) for form in FORMS for when in forms.WHEN]
    for row in found["rows"]:
        measures = (*row["energy"].values(), row["first_orderness"], row["straightness"])
        assert row["energy"].keys() == {"1", "2", "4", str(FINE)} and all(one.keys() == {"0", "1"} for one in measures)
        assert all(math.isfinite(value) and value > 0 for one in measures for value in one.values())
    told = capsys.readouterr()
    assert forms.markdown(found) in told.out and "plane: 8/8 rectifications" in told.err and "updates/s" not in told.err


def test_what_is_spent_is_what_the_networks_were_asked(tmp_path):
    """Training asks once for each sample of a batch, pairs once for each step of each; measuring is not counted."""
    plane(tmp_path, **{**SMALL, "seeds": 1})
    own = SMALL["updates"] * BATCH
    for row in read_json(tmp_path / "plane.json")["rows"]:
        assert set(row["evaluations"].values()) == {own if row["when"] == "before" else PAIRS * FINE + own}


def test_figures_are_of_the_seeds_own_points_network_and_noise():
    found = forms.rectified("VP + Noise", 1, "checkerboard", 3, 50)
    x, true = (forms.Plane("checkerboard", seed=seed).points for seed in (2, 3))
    model = train.Rectification(x.view(-1, 2, 1, 1), *FORMS["VP + Noise"], 3, 1)
    eps = model.noise(50, 1)
    for when, denoiser in (("before", model.teacher), ("after", model.student)):
        times = train.grid(denoiser, 2)
        drawn = forms.DDIM(2, times)(denoiser, eps)
        assert found[when]["energy"]["2"] == energy(drawn.flatten(1), true[:50])
        assert found[when]["first_orderness"] == first_orderness(denoiser, eps, steps=4, times=train.grid(denoiser, 4))


def test_a_rerun_skips_what_is_finished_and_gives_the_same_bytes(tmp_path, trained):
    plane(tmp_path, **SMALL)
    first = files(tmp_path)
    assert sorted(trained) == [0] * 4 + [1] * 4 and len(first) == 9
    trained.clear()
    plane(tmp_path, **SMALL)
    assert trained == [] and files(tmp_path) == first
    for name in ("vp-1.json", "plane.json"):
        (tmp_path / name).unlink()
    plane(tmp_path, **SMALL)
    assert trained == [1] and files(tmp_path) == first, "as after a kill"
    trained.clear()
    plane(tmp_path, **{**SMALL, "seeds": 3})
    assert trained == [2] * 4 and {name: files(tmp_path)[name] for name in first if name != "plane.json"}.items() <= first.items()


@pytest.mark.parametrize("name", ["seeds", "updates", "samples"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_below_one_are_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^{name}: {value}, it must be at least 1$"):
        plane(tmp_path / "out", **{**SMALL, name: value})
    assert not (tmp_path / "out").exists()


def test_more_samples_than_memory_holds_the_distances_of_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^samples: 10001, it must be at most 10000$"):
        plane(tmp_path, samples=forms.MOST + 1)


def test_an_unknown_law_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="law is 'three_moons', it must be one of two_moons"):
        plane(tmp_path, "three_moons", **SMALL)


@pytest.mark.parametrize(("changed", "said"), [({"updates": 4}, "updates 3, not 4"), ({"law": "checkerboard"}, "law two_moons")])
def test_figures_of_other_settings_are_not_mixed(tmp_path, trained, changed, said):
    plane(tmp_path, **{**SMALL, "seeds": 1})
    before = files(tmp_path)
    trained.clear()
    with pytest.raises(ValueError, match=rf"linear-0\.json: was measured with {said}.*; choose another --out or delete"):
        plane(tmp_path, **{**SMALL, "seeds": 1, **changed})
    assert trained == [] and files(tmp_path) == before


def test_damaged_figures_are_named(tmp_path):
    plane(tmp_path, **{**SMALL, "seeds": 1})
    path = tmp_path / "ve-0.json"
    part = read_json(path)
    write_json(path, {**part, "after": {**part["after"], "energy": {"1": None}}})
    with pytest.raises(ValueError, match=r"ve-0\.json: after: energy: 1: is None, wanted a number"):
        plane(tmp_path, **{**SMALL, "seeds": 1})
    path.write_text(json.dumps(part))
    with pytest.raises(ValueError, match=r"ve-0\.json: its seal does not fit"):
        plane(tmp_path, **{**SMALL, "seeds": 1})
