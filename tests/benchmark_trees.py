"""Small data sets of images, among them some in the exact layout of those of the literature."""

import io
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

CONFIGS = Path(__file__).parents[1] / "examples" / "retrieval" / "configs"
# Classes to train and to test on, and images of each.
TRAIN, TEST, IMAGES = range(1, 5), range(5, 9), 5


def jpeg(seed):
    return png(seed, (24, 20), form="JPEG")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)


def png(seed=0, size=(12, 10), mode="RGB", form="PNG", **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return stored(Image.fromarray(pixels).convert(mode), form, **options)


def stored(image, form="PNG", **options):
    """Bytes of the image in a file of this form."""
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def write_classes(root, classes, count=5):
    for name in classes:
        for i in range(count):
            write(root / name / f"{i}.png", png(i))


def class_names(images):
    return {s.label for s in images.samples}


def reasons(skipped):
    return {x.name: x.reason for x in skipped}


def write_products(root):
    """Stanford_Online_Products.zip, unpacked."""
    base, header = root / "Stanford_Online_Products", "image_id class_id super_class_id path\n"
    rows = {"train": "", "test": ""}
    for number, (c, i) in enumerate(product((*TRAIN, *TEST), range(IMAGES)), start=1):
        folder = ("bicycle_final", "cabinet_final")[c % 2]
        path = f"{folder}/{111085122870 + c}_{i}.JPG"
        rows["train" if c in TRAIN else "test"] += f"{number} {c} {1 + c % 2} {path}\n"
        write(base / path, jpeg(number))
    for name, text in (*rows.items(), ("info", rows["train"] + rows["test"])):
        write(base / f"Ebay_{name}.txt", header + text)
    write(base / "bicycle_final.txt", "")


def write_inaturalist(root):
    """Both tar files of the competition and the split of Smooth-AP, unpacked."""
    for split, classes in (("train", TRAIN), ("test", TEST)):
        paths = ""
        for c, i in product(classes, range(IMAGES)):
            path = f"train_val2018/{('Plantae', 'Aves')[c % 2]}/{7470 + c}/{c:016x}{i:016x}.jpg"
            paths += path + "\n"
            write(root / path, jpeg(100 * c + i))
        write(root / "Inat_dataset_splits" / f"Inaturalist_{split}_set1.txt", paths)
    write(root / "train_val2018/Plantae/9999/0.jpg", jpeg(0))  # in neither list


def write_vehicles(root):
    """PKU VehicleID, unpacked, with the lists of 2, 3 and 4 vehicles as those of 800 and more."""
    base = root / "VehicleID_V1.0"
    rows = dict.fromkeys((*TRAIN, *TEST), "")
    for c, i in product(rows, range(IMAGES)):
        rows[c] += f"{100 * c + i:07d} {c}\n"
        write(base / "image" / f"{100 * c + i:07d}.jpg", jpeg(100 * c + i))
    lists = {"train_list": TRAIN}
    lists |= {f"test_list_{n}": TEST[:m] for n, m in ((800, 2), (1600, 3), (2400, 4))}
    for name, classes in lists.items():
        write(base / "train_test_split" / f"{name}.txt", "".join(rows[c] for c in classes))
    write(base / "attribute" / "model_attr.txt", "1 0\n")
