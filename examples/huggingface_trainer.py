"""Fine-tune a sentence transformer on CLINC150 by the Trainer of Hugging Face's transformers.

`pip install -c constraints.txt ".[huggingface]"`; `python examples/huggingface_trainer.py DATA NEW`
"""

import argparse
from pathlib import Path

import torch
import transformers
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sentences import LONGEST, Embedder, bundled_model, requests

from pml_pnp import losses


class Network(Embedder):
    accepts_loss_kwargs = False  # or the Trainer does not divide the loss by what it accumulates


class RetrievalTrainer(transformers.Trainer):
    loss_func = losses.PNPLoss(variant="Ds", anneal=0.03)

    def get_train_dataloader(self):
        data, size = self.train_dataset, self.args.train_batch_size
        length = self.args.max_steps * self.args.gradient_accumulation_steps * size
        sampler = MPerClassSampler([x["labels"] for x in data], 4, size, length)
        return torch.utils.data.DataLoader(data, size, None, sampler, collate_fn=self.data_collator)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        embeddings = model(**inputs)
        loss = self.loss_func(embeddings, labels)
        return (loss, {"embeddings": embeddings}) if return_outputs else loss


def map_at_r(prediction):
    calculator = AccuracyCalculator(include=("mean_average_precision_at_r",), k="max_bin_count")
    return calculator.get_accuracy(*map(torch.tensor, prediction))


def main(data_root, output, folder=None, **kwargs):
    if Path(output).exists():
        raise SystemExit(f"expected a new folder to write to, {output} exists")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder or bundled_model())
    texts, intents = requests(data_root)
    names = list(dict.fromkeys(intents))
    tokens = tokenizer(texts, truncation=True, max_length=LONGEST)["input_ids"]
    data = [{"input_ids": tokens[i], "labels": names.index(x)} for i, x in enumerate(intents)]
    settings = {"max_steps": 30, "per_device_train_batch_size": 64, "learning_rate": 5e-5, **kwargs}
    settings |= {"remove_unused_columns": False, "label_names": ["labels"], "save_strategy": "no"}
    arguments = transformers.TrainingArguments(output, **settings)
    if arguments.world_size > 1:  # each would train on the same batches
        number = arguments.world_size
        raise SystemExit(f"expected one process, got {number}; docs/distributed.md has several")
    trainer = RetrievalTrainer(
        Network(transformers.AutoModel.from_pretrained(folder or bundled_model())),
        arguments,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        train_dataset=[x for x in data if x["labels"] % 3],
        eval_dataset=[x for x in data if x["labels"] % 3 == 0],
        compute_metrics=map_at_r,
    )
    before, _ = trainer.evaluate(), trainer.train()
    trainer.model.transformer.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return before, trainer.evaluate()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", metavar="DATA", help="folder that holds the folder clinc150")
    parser.add_argument("new", metavar="NEW", help="new folder for network and tokenizer")
    args = parser.parse_args()
    print(main(args.data, args.new))
