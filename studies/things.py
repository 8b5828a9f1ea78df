"""A second task for the study: photographed things and their English names, as a folder in the format of docs/data.md.

    apt-get install tuxpaint-stamps-default     the pictures: cut out, most of them photographs; GPL-2
    python -m studies.things data/things
    python data.py --check data/things

A scene shows 3 to 5 things of three kinds on a plain ground. A thing is named by its kind ("the zebra"), by its place
among its like ("the left zebra"), or by its relation to a thing of another kind ("the zebra above the red apple").
Splits: train, val and test show the same kinds and the same pictures in other scenes; unseen shows kinds that no other
split shows or names. Nothing of the pictures is in this repository.
"""

import argparse
import functools
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import InputError, command_line

STAMPS = Path("/usr/share/tuxpaint/stamps")  # where Debian puts them
TOPICS = ("animals", "clothes", "food", "hobbies", "household", "plants", "sports", "vehicles")
SCENES = {"train": 2400, "val": 300, "test": 300, "unseen": 300}
SIDE = 192  # pixels of a scene
CLEAR = 16  # pixels by which centres differ at least where a sentence says "left", "right", "above" or "below"
PLACES = {  # a direction in x and y, a place among its like, a relation
    (-1, 0): ("left", "left of"), (1, 0): ("right", "right of"),
    (0, -1): ("upper", "above"), (0, 1): ("lower", "below"),
}  # fmt: skip


def find_kinds(stamps: Path) -> dict[str, list[Path]]:
    """The pictures of each kind: those with a short English name, but for drawings, which lie in folders "cartoon"."""
    kinds = defaultdict(list)
    for picture in sorted(path for topic in TOPICS for path in stamps.glob(f"{topic}/**/*.png")):
        text = picture.with_suffix(".txt")
        title = text.read_text(encoding="utf-8").splitlines()[0] if text.exists() else ""
        name = re.fullmatch(r"(?:An?|The|Some) (?:pair of |cluster of )?((?:[a-z-]+ ){0,2}[a-z-]+)\.?", title, re.I)
        if name and "cartoon" not in picture.parts:
            kinds[name[1].lower()].append(picture)
    return dict(kinds)


def split_kinds(kinds: list[str], rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Seven eighths of the kinds for training, and the others. Kinds of one noun, such as apples, stay together."""
    nouns = rng.permutation(sorted({kind.split()[-1] for kind in kinds}))
    unseen = set(nouns[: max(3, len(nouns) // 8)])
    return [k for k in kinds if k.split()[-1] not in unseen], [k for k in kinds if k.split()[-1] in unseen]


@functools.cache
def open_stamp(path: Path) -> Image.Image:
    """A picture, RGBA, cropped to what can be seen of it, at most half a scene long."""
    stamp = Image.open(path).convert("RGBA")
    stamp = stamp.crop(stamp.getchannel("A").getbbox())
    stamp.thumbnail((SIDE // 2, SIDE // 2))
    return stamp


def draw_scene(kinds: dict[str, list[Path]], rng: np.random.Generator) -> tuple[Image.Image, list[dict]] | None:
    """A scene and its things, each with "kind", "mask" and "center"; None if they find no room."""
    corners = rng.integers(60, 240, (2, 2, 3), dtype=np.uint8)  # of the ground
    scene = Image.fromarray(corners).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    chosen = []
    while len(chosen) < 3:  # "the apple" would be unclear beside a green apple
        kind = str(rng.choice([*kinds]))
        if kind.split()[-1] not in {other.split()[-1] for other in chosen}:
            chosen.append(kind)
    chosen += rng.choice(chosen, rng.integers(3)).tolist()
    things, boxes = [], []
    for kind in chosen:
        paths = kinds[kind]
        stamp = open_stamp(paths[rng.integers(len(paths))])
        if rng.random() < 0.5:
            stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        scale = rng.uniform(0.22, 0.42) * SIDE / max(stamp.size)
        stamp = stamp.resize([max(4, round(scale * side)) for side in stamp.size], Image.Resampling.LANCZOS)
        for _ in range(30):
            left, top = (int(rng.integers(SIDE - side)) for side in stamp.size)
            box = left, top, left + stamp.width, top + stamp.height
            if all(box[2] <= b[0] or b[2] <= box[0] or box[3] <= b[1] or b[3] <= box[1] for b in boxes):
                break
        else:
            return None
        boxes.append(box)
        scene.paste(stamp, (left, top), stamp)
        mask = np.zeros((SIDE, SIDE), bool)
        mask[top : box[3], left : box[2]] = np.asarray(stamp)[..., 3] > 127
        if not mask.any():
            return None
        things.append({"kind": kind, "mask": mask, "center": ((left + box[2]) / 2, (top + box[3]) / 2)})
    return scene, things


def name_thing(thing: dict, things: list[dict]) -> list[str]:
    """All sentences that fit this thing and no other of the scene, by the module's rules; maybe none."""
    kind, like = thing["kind"], [other for other in things if other["kind"] == thing["kind"] and other is not thing]
    if not like:
        return [f"the {kind}", kind]

    def ahead(one, other, direction):  # pixels by which the centre of `one` lies further in a direction
        return np.dot(np.subtract(one["center"], other["center"]), direction)

    sentences = []
    alone = [one for one in things if sum(one["kind"] == other["kind"] for other in things) == 1]
    for direction, (place, relation) in PLACES.items():
        if all(ahead(thing, other, direction) >= CLEAR for other in like):
            sentences.append(f"the {place} {kind}")
        for mark in alone:
            if ahead(thing, mark, direction) >= CLEAR and all(ahead(other, mark, direction) <= 0 for other in like):
                sentences.append(f"the {kind} {relation} the {mark['kind']}")
    return sentences


def to_rle(mask: np.ndarray) -> dict:
    """COCO's RLE: the lengths of the runs of 0 and 1 in turn, down the columns, 0 first."""
    changes = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False))
    return {"size": list(mask.shape), "counts": np.diff([0, *changes, mask.size]).tolist()}


def make_things(folder: Path, stamps: Path = STAMPS, scenes: dict[str, int] = SCENES, seed: int = 0) -> None:
    """Write the folder. One seed and one set of pictures give the same scenes."""
    kinds = find_kinds(stamps)
    seen, unseen = split_kinds([*kinds], np.random.default_rng(seed))
    if min(len({kind.split()[-1] for kind in part}) for part in (seen, unseen)) < 3:
        raise InputError(f"too few pictures in {stamps}: apt-get install tuxpaint-stamps-default, or give --stamps")
    if folder.exists():
        raise InputError(f"{folder} is there already: delete it, or name another folder")
    (folder / "images").mkdir(parents=True)
    images, refs = [], []
    todo = [(number, split, scene) for number, split in enumerate(scenes) for scene in range(scenes[split])]
    for number, split, scene in tqdm(todo, "drawing", unit="scene", disable=None):
        rng = np.random.default_rng((seed, number, scene))
        shown = {kind: kinds[kind] for kind in (unseen if split == "unseen" else seen)}
        while (drawn := draw_scene(shown, rng)) is None:
            pass
        picture, things = drawn
        file_name = f"{len(images):04d}.jpg"
        picture.save(folder / "images" / file_name, quality=90)
        for thing in things:
            if sentences := name_thing(thing, things):
                sentences = rng.permutation(sentences)[:3].tolist()
                ref = {"ref_id": len(refs), "image_id": len(images), "split": split, "sentences": sentences}
                refs.append({**ref, "segmentation": to_rle(thing["mask"])})
        images.append({"id": len(images), "file_name": file_name, "height": SIDE, "width": SIDE})
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": []}))
    (folder / "refs.json").write_text(json.dumps(refs))
    print(f"{folder}: {len(kinds)} kinds, {len(unseen)} of them in unseen alone; {len(refs)} refs")


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="to write; must not exist")
    parser.add_argument("--stamps", type=Path, default=STAMPS, metavar="DIR", help="where the pictures are")
    args = parser.parse_args(argv)
    make_things(args.folder, args.stamps)


if __name__ == "__main__":
    main()
