"""Time and memory of train.py's own step: from images on the disk to the updated weights, and without loading.

    python -m studies.benchmark                                      the demo's model
    python -m studies.benchmark --model base --batch-size 4 --precision bf16 --workers 4 --compile inductor

Random weights, 60 JPEGs of 640 x 480, three polygons of sixty points a mask. It uses a GPU if there is one.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.utils import get_total_norm

from data import RefDataset, make_tokenizer
from evaluate import autocast, load_batches, pick_device
from model import VEGA, VEGAConfig
from train import PRESETS, Settings, make_optimizer, mean_losses, take_step, training_batches


def write_images(folder: Path) -> None:
    """A dataset in the own-data format, as heavy to load as RefCOCO."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((640, 480))
    refs, angles = [], np.linspace(0, 2 * np.pi, 60, endpoint=False)
    (folder / "images").mkdir()
    for i in range(60):
        noise.save(folder / "images" / f"{i}.jpg", quality=90)
        center, radius = rng.uniform((150, 150), (490, 330), (3, 1, 2)), rng.uniform(40, 120, (3, 1, 1))
        polygons = center + radius * np.stack([np.cos(angles), np.sin(angles)], 1)  # [3, 60, 2]
        one = {"image_id": f"{i}.jpg", "split": "train", "sentences": ["the thing on the left"]}
        refs.append({**one, "segmentation": polygons.round(2).reshape(3, -1).tolist()})
    (folder / "instances.json").write_text(json.dumps({"images": [{"file_name": f"{i}.jpg"} for i in range(60)]}))
    (folder / "refs.json").write_text(json.dumps(refs))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(function, device: torch.device, calls: int) -> float:
    """The median of some calls, after three that are not counted."""
    times = []
    for _ in range(calls + 3):
        wait(device)
        began = time.perf_counter()
        function()
        wait(device)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[3:])


def busy_share(function, device: torch.device) -> float:
    """Of the time of ten steps, the share in which the GPU worked."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        began = time.perf_counter()
        for _ in range(10):
            function()
        wait(device)
        seconds = time.perf_counter() - began
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PRESETS, default="tiny")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--compile", metavar="BACKEND", help="such as inductor")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)
    device = pick_device(None)
    settings = Settings(**{**PRESETS[args.model], "batch_size": args.batch_size, "precision": args.precision})
    tokenizer = make_tokenizer(["the thing on the left"])
    model = VEGA(VEGAConfig(**{name: getattr(settings, name) for name in VEGAConfig.__dataclass_fields__})).to(device)
    optimizer = make_optimizer(model, settings)
    if args.compile:
        model.compile(backend=args.compile, dynamic=False)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    compiled = f"compiled by {args.compile}" if args.compile else "not compiled"
    print(f"{args.model}, batch {args.batch_size}, {args.precision}, {compiled}, {device.type}, {hardware}")

    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        dataset = RefDataset(folder, "train", "data", None, tokenizer, settings.max_tokens, settings.image_size, True)
        order = training_batches(len(dataset), args.batch_size, 0, args.steps + 4, 0)
        batches = load_batches(dataset, order, args.workers, device)
        batch = next(batches)
        inputs = {name: batch[name] for name in ("image", "input_ids", "attention_mask")}

        steps = itertools.count(1)

        def step(batch=batch):
            losses, norm = take_step(model, model, optimizer, batch, args.batch_size, settings)
            if next(steps) % settings.log_every == 0:  # as at a line of the log
                mean_losses(losses, 1), norm.item(), get_total_norm(model.parameters()).isfinite().item()

        def forward():
            with autocast(device, args.precision), torch.inference_mode():
                model.eval().forward(**{name: values[:1] for name, values in inputs.items()})

        def report(label, ms, images):
            print(f"{label:<36}{ms:>9.1f} ms{1e3 * images / ms:>9.1f} images/s")

        loading = milliseconds(lambda: step(next(batches)), device, args.steps)
        report("a step, loading included", loading, args.batch_size)
        report("a step on one batch", milliseconds(step, device, args.steps), args.batch_size)
        report("forward of one image", milliseconds(forward, device, args.steps), 1)
        if device.type == "cuda":
            print(f"the GPU works {100 * busy_share(step, device):.0f} % of a step's time")
            print(f"peak memory {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
