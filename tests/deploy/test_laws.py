"""`rectify fit` reads time distributions, weightings and distances by class name."""

import pytest
from PIL import Image

from data.pack import pack
from tests.helpers.refusals import assert_refused
from tests.helpers.training import fit_words, log_lines, small_config, spec, train
from trainer.objectives.parts.distances import Distance
from trainer.objectives.parts.time_distributions import TimeDistribution
from trainer.objectives.parts.weightings import Weighting

OBJECTIVE = "--model.objective.init_args"
EVERY_STEP = ("--metrics.every", "1")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Return the configuration of a small model of noise, on 16 tiny images."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(18):
        Image.new("L", (8, 8), 14 * i).save(folder / f"{i:02d}.png")
    pack(folder / "set", folder, size=8, grey=True)
    source = spec("Images", path=str(folder / "set" / "train"))
    return small_config(source, interpolant="VariancePreserving", prediction="NoisePrediction")


def public_names(base: type) -> list[str]:
    """Return the names of a class's public subclasses."""
    subclasses = base.__subclasses__()
    return [cls.__name__ for cls in subclasses if cls.__module__.startswith("trainer.")]


@pytest.mark.parametrize(
    ("option", "name"),
    [
        *(("times", name) for name in public_names(TimeDistribution)),
        *(("weighting", name) for name in public_names(Weighting)),
        *(("distance", name) for name in public_names(Distance)),
    ],
)
def test_every_class_trains_by_its_name(config, tmp_path, option, name):
    words = (*EVERY_STEP, f"{OBJECTIVE}.{option}", name)
    lines = log_lines(train(config, tmp_path / "run", *words, steps=2))
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["loss"] > 0 for line in lines)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_loss_is_the_mean_of_the_losses_by_time(config, tmp_path, accumulated):
    """Stratified times fall evenly into the bins, in one batch and in an accumulated one."""
    words = (*EVERY_STEP, "--trainer.accumulate_grad_batches", accumulated)
    for line in log_lines(train(config, tmp_path / "run", *words, steps=2)):
        by_time = [line[f"loss_t{i}"] for i in range(4)]
        assert sum(by_time) / 4 == pytest.approx(line["loss"], rel=1e-5)
        assert max(by_time) > min(by_time)


def test_bins_without_samples_are_not_logged(config, tmp_path):
    narrow = (f"{OBJECTIVE}.times", "LogitNormal", f"{OBJECTIVE}.times.init_args.std", "0.01")
    words = (*EVERY_STEP, *narrow, "--metrics.bins", "5")
    for line in log_lines(train(config, tmp_path / "run", *words, steps=2)):
        assert not {"loss_t1", "loss_t3"} & line.keys()
        assert line["loss_t2"] == pytest.approx(line["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--metrics.bins", "-1"), ("bins", "-1")),
        (
            (f"{OBJECTIVE}.times", "Mode", f"{OBJECTIVE}.times.init_args.s", "3"),
            ("Mode", "3.0", "[-1, 1.752]"),
        ),
    ],
    ids=["bins", "time distribution"],
)
def test_a_bad_value_is_refused(config, tmp_path, capfd, words, named):
    assert_refused(capfd, fit_words(config, tmp_path / "run", *words, steps=2), *named)
