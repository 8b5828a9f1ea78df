"""Datasets in the format of RefCOCO's tool REFER: images, instances.json and refs, which are objects with sentences.

    python data.py --check refcoco [--all]      which parts of a dataset are on disk, and whether they are whole

data/refcoco/{instances.json, refs(unc).p}      data/refcoco+/{instances.json, refs(unc).p}
data/refcocog/{instances.json, refs(umd).p, refs(google).p}
data/images/train2014/COCO_train2014_*.jpg      (or images/mscoco/images/train2014, as REFER keeps them)
data/shapes/{instances.json, refs(shapes).p, images/}      written here the first time it is needed
FOLDER/{instances.json, refs.json or refs*.p, images/}     any other dataset: --dataset FOLDER

instances.json: {"images": [{"file_name", "id"?, "height"?, "width"?}], "annotations"?: [{"id", "segmentation"}]}
refs: [{"image_id", "split", "sentences": ["text"] or [{"raw": "text"}], "segmentation" or "ann_id"}]
"?": may be missing. An image without an id has its file_name for it. "split": train and val are needed, others are
tests. file_name: below images/. Where to get RefCOCO: docs/data.md.
"""

import argparse
import codecs
import contextlib
import functools
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps
from tqdm import tqdm
from transformers import BertTokenizer


class InputError(ValueError):
    """An error to tell without a traceback. The message says what is wrong, where, and what to do."""


@contextlib.contextmanager
def input_errors(message: str):
    """Any error in this block becomes an InputError: the message, and the error's first line in brackets."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of Pillow, pickle, torch, timm, transformers: dozens of classes
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise InputError(f"{message} ({kind}{error}".partition("\n")[0] + ")") from None


def command_line(main):
    """Decorate a script's main: a wrong input ends it with one message and status 1, without a traceback."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except (InputError, OSError) as error:
            # from a loader process the message holds a traceback; the text is at its end
            message = f"error: {str(error).rpartition('InputError: ')[2].strip()}"
        except KeyboardInterrupt:
            message = "stopped by Ctrl-C"
        except Exception:
            if not torch.distributed.is_initialized():
                raise
            message = traceback.format_exc()
        if torch.distributed.is_initialized():
            print(message, file=sys.stderr, flush=True)
            os._exit(1)  # at once: NCCL's clean-up can wait for the other processes, which wait for this one
        raise SystemExit(message)

    return wrapped


DATASETS = {  # name -> its refs file under --data, beside instances.json, and split -> (refs, images)
    "shapes": ("shapes/refs(shapes).p", {}),
    # the sizes: TensorFlow Datasets' documentation of ref_coco; the paper's 54,822 objects of G-Ref are more than these
    "refcoco": ("refcoco/refs(unc).p",
                {"train": (42404, 16994), "val": (3811, 1500), "testA": (1975, 750), "testB": (1810, 750)}),
    "refcoco+": ("refcoco+/refs(unc).p",
                 {"train": (42278, 16992), "val": (3805, 1500), "testA": (1975, 750), "testB": (1798, 750)}),
    "refcocog-umd": ("refcocog/refs(umd).p", {"train": (42226, 21899), "val": (2573, 1300), "test": (5023, 2600)}),
    "refcocog-google": ("refcocog/refs(google).p", {"train": (44822, 24698), "val": (5000, 4650)}),
}  # fmt: skip


# Reading: pickles, masks, images
codecs.register_error("as latin-1", lambda error: (error.object[error.start : error.end].decode("latin-1"), error.end))


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists and dicts; a pickle that names any class or function is refused unrun."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"refused, since it names {module}.{name}; refs are plain data only")


def read_refs(path: Path) -> list[dict]:
    """The refs of a JSON file, or of a pickle by Python 2 (byte strings in UTF-8, a few in Latin-1) or Python 3."""
    content = path.read_bytes()
    with input_errors(f"{path} is not a list of refs, or not whole"):
        if path.suffix == ".json":
            refs = json.loads(content)
        else:
            refs = PlainUnpickler(io.BytesIO(content), encoding="utf-8", errors="as latin-1").load()
        if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
            raise ValueError("not a list of dicts")
        return refs


def rasterize(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """COCO segmentation -> bool [height, width], as COCO's own tools decode it.

    A segmentation is a list of polygons [x0, y0, x1, y1, ..] in pixels, of RLEs, or of both: the mask is their union.
    Or it is one RLE {"size": [h, w], "counts": ..}, with counts as a list or as COCO's compressed string, which must
    fill the image exactly. Any other raises an error of some class.
    """
    mask = np.zeros((width, height), dtype=bool)  # column by column, as COCO has it
    for one in [segmentation] if isinstance(segmentation, dict) else segmentation:
        (draw_rle if isinstance(one, dict) else draw_polygon)(mask, one)
    return mask.T


def draw_polygon(mask: np.ndarray, polygon: list[float]) -> None:
    """Set the pixels of [x0, y0, x1, y1, ..] in mask, bool [width, height], by COCO's rule.

    The outline is walked on a grid five times finer, one step along its longer axis at a time. Each step
    that crosses the middle of a pixel column toggles the column from there downwards.
    """
    width, height = mask.shape
    points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    start = (5 * points + 0.5).astype(np.int64)  # [P, 2]
    along = np.roll(start, -1, axis=0) - start  # the edges [P, 2]
    steps = np.abs(along).max(axis=1)
    back = along.min(axis=1) == -steps  # edges walked from their end
    start[back] += along[back]
    along[back] *= -1
    edge = np.repeat(np.arange(len(points)), steps + 1)  # [S], the edge of each point of the walk
    step = np.arange(len(edge)) - np.searchsorted(edge, edge)  # [S], the steps that each has gone along its edge
    slope = along / np.maximum(steps, 1)[:, None]
    walk = (start[edge] + slope[edge] * step[:, None] + 0.5).astype(np.int64)  # [S, 2]
    sideways = (walk[1:, 0] != walk[:-1, 0]) & (edge[1:] == edge[:-1])
    x, y = np.minimum(walk[1:], walk[:-1])[sideways].T
    column, rest = np.divmod(x - 2, 5)
    row = ((y + 2) // 5).clip(0, height)  # the first whose middle lies below
    crossing = (rest == 0) & (column >= 0) & (column < width)
    column, row = column[crossing], row[crossing]
    if len(column):
        first, columns = column.min(), np.ptp(column) + 1  # all that the polygon touches
        toggles = np.bincount((column - first) * (height + 1) + row, minlength=columns * (height + 1))
        inside = np.bitwise_xor.accumulate(toggles.astype(np.uint8).reshape(columns, -1) & 1, axis=1)
        mask[first : first + columns] |= inside[:, :height].view(bool)


def draw_rle(mask: np.ndarray, rle: dict) -> None:
    """Set the pixels of COCO's run lengths, background first, in mask, bool [width, height]."""
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        counts = decode_counts(counts if isinstance(counts, str) else counts.decode())
    counts = np.asarray(counts, dtype=np.int64)
    if list(rle["size"]) != [*mask.T.shape] or ((counts < 0) | (counts > mask.size)).any() or counts.sum() != mask.size:
        raise ValueError(f"an RLE of size {list(rle['size'])} does not fill an image of {mask.T.shape} exactly")
    mask |= np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(mask.shape)


def decode_counts(text: str) -> list[int]:
    """COCO's compressed counts: 5 bits a character, lowest first; the fourth and later add to the count two before."""
    counts = []
    for number in re.findall("[P-o]{,11}[0-O]", text):  # P to o have bit 0x20: the number goes on after them
        bits = [(ord(character) - 48) & 0x1F for character in number]
        value = sum(five << 5 * place for place, five in enumerate(bits))
        if bits[-1] & 0x10:  # the sign
            value -= 1 << 5 * len(bits)
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts


def to_rgb(image: Image.Image, upright: bool = True) -> Image.Image:
    """An image in RGB, 16-bit grey scaled to 8, and, if upright, rotated as its EXIF tag says."""
    if upright:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # convert("RGB") would clip these at 255
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def open_image(path: str | Path, upright: bool = True) -> Image.Image:
    """An image file in RGB, see `to_rgb`. Raises InputError if it can't be read."""
    with input_errors(f"{path} can't be read as an image"):
        image = Image.open(path)
        image.load()
        return to_rgb(image, upright)


def to_input(image: Image.Image, image_size: int) -> torch.Tensor:
    """An RGB image of any size -> uint8 [3, image_size, image_size]. LAVT: squeezed to a square, never flipped.

    VEGA.forward standardises it.
    """
    pixels = np.asarray(image.resize((image_size, image_size), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


# Words


def make_tokenizer(expressions: list[str]) -> BertTokenizer:
    """BERT's tokenizer, whose vocabulary is the whole words of these expressions; others become [UNK]."""
    bare = BertTokenizer(do_lower_case=True).backend_tokenizer
    text = bare.normalizer.normalize_str(" ".join(expressions))
    words = sorted({word for word, _ in bare.pre_tokenizer.pre_tokenize_str(text)})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return BertTokenizer(vocab={word: i for i, word in enumerate(special + words)}, do_lower_case=True)


def tokenize(tokenizer: BertTokenizer, expressions: list[str], max_tokens: int) -> dict[str, torch.Tensor]:
    """Expressions -> "input_ids" and "attention_mask", int64 [E, T]; cut to max_tokens, padded to the longest, T."""
    options = dict(truncation=True, max_length=max_tokens, padding=True, return_token_type_ids=False)
    return dict(tokenizer(expressions, **options, return_tensors="pt"))


# The dataset


def locate(name: str, data: Path) -> Path:
    """The refs file of a dataset in DATASETS, of a folder, or itself. Draws the shapes if they are not there."""
    if name in DATASETS:
        refs = data / DATASETS[name][0]
        if name == "shapes" and not refs.parent.exists():
            generate_shapes(refs.parent)
        return refs
    if not Path(name).exists():
        raise InputError(f"there is no dataset {name}: give a folder, a refs file or one of {', '.join(DATASETS)}")
    inside = [*Path(name).glob("refs*.p"), *Path(name).glob("refs.json")]
    found = sorted(inside) if Path(name).is_dir() else [Path(name)]
    if len(found) != 1:
        raise InputError(f"{name} must hold one refs file, or name one of them; it holds: {', '.join(map(str, found))}")
    return found[0]


class ReferredObject(NamedTuple):
    """An object that sentences refer to, kept small, because loader processes may copy it."""

    ref_id: int
    image_id: int | str
    file_name: str
    height: int
    width: int
    segmentation: bytes  # as JSON
    sent_ids: list[int]
    sentences: list[str]


@functools.lru_cache(maxsize=1)
def read_dataset(name: str, data: str, image_folder: str | None = None) -> tuple[dict[str, list[ReferredObject]], Path]:
    """The objects of each split, an image's side by side, and the folder of the images.

    Ids and image sizes may be missing from files of one's own; they are filled in. name: see `locate`; data: the folder
    of the datasets that have a name; image_folder: where the images are, if not beside the refs or where COCO's are.
    """
    refs_file = locate(name, Path(data))
    instances_file = refs_file.with_name("instances.json")
    for file in (instances_file, refs_file):
        if not file.is_file():
            raise InputError(f"{file} is missing: see docs/data.md, or take --dataset shapes")
    refs = read_refs(refs_file)
    with input_errors(f"{instances_file} is not JSON, or it or {refs_file} is not in REFER's format"):
        instances = json.loads(instances_file.read_bytes())
        entries = {image.get("id", image["file_name"]): image for image in instances["images"]}
        if len(entries) < len(instances["images"]):
            raise ValueError("two images of the same id")
        annotations = {a["id"]: a["segmentation"] for a in instances.get("annotations", [])}
        place = {image_id: number for number, image_id in enumerate(entries)}
        refs = sorted(enumerate(refs), key=lambda pair: place.get(pair[1]["image_id"], -1))  # an image's side by side
    coco = [Path(data) / "images/train2014", Path(data) / "images/mscoco/images/train2014"]
    folders = [*sorted((refs_file.parent / "images").glob("**/")), *coco]  # below images/, as RRSIS-D has it
    folders = [Path(image_folder)] if image_folder else folders
    sample = [str(image["file_name"]) for image in instances["images"][:20]]
    folder = max(folders, key=lambda folder: sum((folder / file).is_file() for file in sample))
    if not folder.is_dir():
        raise InputError(f"there is no folder of images for {name}: say where they are with --image-folder DIR")

    objects, sentence_count = {}, 0
    for number, ref in refs:
        ref_id = ref.get("ref_id", number)
        with input_errors(f"ref {ref_id} of {name} or its image {ref.get('image_id')} is not in order"):
            image = entries.get(ref["image_id"])
            segmentation = ref.get("segmentation") or annotations.get(ref.get("ann_id"))
            if image is None:
                raise ValueError(f"there is no image {ref['image_id']!r} in instances.json")
            if segmentation is None:
                raise ValueError("there is no segmentation here or under its ann_id")
            if "height" not in image:
                image["width"], image["height"] = Image.open(folder / image["file_name"]).size
            height, width = int(image["height"]), int(image["width"])
            if min(height, width) < 1:
                raise ValueError(f"its image cannot have {height} x {width} pixels")
            if not re.fullmatch(r"\w[\w.+-]{0,50}", ref["split"]):
                raise ValueError(f"its split must be a short name such as 'val', not {ref['split']!r}")
            sentences = ref["sentences"] if isinstance(ref["sentences"], (list, tuple)) else []
            # "raw" is as typed; REFER's "sent" is cleaned (LAVT: raw)
            sentences = [one if isinstance(one, dict) else {"raw": one} for one in sentences]
            if not sentences or not all(isinstance(one["raw"], str) for one in sentences):  # blank ones are kept
                raise ValueError("its sentences must be a list of one or more texts")
            item = ReferredObject(
                ref_id, ref["image_id"], image["file_name"], height, width,
                json.dumps(segmentation, default=bytes.decode).encode(),
                [one.get("sent_id", sentence_count + i) for i, one in enumerate(sentences)],
                [one["raw"].encode(errors="replace").decode().strip() for one in sentences],
            )  # fmt: skip
        objects.setdefault(ref["split"], []).append(item)
        sentence_count += len(sentences)
    return objects, folder


class RefDataset(torch.utils.data.Dataset):
    """One split of a dataset in REFER's format; name, data and image_folder: see `read_dataset`.

    Training: item (epoch, i) is object i with one of its sentences (LAVT: one an epoch), drawn at random. The
    seed of the draw is (seed, epoch, i), so workers and ranks don't change it. Evaluation: item i is sentence i.

    Each item is a dict of "image" uint8 [3, S, S], "mask" bool [S, S], "input_ids" and "attention_mask"
    int64 [T] (T: tokens of the split's longest sentence), "index" the number of the sentence in `expressions`.
    Without a tokenizer, items have no tokens. LAVT: no augmentation; yours goes to the comment in `__getitem__`.
    """

    def __init__(
        self, name: str, split: str, data: str | Path = "data", image_folder: str | None = None,
        tokenizer: BertTokenizer | None = None, max_tokens: int = 21, image_size: int = 480, training: bool = False,
        seed: int = 0,
    ):  # fmt: skip
        self.name, self.split = name, split
        objects, self.folder = read_dataset(name, str(data), image_folder)
        if split not in objects:
            message = f"{name} has no split {split!r}; it has {', '.join(objects) or 'none'}"
            raise InputError(f"{message}. Refs to train on have the split 'train', those to validate on 'val'")
        self.objects = objects[split]
        self.expressions = [text for item in self.objects for text in item.sentences]
        self.owners = [number for number, item in enumerate(self.objects) for _ in item.sentences]  # in `objects`
        self.first = np.cumsum([0] + [len(item.sentences) for item in self.objects])  # an object's first sentence
        self.image_size, self.training, self.seed = image_size, training, seed
        self.tokens = tokenize(tokenizer, self.expressions, max_tokens) if tokenizer else {}
        self.decoded = self.drawn = (None, None)  # the last image's id and input, the last object's mask

    def __len__(self) -> int:
        return len(self.objects) if self.training else len(self.expressions)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        index = key
        if self.training:
            epoch, number = key
            index = int(np.random.default_rng((self.seed, epoch, number)).integers(*self.first[number : number + 2]))
        if self.decoded[0] != self.object_of(index).image_id:
            self.decoded = self.object_of(index).image_id, to_input(self.image(index), self.image_size)
        if self.drawn[0] != self.owners[index]:
            size = self.image_size, self.image_size
            mask = Image.fromarray(self.mask(index)).resize(size, Image.Resampling.NEAREST)
            self.drawn = self.owners[index], torch.from_numpy(np.array(mask))
        # an augmentation goes here: it must change mask and image alike, and leave self.decoded and self.drawn alone
        tokens = {name: values[index] for name, values in self.tokens.items()}
        return {"image": self.decoded[1], "mask": self.drawn[1], **tokens, "index": index}

    def ids(self, index: int) -> dict:
        """Of sentence `index`, for logs."""
        item = self.object_of(index)
        sent_id = item.sent_ids[index - self.first[self.owners[index]]]
        expression = self.expressions[index]
        return {"ref_id": item.ref_id, "sent_id": sent_id, "image_id": item.image_id, "expression": expression}

    def object_of(self, index: int) -> ReferredObject:
        """The object that sentence `index` names."""
        return self.objects[self.owners[index]]

    def image(self, index: int) -> Image.Image:
        """The image of sentence `index`, RGB at the file's own size, which may differ from that in instances.json.

        Raises InputError if height / width differs by more than 10 %.
        """
        item = self.object_of(index)
        image = open_image(self.folder / item.file_name, upright=False)  # COCO's masks fit it as stored
        if abs(image.width / image.height * item.height / item.width - 1) > 0.1:
            sizes = f"is {image.width} x {image.height}, but instances.json says {item.width} x {item.height}"
            raise InputError(f"{item.file_name} {sizes}: its mask would not fit")
        return image

    def mask(self, index: int) -> np.ndarray:
        """The target of sentence `index`, bool at the size that instances.json gives."""
        item = self.object_of(index)
        with input_errors(f"ref {item.ref_id} of {self.name} is no list of polygons [x0, y0, ..] or RLEs"):
            return rasterize(json.loads(item.segmentation), item.height, item.width)


# Pictures, and the check before a long run

GREEN, RED, WHITE = (40, 220, 90), (255, 60, 60), (255, 255, 255)


def overlay(image: Image.Image, mask: np.ndarray | torch.Tensor, color: tuple[int, int, int]) -> Image.Image:
    """The image, dimmed outside the mask (bool [h, w], resized to the image); the mask is outlined in the colour."""
    mask = Image.fromarray(np.asarray(mask)).convert("L").resize(image.size, Image.Resampling.NEAREST)
    shown = Image.composite(image, image.point(lambda value: 0.4 * value), mask)
    shown.paste(color, mask=ImageChops.subtract(mask, mask.filter(ImageFilter.MinFilter(3))))
    return shown


def save_grid(path: Path, rows: list[tuple[str, list[tuple[str, Image.Image]]]], side: int = 240) -> None:
    """Write a PNG of rows (title, [(caption, tile), ..]), the tiles squeezed to squares."""
    gap, line = 10, 22
    pitch = 2 * line + side + gap
    width = gap + max(len(tiles) for _, tiles in rows) * (side + gap)
    canvas = Image.new("RGB", (width, gap + len(rows) * pitch), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (title, tiles) in enumerate(rows):
        draw.text((gap, gap + i * pitch), title, "black", font_size=16)
        for j, (caption, tile) in enumerate(tiles):
            left, top = gap + j * (side + gap), gap + i * pitch + line
            draw.text((left, top), caption, "dimgrey", font_size=14)
            canvas.paste(tile.resize((side, side), Image.Resampling.BILINEAR), (left, top + line))
    canvas.save(path)


def check(name: str, data: str = "data", image_folder: str | None = None, every_image: bool = False) -> bool:
    """Print which parts of a dataset are on disk and what is wrong, and draw 12 samples; True if nothing is wrong."""
    splits, folder = read_dataset(name, data, image_folder)  # raises what training would raise
    print(f"{name}; images in {folder}")
    wrong, sizes = [], DATASETS[name][1] if name in DATASETS else {}
    for split in dict.fromkeys([*sizes, "train", "val", *splits]):
        items = splits.get(split, [])
        found = len(items), len({item.image_id for item in items})
        print(f"{split}: {found[0]} refs of {found[1]} images, {sum(len(item.sentences) for item in items)} sentences")
        if found != sizes.get(split, found):
            wrong.append(f"{split}: WRONG, not {sizes[split]}")
        elif not items:
            wrong.append(f"{split}: MISSING, and needed to train")
    items = [item for items in splits.values() for item in items]
    missing = {item.file_name for item in items if not (folder / item.file_name).is_file()}
    print(f"blank sentences: {sum(not text for item in items for text in item.sentences)}")
    print(f"image files missing: {len(missing)}")
    wrong += [f"missing: {file}" for file in sorted(missing)[:5]]

    datasets = [RefDataset(name, split, data, image_folder) for split in splits]
    samples = [(d, i) for d in datasets for i in d.first[:-1] if d.object_of(i).file_name not in missing]
    np.random.default_rng(0).shuffle(samples)
    samples = samples if every_image else samples[:200]  # whose image is decoded and mask is drawn
    broken, tiles, empty = [], [], 0
    for dataset, index in tqdm(samples, desc="decoding", unit="object", disable=None):
        try:
            image, mask = dataset.image(index), dataset.mask(index)
        except InputError as error:
            broken.append(f"broken: {error}")
            continue
        empty += not mask.any()
        if len(tiles) < 24:
            tiles += [(dataset.expressions[index], image), ("", overlay(image, mask, GREEN))]
    print(f"decoded: {len(samples)} images and masks{'' if every_image else ' (--all: all)'}; broken: {len(broken)}")
    print(f"masks without a pixel: {empty}")
    wrong += [f"{empty} masks without a pixel: do they lie outside of their images?"] * (empty > 0)
    print("\n".join(wrong + broken[:5]) or "nothing wrong was found")
    if tiles:
        picture = Path("runs") / f"check-{Path(name).resolve().name}.png"
        picture.parent.mkdir(exist_ok=True)
        save_grid(picture, [("", tiles[i : i + 6]) for i in range(0, len(tiles), 6)])
        print(f"{len(tiles) // 2} samples with their masks: {picture}")
    return not (wrong or broken)


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", required=True, metavar="NAME", help=f"{', '.join(DATASETS)}, or a folder")
    parser.add_argument("--data", default="data", metavar="DIR", help="where the datasets are (default: data)")
    parser.add_argument("--image-folder", metavar="DIR", help="where the images are, if not where it says above")
    parser.add_argument("--all", action="store_true", help="decode every image and mask, not a sample of 200")
    args = parser.parse_args(argv)
    if not check(args.check, args.data, args.image_folder, args.all):
        raise SystemExit(1)


# The generated shapes

CANVAS = 128  # pixels a side
COLORS = {
    "red": (214, 48, 48), "yellow": (228, 205, 50), "green": (50, 165, 70),
    "cyan": (60, 200, 215), "blue": (50, 80, 205), "purple": (150, 60, 180),
}  # fmt: skip
SIZES = {"small": (10.0, 12.0), "large": (16.0, 19.0)}  # radius in pixels of the circle of the same area
MARGIN = 12  # by so many pixels a target must lie further left, right, up or down than what it is compared with
DIRECTIONS = [  # a direction (x, y), two sentences for a place in it, two for a relation to another object
    ((-1, 0), ("left {}", "{} on the left"), ("{} left of the {}", "{} to the left of the {}")),
    ((1, 0), ("right {}", "{} on the right"), ("{} right of the {}", "{} to the right of the {}")),
    ((0, -1), ("top {}", "{} at the top"), ("{} above the {}", "{} over the {}")),
    ((0, 1), ("bottom {}", "{} at the bottom"), ("{} below the {}", "{} under the {}")),
]
PHRASES = ("{shape}", "{color} thing", "{color} {shape}", "{size} {shape}", "{size} {color} {shape}")
SCENES = {  # split -> number of scenes, and one kind for each target in a scene; each target gets two sentences
    "train": (3600, ("attribute", "place", "relation")),
    "val": (200, ("attribute", "place", "relation")),
    "testA": (200, ("attribute", "attribute")),
    "testB": (200, ("place", "relation")),
}


def star(points: int, inner: float) -> np.ndarray:
    """The corners [2 * points, 2] of a star around (0, 0), every other one at the inner radius."""
    angles = np.arange(2 * points) * math.pi / points - math.pi / 2
    return np.tile([1.0, inner], points)[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)


def unit_area(points: np.ndarray) -> np.ndarray:
    """A polygon scaled to the area of the unit circle."""
    x, y = points.T
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    return points * math.sqrt(math.pi / area)


HALF = np.array([(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3)])  # the right half of a cross's outline
SHAPES = {
    "circle": unit_area(star(24, 1.0)),
    "square": unit_area(np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])),
    "triangle": unit_area(star(3, 0.5)),
    "star": unit_area(star(5, 0.45)),
    "cross": unit_area(np.concatenate([HALF, -HALF])),
}


def sample_scene(rng: np.random.Generator) -> list[dict]:
    """3 to 6 objects that don't touch, of few shapes and colours, so that look-alikes are the rule."""
    while True:
        shapes = rng.choice(list(SHAPES), 3, replace=False)
        colors = rng.choice(list(COLORS), 3, replace=False)
        objects = []
        for _ in range(int(rng.integers(3, 7))):
            shape, color, size = rng.choice(shapes), rng.choice(colors), rng.choice(list(SIZES))
            angle = rng.uniform(-0.3, 0.3)
            turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            polygon = SHAPES[shape] @ turn * rng.uniform(*SIZES[size])
            reach = np.linalg.norm(polygon, axis=1).max()
            for _ in range(20):
                center = rng.uniform(reach + 1, CANVAS - reach - 1, 2)
                if all(np.linalg.norm(center - o["center"]) > reach + o["reach"] + 2 for o in objects):
                    break
            else:
                break  # no room for it
            polygon = (polygon + center).round(2)
            objects.append(dict(shape=shape, color=color, size=size, center=center, reach=reach, polygon=polygon))
        else:
            return objects


def describe(objects: list[dict], target: dict, kind: str) -> list[list[str]]:
    """Pairs of sentences of a kind that fit `target` and nothing else here; places and relations hold by MARGIN."""

    def names(item):  # each name that fits the item, and all objects that it fits
        for phrase in PHRASES:
            name = phrase.format(**item)
            yield name, [o for o in objects if phrase.format(**o) == name]

    def unique_names(item):
        return [name for name, fits in names(item) if len(fits) == 1]

    def ahead(item, other, direction):  # pixels by which item lies further in a direction
        return np.dot(item["center"] - other["center"], direction)

    if kind == "attribute":
        unique = unique_names(target)
        return [[a, b] for a in unique for b in unique if a != b] or [[a, f"the {a}"] for a in unique]
    found = []
    for (name, fits), (direction, places, relations) in itertools.product(names(target), DIRECTIONS):
        rivals = [o for o in fits if o is not target]
        if kind == "place" and rivals and all(ahead(target, o, direction) >= MARGIN for o in rivals):
            found.append([wording.format(name) for wording in places])
        for landmark in objects if kind == "relation" else ():
            others = [o for o in rivals if o is not landmark]
            distance = ahead(target, landmark, direction)
            aside = np.abs(target["center"] - landmark["center"]).sum() - abs(distance)
            clear = distance >= max(MARGIN, aside) and all(ahead(o, landmark, direction) <= 0 for o in others)
            if others and clear:  # the target itself is no landmark: it lies no pixel ahead of itself
                found += [[wording.format(name, other) for wording in relations] for other in unique_names(landmark)]
    return found


def draw_scene(objects: list[dict], rng: np.random.Generator) -> Image.Image:
    """The scene on a grey ground with a slope of brightness, jittered colours and noise."""
    zoom = 4  # drawn larger, then shrunk: smooth edges
    canvas = Image.new("RGBA", (CANVAS * zoom, CANVAS * zoom))
    for item in objects:
        color = np.clip(np.array(COLORS[item["color"]]) + rng.integers(-20, 21, 3), 0, 255)
        ImageDraw.Draw(canvas).polygon([tuple(point * zoom) for point in item["polygon"]], tuple(map(int, color)))
    canvas = np.asarray(canvas.resize((CANVAS, CANVAS), Image.Resampling.BOX), dtype=np.float32)
    down, across = rng.uniform(-30, 30, (2, 1)) * np.linspace(-0.5, 0.5, CANVAS)
    ground = rng.uniform(80, 180) + (down[:, None] + across)[..., None]
    opacity = canvas[..., 3:] / 255
    pixels = canvas[..., :3] * opacity + ground * (1 - opacity) + rng.normal(0, 10, (CANVAS, CANVAS, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def generate_shapes(folder: Path, seed: int = 0, scenes: dict = SCENES) -> None:
    """Write the shapes dataset in REFER's format; the same seed gives the same bytes."""
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")  # a kill leaves no half dataset
    (unfinished / "images").mkdir(parents=True)
    print(f"drawing the shapes dataset into {folder}", flush=True)
    images, annotations, refs = [], [], []
    todo = [(number, split, scene) for number, split in enumerate(scenes) for scene in range(scenes[split][0])]
    for split_number, split, scene in tqdm(todo, desc="drawing", unit="scene", disable=None):
        rng = np.random.default_rng((seed, split_number, scene))
        targets = None
        while targets is None:
            objects = sample_scene(rng)
            targets = choose_targets(objects, scenes[split][1], rng)
        file_name, first = f"{len(images):06d}.jpg", len(annotations)
        draw_scene(objects, rng).save(unfinished / "images" / file_name, quality=92)
        image_id = {"image_id": len(images)}
        for item in objects:
            annotations.append({
                "id": len(annotations), **image_id, "category_id": 1 + list(SHAPES).index(item["shape"]),
                "segmentation": [item["polygon"].ravel().tolist()],
                "attributes": {name: item[name] for name in ("shape", "color", "size")},
            })  # fmt: skip
        for position, texts in targets:
            ids = [2 * len(refs), 2 * len(refs) + 1]
            sentences = [{"sent_id": i, "sent": one, "raw": one, "tokens": one.split()} for i, one in zip(ids, texts)]
            refs.append({
                "ref_id": len(refs), "ann_id": first + position, **image_id, "split": split,
                "category_id": annotations[first + position]["category_id"], "file_name": file_name,
                "sent_ids": ids, "sentences": sentences,
            })  # fmt: skip
        images.append({"id": len(images), "file_name": file_name, "height": CANVAS, "width": CANVAS})
    categories = [{"id": 1 + i, "name": shape} for i, shape in enumerate(SHAPES)]
    instances = {"info": {"seed": seed}, "images": images, "annotations": annotations, "categories": categories}
    (unfinished / "instances.json").write_text(json.dumps(instances))
    refs = json.loads(json.dumps(refs))  # copies: pickle would write objects that repeat as references
    (unfinished / "refs(shapes).p").write_bytes(pickle.dumps(refs, protocol=2))
    if folder.exists():  # another run was faster
        shutil.rmtree(unfinished)
    else:
        unfinished.rename(folder)


def choose_targets(objects: list[dict], kinds: tuple[str, ...], rng: np.random.Generator) -> list | None:
    """For each kind another object and two sentences that name it; None if the scene lacks such an object."""
    targets, free = [], rng.permutation(len(objects)).tolist()
    for kind in reversed(kinds):  # the rarest first
        for position in free:
            if found := describe(objects, objects[position], kind):
                break
        else:
            return None
        free.remove(position)
        targets.append((position, found[rng.integers(len(found))]))
    return targets


if __name__ == "__main__":
    main()
