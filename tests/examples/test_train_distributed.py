"""train.py under torchrun: two processes on the CPU, joined by gloo."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WORKER = Path(__file__).with_name("train_worker.py")


def free_ports(number):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [x.getsockname()[1] for x in sockets]
    for x in sockets:
        x.close()
    return ports


@pytest.fixture(scope="module")
def finished(environment, quick, tmp_path_factory):
    """Four runs in two processes: what they printed, and the folder that holds their folders."""
    folder = tmp_path_factory.mktemp("distributed")
    memory = ["--output-dir", folder, *quick, "--memory-size", 96]
    runs = [
        [*memory, "--name", "whole", "--epochs", 2],
        [*memory, "--name", "parts", "--epochs", 1],
        ["--resume", folder / "parts", "--epochs", 2],
        ["--output-dir", folder, *quick, "--name", "proxies", "--epochs", 1]
        + ["--loss", "ProxyAnchorLoss"],
    ]
    runs = [[str(x) for x in arguments] for arguments in runs]
    runs = json.dumps(list(zip(free_ports(len(runs)), runs, strict=True)))
    process = subprocess.run(
        [sys.executable, *LAUNCHER, str(WORKER), runs],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout, folder


def numbers(run, strict_json):
    metrics = strict_json(run / "metrics.json")
    del metrics["seconds"]
    return metrics


def test_two_processes_train_and_resume_to_the_same_end(finished, strict_json):
    output, folder = finished
    assert output.count("MAP@R  ") == 4  # one process of two speaks
    assert strict_json(folder / "whole" / "config.json")["world_size"] == 2
    whole, parts = (numbers(folder / x, strict_json) for x in ("whole", "parts"))
    assert whole == parts and whole["epochs_trained"] == 2


def test_processes_draw_different_batches_and_share_weights_and_proxies(finished):
    path = finished[1] / "proxies" / "checkpoints" / "last.pt"
    first, second = torch.load(path, weights_only=True)["own"]
    assert not torch.equal(first["random"]["numpy"][1], second["random"]["numpy"][1])
    assert torch.equal(first["loss"]["loss.proxies"], second["loss"]["loss.proxies"])


def test_processes_train_in_chunks(script, quick, tmp_path, strict_json):
    settings = ["--output-dir", tmp_path, "--epochs", 1, "--freeze-batchnorm", *quick]
    for name, arguments in {"chunks": ["--grad-cache", 7], "whole": []}.items():
        process = script(*settings, "--name", name, *arguments, launcher=LAUNCHER)
        assert process.returncode == 0, process.stderr
    chunks, whole = (numbers(tmp_path / x, strict_json)["trained"] for x in ("chunks", "whole"))
    assert chunks == pytest.approx(whole, rel=1e-3)


def test_mistake_is_said_once(script):
    process = script("--batch-size", 33, "--samples-per-class", 3, launcher=LAUNCHER)
    assert process.returncode != 0
    assert process.stderr.count("train.py: error: --batch-size: expected a multiple of 6") == 1
