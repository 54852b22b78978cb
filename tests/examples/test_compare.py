"""The table over several runs."""

import json
import statistics

import pytest
from helpers import change_json, csv_rows
from retrieval import commands
from retrieval.configuration import configured

METRICS = ["mean_average_precision_at_r", "precision_at_1", "r_precision"]
METRICS += ["recall_at_10", "recall_at_100"]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Make the two files of a run folder that the command reads; returns the folder's name."""
    monkeypatch.chdir(tmp_path)

    def make(name, value=0.5, seconds=100.0, test=20, without=(), images=None, **settings):
        (tmp_path / name).mkdir()
        data = {"test": {"images": test, "classes": 2}}
        config = {**configured({"dataset": "folder", **settings}), "data": data}
        metrics = {"untrained": dict.fromkeys(METRICS, 0.25), "best_epoch": 7, "epochs_trained": 9}
        metrics["stopped_early"] = True
        metrics["trained"] = {k: value + 0.01 * i for i, k in enumerate(METRICS)}
        metrics["seconds"] = {"training": seconds, "this_process": 1.0}
        for file, content in (("config.json", config), ("metrics.json", metrics)):
            if file not in without:
                content = {k: v for k, v in content.items() if k not in without}
                (tmp_path / name / file).write_text(json.dumps(content))
        if images:
            lines = "".join(f"{x}\n" for x in ("path,class,split,bytes,crc32", *images))
            (tmp_path / name / "images.csv").write_text(lines)
        return name

    return make


@pytest.fixture
def compare(capsys):
    """Call the command; returns what it printed, the lines' words and the exit code."""

    def call(*arguments):
        code = commands.run("compare", list(arguments), "compare")
        out, err = capsys.readouterr()
        return [line.split() for line in out.splitlines()], out, err, code

    return call


def test_runs_that_differ_in_seed_alone_have_mean_and_standard_deviation(make, compare):
    runs = [make("a", 0.5, seed=1), make("b", 0.6, seed=2, seconds=200.0), make("c", 0.8, seed=3)]
    words, *_ = compare(*runs, make("other", 0.9, lr=0.5))
    rows = [x for x in words[2:] if x and x[0] != "PNPLoss"]
    assert words[1][:3] == ["run", "seed", "epoch"]
    metrics = "0.2500 0.5000 0.2500 0.5100 0.2500 0.5200"
    assert rows[0] == f"a 1 7 {metrics} 1 min 40 s".split()
    assert [x[0] for x in rows] == ["a", "b", "c", "mean", "standard", "other"]
    mean, deviation = rows[3:5]
    values = [0.5, 0.6, 0.8]
    assert mean[:4] == ["mean", "of", "3", "seeds"]
    assert mean[5] == f"{statistics.mean(values):.4f}" == "0.6333"
    assert deviation[6] == f"{statistics.stdev(values):.4f}" == "0.1528"
    assert deviation[5] == "0.0000"
    assert mean[-4:] == ["2", "min", "13", "s"]
    again = make("again", 0.9, seed=1)  # which counts once
    (mean,) = (x for x in compare("a", again, "c")[0] if x[:1] == ["mean"])
    assert mean[2] == "2" and mean[5] == "0.6500"
    assert "mean" not in compare("a", again)[1]


def test_what_differs_is_named_and_what_a_resumed_run_may_change_does_not_count(make, compare):
    runs = [
        make("a", seed=1, threads=1),
        make("b", seed=2, threads=2, workers=3, device="cpu"),
        make("c", lr=0.5, loss="ContrastiveLoss", loss_args=["pos_margin=0.3"]),
        make("d", beside="MultiSimilarityLoss"),
    ]
    words, out, *_ = compare(*runs)
    rows = {x[0]: " ".join(x) for x in words if x}
    settings = "PNPLoss variant=Ds anneal=0.03, lr=0.001, loss_lr=0.001"
    assert out.index(settings) < out.index("  a ") < out.index("  b ") < out.index("Contrastive")
    assert "ContrastiveLoss pos_margin=0.3, lr=0.5, loss_lr=0.5\n  c " in out
    assert "PNPLoss + MultiSimilarityLoss variant=Ds" in out
    assert not any(x in out for x in ("threads", "workers", "beside")) and "mean" in rows


def test_runs_that_lack_something_or_have_other_test_sets_are_told(make, compare, tmp_path):
    runs = [make("a"), make("b", without=["metrics.json"]), make("c", test=30)]
    runs.append(make("all", without=["untrained", "trained"]))  # was trained without a test
    runs.append(make("old", without=["threads", "versions", "world_size"]))
    words, out, _, code = compare(*runs, "--csv", "table.csv")
    assert code == 0
    assert ["all", "0", "7", *["-"] * 6, "1", "min", "40", "s"] in words
    assert ["b", "0"] + ["-"] * 8 in words
    assert "b is not finished" in out
    assert "the runs have different test sets, so their metrics do not compare" in out
    assert "different test sets" not in compare("a", "b")[1]
    going_on = make("going_on", 0.9, epochs=99)
    change_json(tmp_path / going_on / "metrics.json", stopped_early=False)
    words, out, *_ = compare("a", going_on)
    assert ["going_on", "0"] + ["-"] * 8 in words and "going_on is not finished" in out


def test_only_runs_of_the_same_images_have_a_mean(make, compare):
    images = ["0/a.png,0,train,9,aa", "1/a.png,1,test,9,bb", "2/a.png,2,test,9,cc"]
    other_test = ["0/a.png,0,test,9,aa", "1/a.png,1,train,9,bb", "2/a.png,2,test,9,cc"]
    unchecked = [x[:-2] for x in images]  # by --skip-verify
    make("a", seed=1, images=images)
    make("same", seed=2, images=reversed(images))
    make("unchecked", seed=3, images=unchecked)
    make("drawn", seed=4, images=other_test)
    make("changed", seed=5, images=[*images[:2], "2/a.png,2,test,9,dd"])
    make("more", seed=6, images=[*images, "0/b.png,0,train,9,ee"])
    for other, same_test, same_images in (
        ("same", True, True),
        ("unchecked", True, True),
        ("drawn", False, True),
        ("changed", False, True),
        ("more", True, False),
    ):
        out = compare("a", other)[1]
        assert ("different test sets" not in out) is same_test
        assert ("mean of 2 seeds" in out) is same_images
        assert ("images=3 (" in out and "images=4 (" in out) is not same_images


def test_chunks_of_grad_cache_are_a_setting(make, compare):
    out = compare(make("a", seed=1), make("b", seed=2, grad_cache=16))[1]
    assert "grad_cache=16" in out and "mean" not in out


def test_data_file_has_every_run_in_full_precision(make, compare, tmp_path):
    runs = [make("a", 1 / 3, seed=1), make("b", seed=2, lr=0.5)]
    runs.append(make("c", without=["metrics.json"]))
    file = tmp_path / "table.csv"
    assert compare(*runs, "--csv", str(file))[-1] == 0
    rows = csv_rows(file)
    assert [x["run"] for x in rows] == runs
    assert [x["lr"] for x in rows] == ["0.001", "0.5", "0.001"]
    assert json.loads(rows[0]["loss_args"]) == {"variant": "Ds", "anneal": 0.03}
    assert float(rows[0]["trained_mean_average_precision_at_r"]) == 1 / 3
    assert float(rows[1]["trained_recall_at_100"]) == 0.54
    assert rows[0]["training_seconds"] == "100.0" and rows[2]["best_epoch"] == ""
    make("d", recall_at=[4])
    assert compare("a", "d", "--csv", str(file))[-1] == 0
    recalls = [x for x in csv_rows(file)[0] if x.startswith("trained_recall")]
    assert recalls == [f"trained_recall_at_{k}" for k in (4, 10, 100)]


def test_many_settings_make_no_wide_table(make, compare):
    """A terminal shows it, however much differs."""
    many = {"lr": 0.123, "loss_lr": 0.5, "weight_decay": 0.25, "trunk": "resnet50", "epochs": 99}
    more = {"loss_args": ["margin=0.123456", "alpha=32", "embedding_size=128"]}
    runs = [make("digits-PNPLoss-Ds-1"), make("digits-ProxyAnchorLoss-1", **many, **more)]
    assert max(map(len, compare(*runs)[1].splitlines())) <= 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("runs", "no run in runs: it holds no config.json; there is a run in runs/"),
        ("runs/a --csv nowhere/x.csv", "cannot write nowhere/x.csv: No such file or directory\n"),
        *(
            (f"runs/a --csv {x}", f"--csv: {x} exists and is no table of compare; name a new file")
            for x in ("runs/a/images.csv", "runs/a/config.json", "binary", "runs")
        ),
    ],
)
def test_mistakes_end_in_one_line(make, compare, tmp_path, arguments, message):
    (tmp_path / "runs").mkdir()
    make("runs/a", images=["0/a.png,0,train,9,aa"])
    (tmp_path / "binary").write_bytes(b"\xff\0")
    err, code = compare(*arguments.split())[2:]
    assert code == 2
    assert err.startswith(f"compare: error: {message}") and err.count("\n") == 1
