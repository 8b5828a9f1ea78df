"""Time and memory of VEGA, at random weights, beside its two encoders alone.

    python -m studies.benchmark                                      the demo's model, one image
    python -m studies.benchmark --model base --batch-size 4 --precision bf16

Images are at hand: nothing is loaded. It uses a GPU if there is one.
"""

import argparse
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

import evaluate
from model import TINY, VEGA, VEGAConfig


class Encoders(VEGA):
    """VEGA's own Swin and BERT without what VEGA adds: the least that an image and a sentence cost."""

    def forward(self, image, input_ids, attention_mask) -> list:
        words = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return [words, self.vision.swin.forward_features((image / 255 - self.mean) / self.std)]

    def loss(self, output: list, mask) -> dict:
        return {"loss": sum(features.float().mean() for features in output)}


def random_inputs(config: VEGAConfig, batch_size: int, device: torch.device) -> list:
    image = torch.randint(0, 256, (batch_size, 3, config.image_size, config.image_size), dtype=torch.uint8)
    ids = torch.randint(5, config.bert_config["vocab_size"], (batch_size, config.max_tokens))
    return [tensor.to(device) for tensor in (image, ids, torch.ones_like(ids))]


def training_step(model: torch.nn.Module, inputs: list, precision: str):
    """A function that takes one step of AdamW."""
    optimizer, mask = torch.optim.AdamW(model.parameters(), 1e-5, fused=True), inputs[0][:, 0] > 200

    def step():
        optimizer.zero_grad()
        with evaluate.autocast(mask.device, precision):
            output = model.train()(*inputs)
        model.loss(output, mask)["loss"].backward()
        optimizer.step()

    return step


def milliseconds(function) -> float:
    """The median time of a call on all cores."""
    from torch.utils.benchmark import Timer  # which looks for CUDA's compiler as it is imported, and warns

    timer = Timer("function()", globals={"function": function}, num_threads=os.cpu_count())
    return 1e3 * timer.blocked_autorange(min_run_time=5).median


def peak_of_a_step(config: VEGAConfig, checkpointing: bool, batch_size: int, precision: str) -> float:
    """MB that it takes beyond those of a process without a model; to be called in a process of its own."""
    device = evaluate.pick_device(None)

    def peak() -> float:  # not of getrusage, which may tell the parent's
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device) / 1e6
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3

    before, model = peak(), VEGA(config).to(device)
    model.vision.swin.set_grad_checkpointing(checkpointing)
    step = training_step(model, random_inputs(config, batch_size, device), precision)
    step(), step()
    return peak() - before


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "base"), default="tiny")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args(argv)
    device, config = evaluate.pick_device(None), VEGAConfig(**TINY if args.model == "tiny" else {})
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} threads"
    print(f"{args.model}, batch {args.batch_size}, {args.precision}, {device.type}, {hardware}")
    weights = sum(p.nbytes for p in VEGA(config).parameters()) / 1e6
    for checkpointing in (False, True):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            peak = process.submit(peak_of_a_step, config, checkpointing, args.batch_size, args.precision).result()
        parts = f"weights {weights:.0f}, gradients {weights:.0f}, optimiser {2 * weights:.0f}"
        print(f"step, {checkpointing=}, MB: {parts}, activations {peak - 4 * weights:.0f}, peak {peak:.0f}")

    print(f"{'':<36}" + "".join(f"{part:>10}{'ratio':>7}{'images/s':>10}" for part in ("forward", "step")))
    least, words_only = None, replace(config, variant="enhanced-linguistic")
    models = {"two encoders alone": Encoders(config), "VEGA": VEGA(config), "no visual expression": VEGA(words_only)}
    inputs = random_inputs(config, args.batch_size, device)
    for label, model in models.items():
        step = training_step(model.to(device), inputs, args.precision)

        def forward():
            with evaluate.autocast(device, args.precision), torch.inference_mode():
                model.eval()(*inputs)

        times = milliseconds(forward), milliseconds(step)
        least = least or times
        row = f"{label:<36}"
        for ms, first in zip(times, least):
            row += f"{ms:>7.0f} ms{ms / first:>7.2f}{1e3 * args.batch_size / ms:>10.2f}"
        print(row)


if __name__ == "__main__":
    main()
