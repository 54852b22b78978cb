"""train.py under torchrun: two processes on the CPU, joined by gloo."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from helpers import free_port

LAUNCHER = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1".split()
PLAIN, BESIDE, CHUNKS = "plain", "beside", "in chunks"  # the runs whose images are not augmented
BOTH = ["--beside", "MultiSimilarityLoss", "--memory-size", "96"]
WORKER = Path(__file__).with_name("train_worker.py")


@pytest.fixture(scope="module")
def finished(python, quick, once):
    """Runs in two processes, and a mistake: what they printed, and the folder of their folders."""
    folder = once("distributed", lambda folder: train_all(python, quick, folder))
    return json.loads((folder / "printed.json").read_text()), folder


def train_all(python, quick, folder):
    new = ["--output-dir", folder, *quick]
    memory = [*new, "--memory-size", 96]
    frozen = [*new, "--epochs", 1, "--freeze-batchnorm"]
    runs = [
        [*memory, "--name", "killed", "--epochs", 2, "--resume-if-exists"],
        [*memory, "--name", "whole", "--epochs", 2],
        [*memory, "--name", "parts", "--epochs", 1],
        ["--resume", folder / "parts", "--epochs", 2],
        [*new, "--name", "proxies", "--epochs", 1, "--loss", "ProxyAnchorLoss"],
        [*frozen, "--name", PLAIN, "--report"],
        [*frozen, "--name", BESIDE, *BOTH],
        [*frozen, "--name", CHUNKS, "--grad-cache", 7],
        ["--batch-size", 33, "--samples-per-class", 3],
    ]
    ports = [None, *(free_port() for _ in runs[1:])]
    augmented = [{PLAIN, BESIDE, CHUNKS}.isdisjoint(arguments) for arguments in runs]
    runs = [[str(x) for x in arguments] for arguments in runs]
    runs = json.dumps(list(zip(ports, augmented, runs, strict=True)))
    process = python(*LAUNCHER, WORKER, folder / "died", runs)
    assert (folder / CHUNKS / "metrics.json").exists(), process.stderr
    printed = {name: getattr(process, name) for name in ("returncode", "stdout", "stderr")}
    (folder / "printed.json").write_text(json.dumps(printed))


def numbers(run, strict_json):
    metrics = strict_json(run / "metrics.json")
    del metrics["seconds"]
    return metrics


def test_two_processes_train_and_resume_to_the_same_end_and_one_speaks(finished, strict_json):
    printed, folder = finished
    assert printed["stdout"].count("MAP@R  ") == 8
    assert printed["returncode"] != 0
    assert printed["stderr"].count("train.py: error: --batch-size: expected a multiple of 6") == 1
    report = folder / PLAIN / "report.html"
    assert printed["stdout"].count(f"report: {report}") == 1
    assert "Nothing is shown of the" not in report.read_text(encoding="utf-8")
    assert strict_json(folder / "whole" / "config.json")["world_size"] == 2
    whole, parts = (numbers(folder / x, strict_json) for x in ("whole", "parts"))
    assert whole == parts and whole["epochs_trained"] == 2


def test_processes_augment_differently_and_share_batches_weights_and_proxies(finished):
    path = finished[1] / "proxies" / "checkpoints" / "last.pt"
    first, second = torch.load(path, weights_only=True)["own"]
    assert first["random"]["python"] != second["random"]["python"]
    assert torch.equal(first["random"]["numpy"][1], second["random"]["numpy"][1])
    assert first["sampler"] == second["sampler"]
    assert torch.equal(first["loss"]["loss.proxies"], second["loss"]["loss.proxies"])


@pytest.mark.parametrize(("name", "losses"), [(PLAIN, []), (BESIDE, BOTH)])
def test_two_processes_are_one_with_the_same_batches(
    finished, trained, tmp_path, curves, monkeypatch, name, losses
):
    """Without what depends on the process: augmentation, and the statistics of BatchNorm."""
    monkeypatch.setattr("retrieval.network.PHOTOGRAPHS", {"mode": "RGB"})
    trained("--freeze-batchnorm", *losses, name=name)
    one, two = (
        torch.load(folder / name / "checkpoints" / "last.pt", weights_only=True)["shared"]
        for folder in (tmp_path, finished[1])
    )
    torch.testing.assert_close(two["models"], one["models"], rtol=1e-3, atol=1e-4)
    assert one["optimizers"]["trunk_optimizer"]["state"][0]["step"] == 11
    one, two = curves(tmp_path / name), curves(finished[1] / name)
    assert one.keys() == two.keys() == curves(finished[1] / "whole").keys()  # with a memory
    values = [[value for _, value in x["loss_histories/total_loss"]] for x in (one, two)]
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_loss_that_every_process_computes_counts_once(finished, trained, curves):
    run = trained("--loss", "ProxyAnchorLoss")
    one, two = curves(run), curves(finished[1] / "proxies")
    assert one.keys() == two.keys()
    first = [x["loss_histories/total_loss"][0][1] for x in (one, two)]
    assert first[0] == pytest.approx(first[1], rel=0.1)  # only augmentation differs


def test_processes_share_out_every_loss_also_in_chunks(finished, strict_json):
    modes = (finished[1] / "modes").read_text().split("\n")
    assert set(modes) == {"exact", ""} and len(modes) > 2 * 6
    chunks, whole = (numbers(finished[1] / x, strict_json)["trained"] for x in (CHUNKS, PLAIN))
    assert chunks == pytest.approx(whole, rel=1e-3)


def test_torchrun_restarts_a_run_after_a_process_died(finished, strict_json):
    """The process that is killed ends the other one, and both continue to the same end."""
    folder = finished[1]
    assert (folder / "died").exists()
    log = (folder / "killed" / "log.txt").read_text()
    assert [log.count(f"epoch {i} of 2: ") for i in (1, 2)] == [1, 1]
    first, second = (int(x) for x in re.findall(r"^--- .*, process (\d+) on ", log, re.MULTILINE))
    assert first != second
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert numbers(folder / "killed", strict_json) == numbers(folder / "whole", strict_json)
