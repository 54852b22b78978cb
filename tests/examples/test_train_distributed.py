"""train.py under torchrun: two processes on the CPU, joined by gloo."""

import pytest
import torch


@pytest.fixture
def torchrun(script):
    """Run train.py in two processes."""

    def run(*arguments):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return script(*arguments, launcher=launcher)

    return run


def numbers(run, strict_json):
    metrics = strict_json(run / "metrics.json")
    del metrics["seconds"]
    return metrics


def test_two_processes_train_and_resume_to_the_same_end(torchrun, quick, tmp_path, strict_json):
    settings = ["--output-dir", tmp_path, "--memory-size", 96, *quick]
    whole = torchrun(*settings, "--name", "whole", "--epochs", 2)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("MAP@R  ") == 1  # one process speaks
    assert torchrun(*settings, "--name", "parts", "--epochs", 1).returncode == 0
    assert torchrun("--resume", tmp_path / "parts", "--epochs", 2).returncode == 0
    assert strict_json(tmp_path / "whole" / "config.json")["world_size"] == 2
    whole, parts = (numbers(tmp_path / x, strict_json) for x in ("whole", "parts"))
    assert whole == parts


def test_processes_draw_different_batches_and_share_weights_and_proxies(torchrun, quick, tmp_path):
    settings = ["--output-dir", tmp_path, "--name", "run", "--epochs", 1, *quick]
    process = torchrun(*settings, "--loss", "ProxyAnchorLoss")
    assert process.returncode == 0, process.stderr
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    first, second = torch.load(path, weights_only=True)["own"]
    assert not torch.equal(first["random"]["numpy"][1], second["random"]["numpy"][1])
    assert torch.equal(first["loss"]["loss.proxies"], second["loss"]["loss.proxies"])


def test_processes_train_in_chunks(torchrun, quick, tmp_path, strict_json):
    settings = ["--output-dir", tmp_path, "--epochs", 1, "--freeze-batchnorm", *quick]
    for name, arguments in {"chunks": ["--grad-cache", 7], "whole": []}.items():
        process = torchrun(*settings, "--name", name, *arguments)
        assert process.returncode == 0, process.stderr
    chunks, whole = (numbers(tmp_path / x, strict_json)["trained"] for x in ("chunks", "whole"))
    assert chunks == pytest.approx(whole, rel=1e-3)


def test_mistake_is_said_once(torchrun):
    process = torchrun("--batch-size", 33, "--samples-per-class", 3)
    assert process.returncode != 0
    assert process.stderr.count("train.py: error: --batch-size: expected a multiple of 6") == 1
