"""What benchmark.py of the example keeps of an experiment, without powerful-benchmarker."""

import argparse
import json
import logging

import benchmark
import numpy as np
import pytest
from parts import Digits
from PIL import Image


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Call `benchmark._experiment` with settings; a run logs what `logged` holds."""
    logged = ["fine"]

    def run(argv):
        (tmp_path / "loss-0" / "configs").mkdir(parents=True, exist_ok=True)
        (tmp_path / "loss-0" / "configs" / "config_foldernames.yaml").touch()
        logging.error(logged[0])

    def call(verbose=False, **settings):
        args = argparse.Namespace(
            dataset="digits", dataset_root=".", epochs=None, flags=[], verbose=verbose
        )
        benchmark._experiment(tmp_path, "loss", 0, args, settings)

    monkeypatch.setattr(benchmark, "run", run)
    call.logged = logged
    yield call
    logging.basicConfig(force=True)  # without the handler of a run


def test_an_experiment_goes_on_with_its_own_settings_and_images(experiment, tmp_path):
    experiment(epochs=1, images="9 (aa)")
    experiment(epochs=1, images="9 (aa)")
    for other in ({"epochs": 2, "images": "9 (aa)"}, {"epochs": 1, "images": "9 (bb)"}):
        with pytest.raises(benchmark.UserError, match=r"was begun with .*, not with .* --output"):
            experiment(**other)
    (tmp_path / "loss-0.json").write_text(json.dumps({"epochs": 1}))  # of an earlier version
    experiment(epochs=1, images="9 (aa)")


@pytest.mark.parametrize("verbose", [True, False])
@pytest.mark.parametrize("diverged", [True, False])
def test_a_model_that_diverged_is_named_each_time(experiment, capsys, diverged, verbose):
    if diverged:
        experiment.logged[0] = "the model diverged: its embeddings are NaN"
    for when in ("training", "finished before"):
        experiment(verbose, epochs=1)
        out = capsys.readouterr().out
        assert f"loss-0: {when}" in out
        assert ("loss-0: the model diverged" in out) is diverged


def test_a_fingerprint_tells_images_and_labels():
    first, again, image, label = (Digits(".") for _ in range(4))
    image.images = [Image.new("L", (8, 8)), *image.images[1:]]
    label.labels = np.array([*label.labels[:-1], 0])
    found = [benchmark._fingerprint(x) for x in (first, again, image, label)]
    assert found[0] == found[1] and len({*found}) == 3
