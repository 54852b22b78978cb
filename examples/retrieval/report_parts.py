"""The parts of a report that show images: how the test images are ranked, and what trains."""

import colorsys
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .data import LabelledImages, Roles, Sample
from .embeddings import to_plane
from .figures import Diagram, negatives_histogram
from .ranking import PAIRS_AT_A_TIME, rank_all
from .sheet import Cell
from .thumbnails import Sprite, contact_sheet, from_data_uri, sprite, thumbnail, to_image
from .trunks import Trunk

# What keeps the page below 10 MB: sides of thumbnails in pixels, and how many there are at most.
SHEET_SIDE, CLASS_SIDE, MAP_SIDE, AUGMENTED_SIDE = 96, 48, 48, 64
NEIGHBOURS = 10
FRAMES = {"right": "#2e9e4f", "wrong": "#d64541"}
# Pairs of a query and an image that are ranked for each network. Of more images than its square
# root only a part are queries: with all 60,000 of a test set, there would be 36 times as many.
PAIRS_AT_MOST = 10**8
SHEETS_OF_A_KIND = 5
MAP_POINTS = 2000
CLASS_ROWS = 200
CONFUSED_ROWS = 12
ALIKE_ROWS = 12
AUGMENTED_IMAGES, AUGMENTED_TIMES = 8, 8
# With more classes the map has no legend.
LEGEND_CLASSES = 10
MAP_WIDTH, MAP_HEIGHT, MAP_MARGIN = 520, 420, 12
GOLDEN_RATIO = 0.618034
# Outlines of the points of a class in the map, around the origin; as many as a legend has classes.
MARKERS = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",  # a disc
    "M-3.2-3.2h6.4v6.4h-6.4z",  # a square
    "M0-4.4L4.2 3.2h-8.4z",  # triangles
    "M0 4.4L4.2-3.2h-8.4z",
    "M-4.4 0L3.2-4.2v8.4z",
    "M4.4 0L-3.2-4.2v8.4z",
    "M0-4.6L4.6 0 0 4.6-4.6 0z",  # a square on its tip
    "M-1.4-4.4h2.8v3h3v2.8h-3v3h-2.8v-3h-3v-2.8h3z",  # a plus
    "M-4.2-2.2l2-2L0-2l2.2-2.2 2 2L2 0l2.2 2.2-2 2L0 2l-2.2 2.2-2-2L-2 0z",  # a cross
    "M-5-1.6H5v3.2H-5z",  # a bar
)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A thumbnail and what is said of it."""

    uri: str
    label: str
    file: str


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """An image that a query found, and whether it is of the query's class."""

    picture: Picture
    right: bool
    similarity: float


@dataclasses.dataclass(frozen=True)
class Row:
    """The images nearest to a query by one network."""

    network: str
    average_precision: float
    neighbours: list[Neighbour]


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A query, and what each network finds for it."""

    query: Picture
    rows: list[Row]


@dataclasses.dataclass(frozen=True)
class ClassRow:
    """A class with its means by each network."""

    picture: Picture
    images: int
    map_at_r: dict[str, float]
    precision_at_1: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Confusion:
    """The share of the places of a class's images that another class takes, by each network."""

    picture: Picture
    other: Picture
    share: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Alike:
    """A test image, and the image that the network was trained on which is most like it."""

    tested: Picture
    seen: Picture
    similarity: float


@dataclasses.dataclass(frozen=True)
class Map:
    """The test images, or a random part of them, as points in the plane.

    Attributes:
        method: What made the plane.
        points: Positions on the canvas, for each network.
        groups: Name, colour and numbers of the points of each class.
        captions: Class and file of each point.
        sprite: A thumbnail of each point.
    """

    method: str
    points: dict[str, list[tuple[float, float]]]
    groups: list[tuple[str, str, list[int]]]
    captions: list[str]
    sprite: Sprite
    width: int = MAP_WIDTH
    height: int = MAP_HEIGHT

    @property
    def has_legend(self) -> bool:
        """Whether the classes are few enough to name their colours."""
        return len(self.groups) <= LEGEND_CLASSES


class TestResults:
    """The test images, ranked by each network for all of them or, of many, a random part.

    Args:
        images: The test images.
        embeddings: Theirs, of length 1, by the name of the network.
        device: Where to rank.

    Attributes:
        queries: Numbers of the images that they are ranked for.
        is_part: Whether these are only a part of the queries of the test.
    """

    def __init__(
        self,
        images: LabelledImages,
        embeddings: dict[str, torch.Tensor],
        device: torch.device | str = "cpu",
    ):
        self.samples = images.samples
        self.labels = torch.from_numpy(images.labels)
        self.embeddings = embeddings
        self.sizes = self.labels.bincount()
        every = torch.arange(len(self.samples))
        roles = images.roles or Roles(every, every, True)
        # How many images of its class a query is to find.
        self.wanted = self.labels[roles.gallery].bincount(minlength=len(self.sizes))
        self.wanted -= int(roles.holds_queries)
        queries = roles.queries[self.wanted[self.labels[roles.queries]] > 0]
        self.queries = queries[drawn(len(queries), PAIRS_AT_MOST // len(roles.gallery))]
        self.is_part = len(self.queries) < len(queries)
        self.rankings = {
            name: rank_all(x, self.labels, NEIGHBOURS, device, self.queries, roles.gallery)
            for name, x in embeddings.items()
        }
        self.asked = self.labels[self.queries].bincount(minlength=len(self.sizes))
        numbers, first = np.unique(images.labels, return_index=True)
        self.first = dict(zip(numbers.tolist(), first.tolist(), strict=True))
        self._thumbnail = functools.cache(lambda i, side: thumbnail(self.samples[i], side))

    @property
    def num_classes(self) -> int:
        """How many classes have queries."""
        return int((self.asked > 0).sum())

    @property
    def networks(self) -> list[str]:
        """Names of the networks; by the first one queries, classes and confusions are chosen."""
        return [x for x in ("trained", "untrained") if x in self.rankings]

    def sheets(self) -> dict[str, list[Sheet]]:
        """The worst, the typical and the best queries by average precision at R."""
        precision = self.rankings[self.networks[0]].average_precision.numpy()
        # Equal ones in a random order, or many perfect queries would be shown by one class.
        order = np.lexsort((np.random.default_rng(0).permutation(len(precision)), precision))
        count = min(SHEETS_OF_A_KIND, max(1, len(order) // 3))
        middle = (len(order) - count) // 2
        kinds = {
            "worst": order[:count],
            "typical": order[middle : middle + count],
            "best": order[::-1][:count],
        }
        return {kind: [self._sheet(int(row)) for row in rows] for kind, rows in kinds.items()}

    def picture(self) -> list[tuple[str, list[Cell]]]:
        """Rows of a picture: the first query of each kind of sheet, by each network."""
        rows = []
        for kind, (first, *_) in self.sheets().items():
            query = Cell(from_data_uri(first.query.uri))
            for row in first.rows:
                name = f"{kind} query\n{row.network}\nAP@R {row.average_precision:.2f}"
                cells = (
                    Cell(
                        from_data_uri(x.picture.uri), frame=FRAMES["right" if x.right else "wrong"]
                    )
                    for x in row.neighbours
                )
                rows.append((name, [query, *cells]))
        return rows

    def classes(self) -> list[ClassRow]:
        """All classes from the worst MAP@R to the best; of many, those at the two ends."""
        map_at_r = {k: self._class_means(x.average_precision) for k, x in self.rankings.items()}
        right_first = {k: self._class_means(x.right_first) for k, x in self.rankings.items()}
        order = map_at_r[self.networks[0]].argsort(stable=True)
        order = order[self.asked[order] > 0].tolist()
        if len(order) > CLASS_ROWS:
            order = order[: CLASS_ROWS // 2] + order[-CLASS_ROWS // 2 :]
        return [
            ClassRow(
                self._picture(self.first[c], CLASS_SIDE),
                int(self.sizes[c]),
                {name: float(x[c]) for name, x in map_at_r.items()},
                {name: float(x[c]) for name, x in right_first.items()},
            )
            for c in order
        ]

    def confusions(self) -> list[Confusion]:
        """The pairs of classes of which one takes most of the other's places."""
        pairs = self.rankings[self.networks[0]].confused
        order = sorted(pairs, key=lambda pair: (-self._share(self.networks[0], pair), pair))
        return [
            Confusion(
                *(self._picture(self.first[c], CLASS_SIDE) for c in pair),
                {name: self._share(name, pair) for name in self.rankings},
            )
            for pair in order[:CONFUSED_ROWS]
        ]

    def histogram(self) -> Diagram:
        """How many negatives stand before the positives."""
        return negatives_histogram({k: x.negatives_before for k, x in self.rankings.items()})

    def map(self) -> Map:
        """The test images in the plane."""
        chosen = drawn(len(self.samples), MAP_POINTS)
        planes = {
            name: to_plane(self.embeddings[name][torch.from_numpy(chosen)])
            for name in self.networks
        }
        groups: dict[str, list[int]] = {}
        for point, i in enumerate(chosen):
            groups.setdefault(self.samples[i].label, []).append(point)
        colors = _colors(len(groups))
        samples = [self.samples[i] for i in chosen]
        return Map(
            planes[self.networks[0]][1],
            {name: _on_canvas(planes[name][0]) for name in self.embeddings},
            [(label, next(colors), groups[label]) for label in sorted(groups)],
            [f"{x.label} · {_file(x)}" for x in samples],
            sprite(samples, MAP_SIDE),
        )

    def _sheet(self, row: int) -> Sheet:
        """What is found for the query in a row of the rankings."""
        query = int(self.queries[row])
        rows = []
        for network in self.networks:
            ranking, embeddings = self.rankings[network], self.embeddings[network]
            nearest = ranking.nearest[row]
            neighbours = [
                Neighbour(
                    self._picture(int(i), SHEET_SIDE),
                    bool(self.labels[i] == self.labels[query]),
                    float(similarity),
                )
                for i, similarity in zip(
                    nearest, embeddings[nearest] @ embeddings[query], strict=True
                )
            ]
            rows.append(Row(network, float(ranking.average_precision[row]), neighbours))
        return Sheet(self._picture(query, SHEET_SIDE), rows)

    def _picture(self, i: int, side: int) -> Picture:
        return Picture(self._thumbnail(i, side), self.samples[i].label, _file(self.samples[i]))

    def _class_means(self, values: torch.Tensor) -> torch.Tensor:
        classes = self.labels[self.queries]
        return classes.bincount(values.double(), minlength=len(self.sizes)) / self.asked

    def _share(self, network: str, pair: tuple[int, int]) -> float:
        places = int(self.asked[pair[0]] * self.wanted[pair[0]])
        return self.rankings[network].confused[pair] / places


def most_alike(
    seen: Sequence[Sample],
    seen_embeddings: torch.Tensor,
    tested: Sequence[Sample],
    embeddings: torch.Tensor,
    device: torch.device | str = "cpu",
) -> list[Alike]:
    """The pairs of an image that was trained on and a test image that are most alike."""
    blocks = embeddings.to(device).split(max(1, PAIRS_AT_A_TIME // len(seen)))
    references = seen_embeddings.to(device).T
    nearest = [(block @ references).max(dim=1) for block in blocks]
    similarity = torch.cat([x.values for x in nearest]).cpu()
    which = torch.cat([x.indices for x in nearest]).tolist()

    def picture(sample: Sample) -> Picture:
        return Picture(thumbnail(sample, SHEET_SIDE), sample.label, _file(sample))

    return [
        Alike(picture(tested[i]), picture(seen[which[i]]), float(similarity[i]))
        for i in similarity.argsort(descending=True, stable=True)[:ALIKE_ROWS].tolist()
    ]


def augmented(samples: Sequence[Sample], trunk: Trunk) -> tuple[str, list[str]]:
    """Training images as they are and in augmented versions, and the classes of the rows."""
    step = max(1, len(samples) // AUGMENTED_IMAGES)
    chosen = samples[::step][:AUGMENTED_IMAGES]
    rows = []
    for sample in chosen:
        image = sample.open()
        versions = [trunk.train_transform(image) for _ in range(AUGMENTED_TIMES)]
        normalised = trunk.eval_transform
        rows.append([image, *(to_image(x, normalised.mean, normalised.std) for x in versions)])
    return contact_sheet(rows, AUGMENTED_SIDE), [x.label for x in chosen]


def drawn(count: int, most: int) -> np.ndarray:
    """The numbers below `count` in order, or a random part of `most` of them, always the same."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False))


def _file(sample: Sample) -> str:
    return Path(sample.name).name


def _colors(count: int):
    """Colours that differ from their predecessors and can be read on white and on black."""
    for i in range(count):
        hue = i / count if count <= LEGEND_CLASSES else i * GOLDEN_RATIO % 1
        channels = colorsys.hls_to_rgb(hue, 0.5, 0.65)
        yield "#" + "".join(f"{round(255 * x):02x}" for x in channels)


def _on_canvas(plane: np.ndarray) -> list[tuple[float, float]]:
    low, high = plane.min(axis=0), plane.max(axis=0)
    shares = (plane - low) / np.maximum(high - low, 1e-12)
    room = np.array([MAP_WIDTH, MAP_HEIGHT]) - 2 * MAP_MARGIN
    return [(round(float(x), 1), round(float(y), 1)) for x, y in MAP_MARGIN + shares * room]
