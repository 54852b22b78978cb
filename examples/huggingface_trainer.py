"""Fine-tune a sentence transformer on CLINC150 by the Trainer of Hugging Face transformers.

pip install -c constraints.txt ".[huggingface]"
python examples/huggingface_trainer.py ../data NEW_FOLDER
"""

import sys

import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sentences import LONGEST, Embedder, bundled_model, requests
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments
from transformers import DataCollatorWithPadding as Padding

from pml_pnp import losses


class RetrievalTrainer(Trainer):
    loss_func = losses.PNPLoss(variant="Ds", anneal=0.1)

    def get_train_dataloader(self):
        labels, size = [x["labels"] for x in self.train_dataset], self.args.train_batch_size
        sampler = MPerClassSampler(labels, 4, size, self.args.max_steps * size)
        return DataLoader(self.train_dataset, size, sampler=sampler, collate_fn=self.data_collator)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        embeddings = model(**inputs)
        loss = self.loss_func(embeddings, labels)
        return (loss, {"embeddings": embeddings}) if return_outputs else loss


def map_at_r(prediction):
    calculator = AccuracyCalculator(include=("mean_average_precision_at_r",), k="max_bin_count")
    return calculator.get_accuracy(*map(torch.tensor, prediction))


def main(data_root, output, folder=None, **kwargs):
    folder = folder or bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts, intents = requests(data_root)
    names = list(dict.fromkeys(intents))
    data = [
        {**tokenizer(text, truncation=True, max_length=LONGEST), "labels": names.index(intent)}
        for text, intent in zip(texts, intents, strict=True)
    ]
    settings = {"max_steps": 30, "per_device_train_batch_size": 64, "learning_rate": 5e-5, **kwargs}
    settings |= {"remove_unused_columns": False, "label_names": ["labels"], "save_strategy": "no"}
    trainer = RetrievalTrainer(
        model := Embedder(AutoModel.from_pretrained(folder)),
        TrainingArguments(output, **settings),
        data_collator=Padding(tokenizer),
        train_dataset=[x for x in data if x["labels"] % 3],
        eval_dataset=[x for x in data if x["labels"] % 3 == 0],
        compute_metrics=map_at_r,
    )
    before, _ = trainer.evaluate(), trainer.train()
    model.transformer.save_pretrained(output)
    return before, trainer.evaluate()


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
