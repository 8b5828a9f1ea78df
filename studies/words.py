"""Do the words of a sentence select pixels of their own? Of finished runs, on val:

    python -m studies.words runs/NAME [runs/NAME ..]

token cosine        the mean cosine between two of a sentence's tokens after BERT; at 1 they are one vector, repeated
shared with [CLS]   of the pixels that a word selects, the per cent that [CLS] selects too; by chance 100 * ratio
ranking             of two pixels of the image, one on a thing of the word's colour (or shape) and one on another thing:
                    how often the first is more similar to the word (or to [CLS]); by chance 0.5
gradient            the norm of the loss's gradient in the row of S of a word, and of [CLS], one sample at a time
mIoU                by what names the target itself: "colour", "size and shape", ..
"""

import argparse
import collections
import itertools
import json
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import evaluate
from model import load_model, read_about
from selection import Selection


def token_cosine(tokens: torch.Tensor, mask_l: torch.Tensor) -> torch.Tensor:
    """tokens [B, T, D], mask_l [B, T] -> [B], the mean cosine over all pairs of two real tokens."""
    real = mask_l.float()
    count = real.sum(1)  # [CLS] and [SEP] at least
    total = (F.normalize(tokens.float(), dim=-1) * real[..., None]).sum(1)  # [B, D]
    return (total.square().sum(-1) - count) / (count * (count - 1))


def shared_with_cls(selection: Selection, mask_l: torch.Tensor) -> torch.Tensor:
    """Of the pixels that a word selects, the per cent that [CLS] selects too, averaged over the words -> [B]."""
    M = selection.M  # [B, T, N]
    shared = 100 * (M * M[:, :1]).sum(-1) / M.sum(-1).clamp(min=1)  # [B, T]
    words = F.pad(mask_l.float()[:, 2:], (1, 1))  # [B, T] 1 for each token that is neither the first nor the last
    return (shared * words).sum(1) / words.sum(1).clamp(min=1)


def ranking(values: torch.Tensor, positive: torch.Tensor) -> float:
    """How often one of the positive values is above one of the others."""
    return (values[positive][:, None] > values[~positive]).float().mean().item()


def named_by(expression: str) -> str:
    """By what a sentence names its target: "colour", "size and shape", .."""
    target = re.split(" (?:to the )?(?:left|right) of | above | over | below | under ", expression)[0].split()
    words = {"size": data.SIZES, "colour": data.COLORS, "shape": data.SHAPES}
    return " and ".join(kind for kind, names in words.items() if set(names) & set(target))


def measure(source: str) -> dict[str, list[float]]:
    """The module's measures of one run, a list of values each."""
    model, tokenizer = load_model(source)
    settings, found = read_about(source)["settings"], collections.defaultdict(list)
    shapes = settings["dataset"] == "shapes"

    def split_of(split: str) -> data.RefDataset:
        where = settings["dataset"], split, settings["data"], settings["image_folder"]
        return data.RefDataset(*where, tokenizer, model.config.max_tokens, model.config.image_size)

    for split in ("testA", "testB", "val") if shapes else ():
        dataset = split_of(split)
        for sample in evaluate.evaluate(model, dataset, torch.device("cpu")).samples:
            named = named_by(dataset.expressions[sample["index"]])
            found[f"mIoU of {split}, named by {named}"].append(100 * sample["iou"])

    dataset, things = split_of("val"), collections.defaultdict(list)  # image -> its things, with their masks
    if shapes:
        instances = json.loads((Path(settings["data"]) / "shapes" / "instances.json").read_text())
        for thing in instances["annotations"]:
            thing["mask"] = torch.from_numpy(data.rasterize(thing["segmentation"], 128, 128))
            things[thing["image_id"]].append(thing)
    for batch in torch.utils.data.DataLoader(dataset):
        mask_l = batch["attention_mask"]
        output = model(batch["image"], batch["input_ids"], mask_l)
        found["token cosine"] += token_cosine(output["tokens"].detach(), mask_l).tolist()
        if model.vis.selectors != "all":
            continue
        S = output["selection"].S
        S.retain_grad()
        model.loss(output, batch["mask"])["loss"].backward()
        found["shared with [CLS]"] += shared_with_cls(output["selection"], mask_l).tolist()
        words = tokenizer.convert_ids_to_tokens(batch["input_ids"][mask_l == 1].tolist())[:-1]  # no [SEP]
        norms = S.grad[0].norm(dim=-1).tolist()
        found["gradient, [CLS]"].append(norms[0])
        found["gradient, a word"] += norms[1 : len(words)]
        if not shapes:
            continue
        maps = S.detach().unflatten(-1, output["similarity"].shape[1:])
        maps = F.interpolate(maps, (128, 128), mode="bilinear")[0]
        here = things[dataset.object_of(batch["index"].item()).image_id]
        masks = torch.stack([thing["mask"] for thing in here])
        inside = masks.any(0)
        for t, kind in itertools.product(range(1, len(words)), ("color", "shape")):
            of_it = masks[[thing["attributes"][kind] == words[t] for thing in here]].any(0)[inside]
            if 0 < of_it.sum() < len(of_it):
                found[f"ranking by {kind}, the word"].append(ranking(maps[t][inside], of_it))
                found[f"ranking by {kind}, [CLS]"].append(ranking(maps[0][inside], of_it))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a model's file")
    for source in parser.parse_args(argv).runs:
        print(f"\n{source}: {read_about(source)['config']['variant']}")
        for name, values in sorted(measure(source).items()):
            print(f"  {name:<52}{np.mean(values):.3g} ({len(values)})")


if __name__ == "__main__":
    main()
