"""powerful-benchmarker killed at random moments ends as if nobody had touched it."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from damage import same
from kills import Program

from .test_runs import benchmark_flags, pytestmark, results  # noqa: F401

PHASES = {
    "pytorch_metric_learning.trainers:BaseTrainer.train": "epoch",
    "pytorch_metric_learning.utils.common_functions:save_dict_of_models": "checkpoint",
    "pytorch_metric_learning.utils.common_functions:delete_dict_of_models": "checkpoint",
    "record_keeper:RecordWriter.save_records": "records",
    "powerful_benchmarker.api_parsers:BaseAPIParser.eval": "end",
    "powerful_benchmarker.api_parsers:BaseAPIParser.eval_ensemble": "end",
    "results_table:save": "end",
}


def run(arguments):
    import benchmark

    sys.argv[1:] = arguments
    benchmark.main()


@pytest.mark.kills
def test_a_benchmark_killed_at_random_moments_ends_as_one_that_was_not(tmp_path, monkeypatch):
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*sys.path, root]))
    imports = ("pml_pnp.losses", "retrieval.data", "parts", "benchmark")
    program = Program(f"{__name__}:run", PHASES, tmp_path, imports)
    program.measure(benchmark_flags(tmp_path / "whole", 2))

    def check(number):
        folder = tmp_path / str(number)
        assert results(folder / "digits") == results(tmp_path / "whole" / "digits")
        for path in (tmp_path / "whole").rglob("saved_models/*.pth"):
            again = folder / path.relative_to(tmp_path / "whole")
            assert same(*(torch.load(x, weights_only=True) for x in (again, path)))
        shutil.rmtree(folder)

    kills = int(os.environ.get("KILLS", 100))  # each takes about half a run
    program.kill(lambda x: benchmark_flags(tmp_path / str(x), 2), kills, 4, check)
