"""Score and draw a trained model on a dataset, or segment one's own images with it.

    python evaluate.py --split val testA testB --pictures 8     the newest run: the columns of Table 5, and pictures
    python evaluate.py --split val --shuffle-expressions        does the model listen to the words?
    python evaluate.py --image photo.jpg --expression "the man on the left" "the dog"
    python evaluate.py --checkpoint runs/NAME --push me/vega-refcoco

In Python: segment = evaluate.load("runs/NAME"); mask = segment("photo.jpg", "the dog")  # bool [height, width]
Under torchrun the batches are dealt to the ranks, and no sample is counted twice or dropped.
"""

import argparse
import atexit
import itertools
import json
import math
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import CommitOperationAdd, create_commit, create_repo
from PIL import Image, ImageDraw
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import BatchSampler, DataLoader
from tqdm import tqdm
from transformers import BertTokenizer

from data import (
    DATASETS, GREEN, RED, WHITE, InputError, RefDataset, command_line, input_errors, open_image, overlay, save_grid,
    to_input, to_rgb, tokenize,
)  # fmt: skip
from model import DEMO, VEGA, VEGAConfig, flag, load_model, model_file, read_about
from selection import RATIOS, VARIANTS

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
COLUMNS = (*(f"P@{t}" for t in THRESHOLDS), "mIoU", "oIoU")
BATCH_SIZE = 16  # of evaluation; fixed, so that scores do not vary with it through rounding
TABLE_5 = {  # the paper's scores, in the order of COLUMNS
    ("refcoco", "val"): (86.70, 83.69, 78.28, 67.11, 37.24, 76.27, 75.35),
    ("refcoco", "testA"): (89.00, 86.58, 82.09, 70.48, 37.05, 78.02, 77.97),
    ("refcoco", "testB"): (82.41, 79.00, 73.17, 63.14, 37.45, 73.02, 71.94),
    ("refcoco+", "val"): (76.75, 73.63, 68.64, 59.17, 32.48, 67.74, 66.70),
    ("refcoco+", "testA"): (83.09, 80.65, 75.48, 65.25, 34.19, 72.81, 72.08),
    ("refcoco+", "testB"): (67.78, 64.45, 58.83, 49.68, 29.37, 60.82, 59.85),
    ("refcocog-umd", "val"): (75.94, 70.98, 63.99, 51.90, 27.29, 67.22, 65.78),
    ("refcocog-umd", "test"): (76.13, 71.31, 64.60, 53.25, 27.87, 67.45, 66.93),
    ("refcocog-google", "val"): (73.22, 68.79, 63.00, 52.77, 27.96, 65.36, 63.49),
}


# Processes and devices
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun's processes


def pick_device(device: str | None) -> torch.device:
    """The device of that name, or CUDA if there is one; under torchrun each process has a GPU of its own.

    A GPU becomes the current one, so that nothing lands on GPU 0.
    """
    with input_errors(f"--device {device or 'cuda'} can't be used here; try --device cpu"):
        picked = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if picked.type == "cuda":
            picked = torch.device("cuda", int(os.environ.get("LOCAL_RANK", picked.index or 0)))
            torch.cuda.set_device(picked)
            torch.backends.cudnn.allow_tf32 = False  # else convolutions in fp32 round their inputs to TF32
        torch.zeros(1, device=picked)
        return picked


def start_processes(device: str | None) -> torch.device:
    """Join torchrun's process group, if there is one (nccl on CUDA, gloo on CPU); returns this process's device.

    Only rank 0 prints from here on.
    """
    device = pick_device(device)
    if WORLD > 1 and not dist.is_initialized():
        store, _, _ = next(rendezvous("env://", RANK, WORLD))
        # after a restart by torchrun the store still knows the addresses of the processes before: a prefix parts them
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD)
        atexit.register(dist.destroy_process_group)
    if RANK:
        sys.stdout = open(os.devnull, "w")
    return device


def autocast(device: torch.device, precision: str):
    """The context that a forward pass runs in. precision: fp32 or bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def resolve_precision(precision: str | None, device: torch.device) -> str:
    """The one asked for. If none (ours): bf16 on cards with bf16 in hardware, else fp32."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision or ("bf16" if has_bf16 else "fp32")


def gather(value=None) -> list:
    """The value of each process, by rank. All must call it, and none returns before all have called."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


wait_for_all = gather


def load_batches(dataset: RefDataset, batches, workers: int, device: torch.device):
    """Yield the batches, which are lists of the dataset's items, on the device."""
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # so that loading does not advance torch's global one
        # fork shares the dataset's memory; the fork server, Python 3.14's default, would copy it
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        timeout=600 if workers else 0,  # seconds: a worker that hangs ends the run, and --resume goes on
    )  # fmt: skip
    for batch in loader:
        yield {name: values.to(device, non_blocking=True) for name, values in batch.items()}


# Masks of one's own images


class Segmenter:
    """What `load` returns."""

    def __init__(self, source: str | Path, device: str | None = None, precision: str = "fp32"):
        self.model, self.tokenizer = load_model(source)
        self.device, self.precision = pick_device(device), precision
        self.model.to(self.device)

    def __call__(self, image: Image.Image | str | Path, expression: str) -> np.ndarray:
        """The image's pixels that the expression names: bool [height, width] at the image's own size."""
        return self.logits(image, [expression])[0] > 0

    @torch.inference_mode()
    def logits(self, image: Image.Image | str | Path, expressions: list[str]) -> np.ndarray:
        """float32 [E, height, width], positive where the image shows what the expression names; one forward pass."""
        image = to_rgb(image) if isinstance(image, Image.Image) else open_image(image)
        if not all(expression.strip() for expression in expressions):
            raise InputError("the expression is empty: say what to segment, such as 'the man on the left'")
        expressions = [expression.encode(errors="replace").decode() for expression in expressions]
        batch = tokenize(self.tokenizer, expressions, self.model.config.max_tokens)
        batch["image"] = to_input(image, self.model.config.image_size).expand(len(expressions), -1, -1, -1)
        with autocast(self.device, self.precision):
            logits = self.model(**{name: values.to(self.device) for name, values in batch.items()})["logits"]
        return F.interpolate(logits[:, None], (image.height, image.width), mode="bilinear")[:, 0].cpu().numpy()


def load(source: str | Path, device: str | None = None) -> Segmenter:
    """A trained model from a file, a run's folder or the Hub, to call: mask = segment(image, expression)."""
    return Segmenter(source, device)


def segment_images(segment: Segmenter, given: list[str], expressions: list[str], folder: Path) -> None:
    """Write each expression's mask and overlay, and a picture of all. given: images, or folders of them."""
    images, broken = [], []
    for path in map(Path, given):
        inside = sorted(one for one in path.glob("[!.]*") if one.suffix.lower() in Image.registered_extensions())
        images += inside or [path]
    if len({path.name for path in images}) < len(images) or folder.resolve() in [p.parent.resolve() for p in images]:
        raise InputError(f"two images have the same name, or one lies in {folder}, where the masks go")

    for expression in expressions:
        if segment.tokenizer.unk_token in segment.tokenizer.tokenize(expression.encode(errors="replace").decode()):
            print(f"note: the model has never seen some word of {expression!r}")
    for path in tqdm(images, unit="image", disable=None):
        try:
            image = open_image(path)
        except InputError as error:
            broken.append(str(error))
            continue
        masks = segment.logits(image, expressions) > 0
        folder.mkdir(parents=True, exist_ok=True)
        tiles = [("", image)]
        for number, (expression, mask) in enumerate(zip(expressions, masks), 1):
            slug = re.sub(r"\W+", "-", expression.lower()).strip("-")[:40]
            written = folder / f"{path.name}-{number}-{slug}.png"
            tiles.append((expression, overlay(image, mask, RED)))
            tiles[-1][1].save(written)
            Image.fromarray(mask).convert("L").save(written.with_suffix(".mask.png"))
            tqdm.write(f"{expression!r} covers {100 * mask.mean():.1f} % of {path}; the overlay is {written}")
        save_grid(folder / f"{path.name}-all.png", [(path.name, tiles)])
    if broken:
        raise InputError(f"{len(broken)} of {len(images)} images were left out: " + "\n".join(broken))


# Scores


class Metrics:
    """P@0.5 to P@0.9, mIoU and oIoU (Sec. 4.1), the same however the samples are dealt to processes."""

    def __init__(self):
        self.samples = []  # dicts: "index", "iou", "intersection" and "union" in pixels of the compared masks

    def update(self, prediction: torch.Tensor, target: torch.Tensor, indices: list[int]):
        """prediction, target: bool [B, H, W]; indices: the samples' numbers. The GPU is waited for once."""
        counts = torch.stack([(prediction & target).sum((1, 2)), (prediction | target).sum((1, 2))], dim=1).tolist()
        for index, (intersection, union) in zip(indices, counts):
            iou = intersection / union if union else 0.0  # LAVT: 0 where both are empty
            self.samples.append({"index": index, "iou": iou, "intersection": intersection, "union": union})

    def compute(self) -> dict:
        """{"P@0.5", .., "P@0.9", "mIoU", "oIoU"} in per cent, and "samples", their number."""
        ious = [sample["iou"] for sample in self.samples]
        # LAVT: >=; the paper says "higher than the threshold"
        scores = {f"P@{t}": 100 * sum(iou >= t for iou in ious) / len(ious) for t in THRESHOLDS}
        intersection, union = (sum(sample[name] for sample in self.samples) for name in ("intersection", "union"))
        scores["mIoU"] = 100 * math.fsum(ious) / len(ious)
        scores["oIoU"] = 100 * intersection / union if union else 0.0
        return {**scores, "samples": len(ious)}


def paper_scores(config: VEGAConfig, dataset: str, split: str) -> dict:
    """The paper's scores of a base model with this variant and ratio, as `Metrics.compute` names them; or none.

    vega on RefCOCO val is in several tables; of its rows the last counts, Table 5's.
    """
    rows = {("refcoco", "val", name, 0.3): (v.mIoU, v.oIoU) for name, v in VARIANTS.items() if v.oIoU}
    rows |= {("refcoco", "val", "vega", ratio): scores for ratio, scores in RATIOS.items()}
    rows |= {(*of, "vega", 0.3): scores for of, scores in TABLE_5.items()}
    scores = rows.get((dataset, split, config.variant, config.ratio), ())
    return dict(zip(reversed(COLUMNS), reversed(scores)))  # a shorter row is mIoU and oIoU, the last columns


def shuffle_expressions(dataset: RefDataset, seed: int = 0) -> None:
    """Every mask gets the sentence of another image, by a permutation without fixed points."""
    rng = np.random.default_rng(seed)
    images = itertools.groupby(range(len(dataset)), lambda index: dataset.object_of(index).image_id)
    images = [rng.permutation(list(indices)) for _, indices in images]
    rng.shuffle(images)
    longest = max(map(len, images))
    if 2 * longest > len(dataset):
        raise InputError("shuffled expressions need at least two images, none with more than half of the sentences")
    order = np.concatenate(images)  # image by image; moved on by `longest`, each sentence lands in another image
    source = np.roll(order, longest)[np.argsort(order)]  # sentence i becomes sentence source[i]
    dataset.expressions = [dataset.expressions[s] for s in source]
    dataset.tokens = {name: values[source] for name, values in dataset.tokens.items()}


@torch.no_grad()
def evaluate(
    model: VEGA, dataset: RefDataset, device: torch.device, precision: str = "fp32", workers: int = 0,
    resolution: str = "input",
) -> Metrics:  # fmt: skip
    """Score every sentence of every object once, in the same batches for any number of processes.

    resolution: "input" compares at the model's input size with the mask resized to it by nearest neighbour (LAVT);
    "original" at the size that instances.json gives the image, with the logits resized to it.
    """
    model.eval()
    metrics = Metrics()
    batches = list(BatchSampler(range(len(dataset)), BATCH_SIZE, drop_last=False))[RANK::WORLD]  # dealt whole
    loader = load_batches(dataset, batches, workers, device)
    for batch in tqdm(loader, dataset.split, len(batches), leave=False, unit="batch", disable=bool(RANK) or None):
        with autocast(device, precision):
            # .forward, since calling a compiled model would compile it again, for these shapes
            logits = model.forward(batch["image"], batch["input_ids"], batch["attention_mask"])["logits"]
        indices = batch["index"].tolist()
        if resolution == "input":
            metrics.update(logits > 0, batch["mask"], indices)  # ours: the target where its probability exceeds 0.5
            continue
        for index, own in zip(indices, logits):
            mask = torch.from_numpy(dataset.mask(index)).to(device)
            metrics.update(F.interpolate(own[None, None], mask.shape, mode="bilinear")[0] > 0, mask[None], [index])
    metrics.samples = sorted(itertools.chain(*gather(metrics.samples)), key=lambda sample: sample["index"])
    return metrics


def score_splits(model: VEGA, tokenizer: BertTokenizer, options, device: torch.device, folder: Path) -> dict:
    """Split -> scores. Prints a table; for a base model the paper's scores and the difference follow each row, where
    the paper has that split, variant and ratio.

    options: the settings of the training and the flags of this script, as attributes. folder: for the pictures.
    """
    scores, lines, config = {}, [], model.config
    folder.mkdir(parents=True, exist_ok=True)
    for split in options.split:
        dataset = RefDataset(
            options.dataset, split, options.data, options.image_folder, tokenizer, config.max_tokens, config.image_size
        )
        if options.shuffle_expressions:
            shuffle_expressions(dataset)
        metrics = evaluate(model, dataset, device, options.precision, options.workers, options.resolution)
        scores[split] = metrics.compute()
        for sample in metrics.samples:
            lines.append(json.dumps({"split": split, **dataset.ids(sample["index"]), **sample}))
        if options.pictures > 0 and RANK == 0:
            name = split + "-shuffled" * options.shuffle_expressions
            draw_pictures(model, tokenizer, dataset, metrics, folder, name, options.pictures)
    if RANK:
        return scores
    print(f"{'Dataset':<16}{'split':<8}" + "".join(f"{column:>8}" for column in COLUMNS))
    comparable = options.model == "base" and not options.shuffle_expressions and options.resolution == "input"
    for split, measured in scores.items():
        paper = paper_scores(config, options.dataset, split) if comparable else {}
        difference = {column: measured[column] - paper[column] for column in paper}
        rows = ((options.dataset, split, measured), ("paper", "", paper), ("difference", "", difference))
        for first, second, row in rows[: 3 if paper else 1]:
            cells = "".join(f"{row[column]:>8.2f}" if column in row else " " * 8 for column in COLUMNS)
            print(f"{first:<16}{second:<8}{cells}")
    if options.pictures > 0:
        print(f"pictures: {folder / '{pictures,words,expressions,ratios}-*.png'}")
    if options.json:
        Path(options.json).write_text(json.dumps(scores, indent=2))
    if options.per_sample:
        Path(options.per_sample).write_text("\n".join(lines) + "\n")
    return scores


# Pictures


@torch.no_grad()
def draw_pictures(
    model: VEGA, tokenizer: BertTokenizer, dataset: RefDataset, metrics: Metrics, folder: Path, name: str, count: int
) -> None:
    """Write up to four pictures; no sample is chosen by hand. metrics: of the whole split.

    pictures-NAME.png     `count` samples at even distances: image, ground truth, prediction, how similar each pixel is
                          to [CLS] (bright: most), the pixels that [CLS] selected
    words-NAME.png        the sample in the middle: the pixels that each token selected (as in Figure 3), and a PCA of
                          its pixels' and tokens' features (Figure 5: t-SNE)
    expressions-NAME.png  that sample's image, a row for each expression of its objects (Figures 7 and 9: of one object)
    ratios-NAME.png       that sample, the model made to select 10, 30, 50 and 80 % (Figure 4; ours: not trained anew)
    """

    def draw_sample(index: int) -> tuple[str, list]:
        """A sample's title and tiles: those of pictures-NAME.png, one for each token after [CLS], the PCA."""
        (item,), image = load_batches(dataset, [[index]], 0, model.mean.device), dataset.image(index)
        output = model(item["image"], item["input_ids"], item["attention_mask"])
        truth = overlay(image, item["mask"][0].cpu(), GREEN)
        prediction = overlay(image, (output["logits"][0] > 0).cpu(), RED)
        tiles = [("image", image), ("ground truth", truth), ("prediction", prediction)]
        if model.vis.selectors != "none":
            heat = output["similarity"][0].cpu()
            M = output["selection"].M[0].bool().cpu().unflatten(1, heat.shape)
            heat = 255 * (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-6)
            heat = Image.fromarray(heat.byte().numpy()).resize(image.size, Image.Resampling.BILINEAR)
            tiles.append(("similarity to [CLS]", heat))
            tokens = tokenizer.convert_ids_to_tokens(item["input_ids"][item["attention_mask"] == 1].tolist())
            tiles += [(f"selected by {token}", overlay(image, m, WHITE)) for token, m in zip(tokens, M)]
        if output["F_v"] is not None:
            tiles.append(("PCA of the features", feature_map(output, item["mask"][0])))
        return f"{dataset.expressions[index]}   (IoU {100 * metrics.samples[index]['iou']:.0f})", tiles

    spread = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int).tolist()
    middle = dataset.object_of(len(dataset) // 2).image_id
    of_one_image = [i for i in range(len(dataset)) if dataset.object_of(i).image_id == middle]
    for view, indices in (("pictures", spread), ("expressions", of_one_image)):
        save_grid(folder / f"{view}-{name}.png", [(title, tiles[:5]) for title, tiles in map(draw_sample, indices)])
    title, tiles = draw_sample(len(dataset) // 2)
    save_grid(folder / f"words-{name}.png", [(title * (i == 0), tiles[i : i + 5]) for i in range(0, len(tiles), 5)])
    if model.vis.selectors != "none":
        rows, trained = [], model.vis.ratio
        for ratio in (0.1, 0.3, 0.5, 0.8):
            model.vis.ratio = ratio
            rows.append((f"ratio {ratio}", draw_sample(len(dataset) // 2)[1][:5]))
        model.vis.ratio = trained
        save_grid(folder / f"ratios-{name}.png", rows)


def feature_map(output: dict, target: torch.Tensor, side: int = 480) -> Image.Image:
    """A sample's features along their first two principal components. Ours; Figure 5 has a t-SNE.

    Orange: pixels of the target; blue: others; green: wrongly predicted; purple: linguistic tokens; red: the rest of G,
    the visual expression. output: VEGA's, of one sample; target: bool [H, W].
    """
    F_v, (G, mask_G, *_) = output["F_v"][0], output["selection"]
    masks = torch.stack([target.to(F_v.device), output["logits"][0] > 0]).float()
    truth, prediction = F.adaptive_avg_pool2d(masks, math.isqrt(len(F_v))).flatten(1) > 0.5
    T = output["tokens"].shape[1]
    colors = ["limegreen" if t != p else "orange" if t else "lightskyblue" for t, p in zip(truth, prediction)]
    colors += ["purple"] * T + ["red"] * (len(G[0]) - T)
    real = F.pad(mask_G[0], (len(F_v), 0), value=1) > 0  # all but padding
    features = torch.cat([F_v, G[0]])[real]
    _, _, axes = torch.pca_lowrank(features, q=2, niter=10)
    points = (features - features.mean(0)) @ axes  # [N + tokens, 2]
    points = (points - points.amin(0)) / (points.amax(0) - points.amin(0)).clamp(min=1e-6) * (side - 20) + 10
    shown = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(shown)
    for (x, y), color in zip(points.tolist(), itertools.compress(colors, real.tolist())):
        r = 8 if color in ("purple", "red") else 5
        draw.ellipse((x - r, y - r, x + r, y + r), color)
    return shown


# Publishing


def push(name: str, file: Path) -> None:
    """Upload a model to the Hugging Face Hub as NAME/NAME: its file, its config, and a card made of what it says."""
    about = read_about(file)
    with input_errors(f"{name} was not uploaded to the Hugging Face Hub"):
        content = {"README.md": model_card(name, about).encode(), "config.json": json.dumps(about["config"]).encode()}
        operations = [CommitOperationAdd(path, data) for path, data in {**content, "model.safetensors": file}.items()]
        create_repo(name, exist_ok=True)
        print(f"uploaded: {create_commit(name, operations, commit_message='A model of VEGA').commit_url}")


def model_card(name: str, about: dict) -> str:
    """docs/model_card.md, filled in."""
    settings, config = about["settings"], VEGAConfig(**about["config"])
    lines = [f"| split | {' | '.join(COLUMNS)} | sentences |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for split, scores in about["scores"].items():
        cells = [f"{scores[column]:.2f}" for column in COLUMNS]
        lines.append(f"| {split} | {' | '.join(cells)} | {scores['samples']} |")
        if paper := paper_scores(config, settings["dataset"], split) if settings["model"] == "base" else None:
            cells = [f"{paper[column]:.2f}" if column in paper else "" for column in COLUMNS]
            lines.append(f"| the paper's {split} | {' | '.join(cells)} | |")
    here = ("data", "image_folder", "device", "workers", "out", "resume", "init")  # of the machine, not of the model
    dataset = Path(settings["dataset"]).name
    shown = {key: value for key, value in settings.items() if key not in here} | {"dataset": dataset}
    card = (Path(__file__).parent / "docs" / "model_card.md").read_text()
    return card.format(name=name, dataset=dataset, scores="\n".join(lines), settings=json.dumps(shown, indent=1))


# The command


def parse_flags(argv: list[str] | None, fields_of: type, description: str, tiny: dict = {}, epilog: str = "") -> dict:
    """The flags that were typed, of those that the fields of a dataclass stand for. tiny: for the help, its values."""
    parser = argparse.ArgumentParser(description=description, epilog=epilog,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for one in fields(fields_of):
        help = one.metadata["help"].replace("%", "%%")
        if one.default is not None and one.type is not bool or one.name in tiny:
            help += f" (default: {one.default}" + f", tiny: {tiny.get(one.name)}" * (one.name in tiny) + ")"
        kind = {"action": argparse.BooleanOptionalAction} if one.type is bool else {"type": one.type}
        options = {**kind, **one.metadata["options"]}
        parser.add_argument(f"--{one.name.replace('_', '-')}", default=argparse.SUPPRESS, help=help, **options)
    return vars(parser.parse_args(argv))


@dataclass
class Options:
    """The flags. --dataset, --data, --image-folder and --precision are by default as in the model's training.

    `main` adds the training's other settings to them, such as model and workers.
    """

    checkpoint: str = flag(None, "file, run's folder or name on the Hub; default: the newest run", metavar="MODEL")
    split: list = flag(("val",), "one or more splits", nargs="+", type=str)
    resolution: str = flag("input", "the size to compare masks at: the model's input's (LAVT), or the image's own",
                           choices=("input", "original"))  # fmt: skip
    json: str = flag(None, "write the scores of each split to this file, too", metavar="FILE")
    per_sample: str = flag(None, "write a JSON line for each sample: ids, expression, IoU, its counts", metavar="FILE")
    pictures: int = flag(0, "draw N samples of each split, what each word selects, and more", metavar="N")
    shuffle_expressions: bool = flag(False, "give each sample the expression of another image")
    push: str = flag(None, "upload model, settings and a card to the Hugging Face Hub: public", metavar="ME/NAME")
    image: list = flag(None, "segment these images, or a folder's, instead of a dataset", nargs="+", type=str)
    expression: list = flag(None, "what to segment in them, one or more", nargs="+", type=str)
    dataset: str = flag(None, f"{', '.join(DATASETS)}, or a folder", metavar="NAME")
    data: str = flag(None, "folder of the datasets that have a name", metavar="DIR")
    image_folder: str = flag(None, "where the dataset's images are, if not where data.py says", metavar="DIR")
    device: str = flag(None, "cpu, cuda or cuda:1; default: cuda if there is one")
    precision: str = flag(None, "fp32 with --image, else as in training", choices=("fp32", "bf16"))


@command_line
def main(argv: list[str] | None = None) -> dict | None:
    typed = parse_flags(argv, Options, __doc__)
    options = Options(**typed)
    if bool(options.image) != bool(options.expression):
        raise InputError("--image and --expression go together")
    for file in filter(None, (options.json, options.per_sample)):  # before the work, not after it
        if not Path(file).parent.is_dir():
            raise InputError(f"there is no folder {Path(file).parent} to write {file} to")
    file = model_file(options.checkpoint)
    if file == DEMO:
        print("there is no run here yet: this is the demo's model, assets/demo.safetensors")
    if options.push:
        return push(options.push, file)
    # the pictures of a model that lies in no run's folder go to runs/, too
    in_run = (file.parent / "settings.json").exists()
    folder = file.parent if in_run else Path("runs") / Path(options.checkpoint or file).stem
    if options.image:
        segment = Segmenter(file, options.device, options.precision or "fp32")
        return segment_images(segment, options.image, options.expression, folder / "masks")
    device = start_processes(options.device)
    model, tokenizer = load_model(file)
    about = read_about(file)
    if options.dataset not in (None, about["settings"]["dataset"]):
        about["settings"]["image_folder"] = None  # it was another dataset's
    # what was typed counts first, then the training's settings (also workers and model), then the defaults
    options = SimpleNamespace(**{**vars(options), **about["settings"], **typed})
    options.precision = resolve_precision(options.precision, device)
    print(f"{file}, step {about['step']}" + ", expressions shuffled" * options.shuffle_expressions)
    return score_splits(model.to(device), tokenizer, options, device, folder)


if __name__ == "__main__":
    main()
