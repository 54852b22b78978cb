"""powerful-benchmarker killed at random moments ends as if nobody had touched it."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from damage import same
from kills import Program

from .test_runs import EXAMPLE, benchmark_flags, pytestmark, results  # noqa: F401

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
    root = Path(__file__).parents[2]
    paths = map(str, (root / "tests", EXAMPLE.parent, EXAMPLE, root))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    imports = ("pml_pnp.losses", "retrieval.data", "parts", "benchmark")
    program = Program(f"{__name__}:run", PHASES, next(iter(PHASES)), tmp_path, imports)
    program.measure(benchmark_flags(tmp_path / "whole", 2))
    assert set(program.counts) == {"start", "end", *PHASES.values()}

    def check(number):
        folder = tmp_path / str(number)
        assert results(folder / "digits") == results(tmp_path / "whole" / "digits")
        for path in (tmp_path / "whole").rglob("saved_models/*.pth"):
            again = folder / path.relative_to(tmp_path / "whole")
            assert same(*(torch.load(x, weights_only=True) for x in (again, path)))
        shutil.rmtree(folder)

    kills = int(os.environ.get("KILLS", 100))  # each takes about half a run
    done = program.kill(lambda x: benchmark_flags(tmp_path / str(x), 2), kills, 4, check)
    assert done.total() == kills
