"""Train VEGA, evaluate it and show it.

    python train.py                                            the demo: generated shapes, tiny model
    torchrun --nproc_per_node=4 train.py --dataset refcoco     the paper's settings
    python train.py --resume                                   go on with the newest run

A run leaves best.pt, last.pt, log.jsonl, metrics.json and pictures (*-SPLIT.png) under runs/NAME/.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BertTokenizer

from data import InputError, RefDataset, command_line, make_tokenizer, read_dataset
from evaluate import (
    FORMAT, autocast, check_numbers, common_flags, compiled, evaluate, in_any_process, leave_process_group,
    model_inputs, newest_run, rank, read_checkpoint, resolve_precision, restore, start_loader, start_processes, world,
)  # fmt: skip
from evaluate import main as evaluate_main
from model import BERT_FIELDS, PRETRAINED_BERT, PRETRAINED_SWIN, VEGA, VEGAConfig, load_bert, load_swin
from selection import VARIANTS

# What each model is trained with unless a flag says otherwise. base: Sec. 4.1. BERT learns at bert_lr * lr, and the
# learning rate rises over the first `warmup` of the steps: a tiny model starts from nothing.
RECIPES = {
    "tiny": dict(
        epochs=4, batch_size=16, lr=1.4e-3, bert_lr=0.1, warmup=0.05, beta2=0.98, weight_decay=0.01, log_every=10,
        workers=0,
    ),
    "base": dict(
        epochs=40, batch_size=16, lr=3e-5, bert_lr=1.0, warmup=0.0, beta2=0.999, weight_decay=0.01, log_every=50,
        workers=4,
    ),
}  # fmt: skip
STOPPED = 75  # exit status of a run that a signal stopped and --resume goes on with; sysexits.h: try again
RUN_FILES = ("last.pt", "best.pt", "log.jsonl", "metrics.json")
START_FLAGS = ("dataset", "model", "init", "swin", "bert", "no_pretrained")  # of a new run only
TEXT_RULES = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")  # how the tokenizer cuts a text
MODEL_FLAGS = ("variant", "image_size", "ratio", "drop_path", "dropout", "dice", "coordinates")  # fields of VEGAConfig


def parse(argv: list[str] | None) -> argparse.Namespace:
    lines = [f"  {name:<22}{v.table:<5}{v.oIoU or '-':>5}  {v.row}" for name, v in VARIANTS.items()]
    variants = "\n".join(["variants, by the paper's table, with its oIoU on RefCOCO val:", *lines,
                          "  --ratio 0.1 to 0.8    6    74.80 to 75.35  number of k"])  # fmt: skip
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=variants, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    # fmt: off
    flag("--model", choices=RECIPES, help="preset of sizes and recipe (default: tiny for shapes, else base)")
    flag("--variant", metavar="NAME", choices=VARIANTS, help="an ablation, listed below (default: vega)")
    flag("--batch-size", type=int, help="images per step, over all processes (default: 16)")
    flag("--micro-batch", type=int, metavar="N", help="images per forward pass of a process; its share accumulates")
    flag("--epochs", type=int, help="default: 40 for base, 4 for tiny")
    flag("--max-steps", type=int, metavar="STEPS", help="stop there; the learning rate decays to zero over them")
    flag("--lr", type=float, help="initial learning rate (default: 3e-5 for base, 1.4e-3 for tiny)")
    flag("--weight-decay", type=float, help="default: 0.01; none on norms, biases and relative position tables")
    flag("--dropout", type=float, help="in BERT, the words' enhancement and the VIS block (base: 0.1, tiny: 0)")
    flag("--drop-path", type=float, help="stochastic depth of the last Swin block (base: 0.3, tiny: 0)")
    flag("--dice", type=float, metavar="WEIGHT", help="weight of a Dice term in the loss (base: 0, tiny: 1)")
    flag("--coordinates", action=argparse.BooleanOptionalAction, help="add pixel coordinates to the patch embedding")
    flag("--ratio", type=float, help="of the pixels that each word selects (default: 0.3; Table 6)")
    flag("--seed", type=int, help="of the starting weights, the samples' order and choice, and dropout (default: 0)")
    flag("--swin", metavar="SOURCE", help="weights: a file, or a model's name in timm (base: ImageNet-22K's)")
    flag("--bert", metavar="SOURCE", help="a folder, or a model's name in transformers (base: BERT-base uncased)")
    flag("--no-pretrained", action="store_true", help="start base at random, not from pretrained weights")
    flag("--out", metavar="DIR", help="default: runs/DATASET-TIME")
    flag("--overwrite", action="store_true", help="let --out replace the run that is there")
    flag("--init", metavar="CHECKPOINT", help="start from a trained model's weights, words and sizes")
    flag("--resume", action="store_true", help="go on from last.pt of --out, or of the newest run")
    flag("--resume-anyway", action="store_true", help="... also with other flags than it was started with")
    flag("--checkpoint-every", type=int, metavar="STEPS", help="write last.pt also between validations")
    flag("--gradient-checkpointing", action="store_true", help="compute Swin's blocks again in backward: less memory")
    flag("--log-every", type=int, metavar="STEPS", help="default: 50; 10 for tiny")
    flag("--validate-every", type=int, metavar="STEPS", help="default: every epoch")
    # fmt: on
    common_flags(parser, "shapes, generated here")
    parser.set_defaults(
        no_pretrained=None, overwrite=None, resume=None, resume_anyway=None, compile=None, gradient_checkpointing=None
    )  # None: not given
    args = parser.parse_args(argv)
    args.resume = args.resume or args.resume_anyway
    counts = ("batch_size", "micro_batch", "epochs", "max_steps", "checkpoint_every", "validate_every", "log_every")
    shares = ("lr", "weight_decay", "dropout", "drop_path", "dice", "seed", "workers")
    check_numbers(parser, args, at_least_1=counts, at_least_0=shares)
    if args.seed is not None and args.seed >= 2**63:
        parser.error("--seed must be below 2 ** 63")
    if args.init and (args.swin or args.bert):
        parser.error("--init brings all weights along: leave --swin and --bert out")
    return args


@command_line
def main(argv: list[str] | None = None) -> dict:
    """Train, validate and save; returns the best checkpoint's scores, split -> scores in per cent."""
    args = parse(argv)
    device = start_processes(args.device)
    args, out, resumed = open_run(args)
    args.precision = precision = resolve_precision(args.precision, device)
    micro_batch = split_batch(args.batch_size, args.micro_batch)

    # data and model
    with rank_0_first():
        train, val = (RefDataset(args.dataset, split, args.data, args.images) for split in ("train", "val"))
        splits, _ = read_dataset(args.dataset, args.data, args.images)
        if resumed is None:
            model, tokenizer = build(args, train.expressions)
        else:
            model, tokenizer = restore(resumed, torch.device("cpu"), **{name: vars(args)[name] for name in MODEL_FLAGS})
    model.to(device).train()
    model.vision.swin.set_grad_checkpointing(bool(args.gradient_checkpointing))
    config = model.config
    for dataset in (train, val):
        dataset.use(tokenizer, config.max_tokens, config.image_size, training=dataset is train, seed=args.seed)
    optimizer = make_optimizer(model, args.lr, args.weight_decay, args.bert_lr, args.beta2)
    if len(train) < args.batch_size:
        raise InputError(
            f"{args.dataset} has {len(train)} objects to train on, fewer than a batch of {args.batch_size}: lower it"
        )
    steps_per_epoch = len(train) // args.batch_size
    total = args.max_steps or args.epochs * steps_per_epoch
    validate_every = args.validate_every or steps_per_epoch

    # where the run stands: a new one at step 0, or as its last checkpoint says
    done, best, sums, logged_step = 0, -1.0, {}, 0  # sums of the losses since the last line of the log
    if resumed is not None:
        done, best, logged_step = resumed["step"], resumed["best"], resumed["logged_step"]
        sums = {name: value.to(device) for name, value in resumed["sums"].items()}
        if done > total:
            raise InputError(f"{out} has done {done} steps already, more than the {total} that it would end with")
        settings = [{name: group[name] for name in ("share", "weight_decay")} for group in optimizer.param_groups]
        optimizer.load_state_dict(resumed["optimizer"])
        for group, setting in zip(optimizer.param_groups, settings):
            group.update(setting)  # of now, not of the checkpoint
    if rank() == 0:
        for file in RUN_FILES if resumed is None else ():
            (out / file).unlink(missing_ok=True)  # of the run that --overwrite replaces
        if resumed is not None:
            cut_log(out / "log.jsonl", done)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{args.model} VEGA, {size:.1f} M parameters, on {args.dataset}: {len(train)} objects, {total} steps of "
              f"{args.batch_size} on {world()} x {device.type}, {precision}; run: {out}", flush=True)  # fmt: skip
    del resumed  # as large as model and optimiser

    def checkpoint(step: int) -> dict:
        """All that a resumed run needs, as it is now; reading it needs no other file."""
        return {
            "format": FORMAT, "step": step, "best": best, "dataset": args.dataset, "precision": precision,
            "config": dataclasses.asdict(config), "args": vars(args),
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "sums": sums, "logged_step": logged_step,
            "tokenizer": {"vocab": tokenizer.get_vocab(), **{name: getattr(tokenizer, name) for name in TEXT_RULES}},
        }  # fmt: skip

    # training
    parallel = DistributedDataParallel(model) if world() > 1 else model
    parallel.broadcast_buffers = False  # Swin's are constants; set here, for torch 2.15 deprecates the argument
    forward = compiled(parallel, config, micro_batch, device, precision) if args.compile else parallel
    loader = DataLoader(
        train, num_workers=args.workers, pin_memory=device.type == "cuda", generator=torch.Generator().manual_seed(0),
        batch_sampler=TrainingBatches(len(train), args.batch_size, done, total, args.seed, rank(), world()),
        worker_init_fn=leave_process_group,
    )  # fmt: skip
    bar = tqdm(total=total, initial=done, unit="step", disable=True if rank() else None)
    recent = []  # samples and losses since they were last found finite
    images, seconds, waited = 0, 0.0, 0.0  # trained on since the last line of the log; and waiting for the loader
    began = said = asked = time.perf_counter()
    with noted_signals() as received:
        for step, batch in enumerate(start_loader(loader), done + 1):
            waited += time.perf_counter() - asked
            model.train()
            warmup = args.warmup * total  # steps
            lr = args.lr * min(step / (warmup + 1), (1 - (step - 1 - warmup) / (total - warmup)) ** 0.9)  # polynomial
            for group in optimizer.param_groups:
                group["lr"] = lr * group["share"]
            # dropout depends on nothing before this step
            torch.manual_seed(((args.seed << 40) + (step << 12) + rank()) % 2**64)
            optimizer.zero_grad()
            parts = split(batch, micro_batch)
            for i, part in enumerate(parts):
                last = i == len(parts) - 1
                with contextlib.nullcontext() if last or world() == 1 else parallel.no_sync():  # gradients meet once
                    with autocast(device, precision):
                        output = forward(*model_inputs(part, device))
                    losses = model.loss(output, part["mask"].to(device, non_blocking=True))
                    (losses["loss"] / len(parts)).backward()
                recent.append((step, part["index"], losses["loss"].detach()))
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + value.detach() / len(parts)
            optimizer.step()
            bar.update()
            now = time.perf_counter()
            if bar.disable and rank() == 0 and now - said >= min(600, max(20, (now - began) / 10)):  # not a terminal
                said, left = now, (total - step) * (now - began) / (step - done) / 60
                print(f"step {step} of {total}: loss {losses['loss'].item():.3f}, {left:.0f} minutes left", flush=True)

            stopping = in_any_process(bool(received))
            logging = step % args.log_every == 0 or step == total
            validating = step % validate_every == 0 or step == total
            saving = validating or stopping or bool(args.checkpoint_every) and step % args.checkpoint_every == 0
            if logging or saving:
                sums = mean_over_processes(sums)  # on which the next steps of each process are added
                stop_if_not_finite(sums["loss"], recent, model, train, out / "last.pt")
                recent.clear()
            images += args.batch_size
            seconds += time.perf_counter() - asked

            if logging:
                if rank() == 0:
                    means = {name: value.item() / (step - logged_step) for name, value in sums.items()}
                    write_log(out, {"step": step, "epoch": step / steps_per_epoch, **means, "lr": lr,
                                    "images_per_s": images / seconds, "waited": waited / seconds})  # fmt: skip
                    bar.set_postfix(loss=f"{means['loss']:.3f}", lr=f"{lr:.1e}", images=f"{images / seconds:.0f}/s")
                sums, logged_step, images, seconds, waited = {}, step, 0, 0.0, 0.0
            if validating:
                scores = evaluate(model, val, device, precision, workers=args.workers).compute()
                improved, best = scores["oIoU"] > best, max(best, scores["oIoU"])
                if rank() == 0:
                    write_log(out, {"step": step, "split": "val", **scores})
                    bar.write(f"step {step}: val mIoU {scores['mIoU']:.2f}, oIoU {scores['oIoU']:.2f}")
                    sys.stdout.flush()
                    if improved:
                        save(out / "best.pt", checkpoint(step))
                stopping = in_any_process(bool(received))  # a validation lasts
            if saving and rank() == 0:
                save(out / "last.pt", checkpoint(step))
            if stopping:
                bar.close()
                if world() > 1:
                    dist.barrier()  # until rank 0 has saved
                if rank() == 0:
                    launch = "python" if world() == 1 else f"torchrun --nproc_per_node={world()}"
                    print(f"stopped after step {step} of {total}; go on with: {launch} train.py --resume --out {out}")
                raise SystemExit(STOPPED)
            asked = time.perf_counter()
    bar.close()

    # the best checkpoint's scores on every split but the training one, and pictures of them
    if world() > 1:
        dist.barrier()  # until rank 0 has written it
    tests = [split for split in splits if split not in ("train", "val")]
    images = [f"--images={args.images}"] if args.images else []
    scores = evaluate_main([
        f"--checkpoint={out / 'best.pt'}", "--split", "val", *tests, f"--json={out / 'metrics.json'}", "--pictures=8",
        f"--data={args.data}", f"--device={device}", f"--precision={precision}", f"--workers={args.workers}", *images,
    ])  # fmt: skip
    if dist.is_initialized():
        dist.destroy_process_group()
    return scores


# What main calls, in its order: the settings


def open_run(args: argparse.Namespace) -> tuple[argparse.Namespace, Path, dict | None]:
    """All settings, the run's folder, and the checkpoint to go on from: None if the run is new."""
    if args.resume:
        out = Path(args.out) if args.out else newest_run("last.pt").parent
        checkpoint = read_checkpoint(out / "last.pt")
        return resumed_settings(args, checkpoint["args"]), out, checkpoint
    args = new_settings(args)
    name = [Path(args.out or f"runs/{Path(args.dataset).resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}")]
    if world() > 1:
        dist.broadcast_object_list(name)  # the clock of rank 0 names the run
    (out,) = name
    if any((out / file).exists() for file in RUN_FILES) and not args.overwrite:
        raise InputError(f"{out} holds a run already: choose another --out, go on with --resume, or --overwrite it")
    return args, out, None


def new_settings(args: argparse.Namespace) -> argparse.Namespace:
    """What the command line says, and for the rest the recipe of the model's preset."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    dataset = given.get("dataset", "shapes")
    start = read_checkpoint(args.init) if args.init else {"args": {}}
    model = given.get("model", start["args"].get("model", "tiny" if dataset == "shapes" else "base"))
    config = start.get("config", dataclasses.asdict(getattr(VEGAConfig, model)()))
    pretrained = {} if args.init else {"swin": PRETRAINED_SWIN, "bert": PRETRAINED_BERT}
    if model == "tiny" or args.no_pretrained:
        pretrained = {}
    model_flags = {name: config[name] for name in MODEL_FLAGS}
    recipe = {"dataset": dataset, "model": model, "data": "data", "seed": 0, **RECIPES[model]}
    return argparse.Namespace(**{**vars(args), **recipe, **model_flags, **pretrained, **given})


def resumed_settings(args: argparse.Namespace, saved: dict) -> argparse.Namespace:
    """The settings of the run to go on with. A flag that says otherwise is an error, unless one wants it anyway."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    if args.epochs:
        given.setdefault("max_steps", None)  # which would else decide
    machine = ("device", "data", "images", "workers", "out", "resume", "resume_anyway", "overwrite")
    others = [name for name in given if name not in machine and given[name] != saved.get(name)]
    fixed = set(others) & set(START_FLAGS)
    if fixed or others and not args.resume_anyway:
        told = "; ".join(f"--{name.replace('_', '-')} {saved.get(name)}, not {given[name]}" for name in others)
        way = "start another run, perhaps with --init" if fixed else "add --resume-anyway"
        raise InputError(f"this run has {told}: leave such flags out to go on with it, or {way}")
    former = {"bert_lr": 1.0, "warmup": 0.0, "beta2": 0.999}  # of runs from before there were these
    return argparse.Namespace(**{**vars(args), **former, **saved, **given})


def split_batch(batch_size: int, micro_batch: int | None) -> int:
    """The micro batch: at most a process's share of the batch, and a divisor of it."""
    share, rest = divmod(batch_size, world())
    if rest:
        raise InputError(f"a batch of {batch_size} does not divide among {world()} processes")
    micro_batch = min(micro_batch or share, share)
    if share % micro_batch:
        raise InputError(f"each process's share of {share} images is not a multiple of --micro-batch {micro_batch}")
    return micro_batch


def split(batch: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    """The same in parts of `size` samples."""
    return [dict(zip(batch, values)) for values in zip(*(value.split(size) for value in batch.values()))]


# The batches, the model and its optimiser


class TrainingBatches:
    """Batch sampler: this rank's slice of the global batch of every step from `start` to `stop`, as (epoch, object).

    The order of each epoch is drawn from (seed, epoch); an incomplete last batch is left for the next shuffle.
    """

    def __init__(self, objects: int, batch_size: int, start: int, stop: int, seed: int, rank: int = 0, world: int = 1):
        self.objects, self.batch_size, self.start, self.stop, self.seed = objects, batch_size, start, stop, seed
        self.rank, self.local = rank, batch_size // world
        self.steps_per_epoch = objects // batch_size

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self):
        order, order_epoch = None, None
        for step in range(self.start, self.stop):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = np.random.default_rng((self.seed, epoch)).permutation(self.objects), epoch
            first = batch * self.batch_size + self.rank * self.local
            yield [(epoch, int(number)) for number in order[first : first + self.local]]


@contextlib.contextmanager
def rank_0_first():
    """The other processes wait until rank 0 is through, which downloads or generates what is missing."""
    if rank():
        dist.barrier()
    yield
    if world() > 1 and not rank():
        dist.barrier()


def build(args: argparse.Namespace, words: list[str]) -> tuple[VEGA, BertTokenizer]:
    """The model at its starting weights, and its tokenizer: pretrained BERT's, or one made of the training words."""
    overrides = {name: getattr(args, name) for name in MODEL_FLAGS}
    if args.init:
        torch.manual_seed(args.seed)
        checkpoint = read_checkpoint(args.init)
        added = add_words(checkpoint, words)
        if added and rank() == 0:
            print(f"{added} words of the training expressions are new to {args.init}: they start at random")
        return restore(checkpoint, torch.device("cpu"), **overrides)
    loaded = []
    try:
        if args.bert:
            bert, tokenizer = load_bert(args.bert)
            overrides["bert"] = {name: getattr(bert.config, name) for name in BERT_FIELDS}
        else:
            tokenizer = make_tokenizer(words)
        config = getattr(VEGAConfig, args.model)(**overrides)
        config.bert["vocab_size"] = len(tokenizer) if not args.bert else bert.config.vocab_size
        torch.manual_seed(args.seed)
        model = VEGA(config)
        if args.bert:
            model.bert.load_state_dict(bert.state_dict())
            loaded.append(
                f"BERT: {len(bert.state_dict())} tensors from {args.bert}; left out, for VEGA has none: pooler"
            )
        if args.swin:
            loaded.append(load_swin(model.vision.swin, args.swin, config.window_size))
    except ValueError as error:
        raise InputError(str(error)) from None
    if loaded and rank() == 0:
        print(*loaded, sep="\n", flush=True)
    return model, tokenizer


def add_words(checkpoint: dict, expressions: list[str]) -> int:
    """Give a checkpoint's vocabulary the words that it lacks, with fresh embeddings; returns how many there are.

    BERT's own vocabulary stays: it spells any word with its pieces, whose names start with ##.
    """
    vocab, table = checkpoint["tokenizer"]["vocab"], "bert.embeddings.word_embeddings.weight"
    if any(word.startswith("##") for word in vocab):
        return 0
    new = sorted(make_tokenizer(expressions).get_vocab().keys() - vocab.keys())
    vocab.update(zip(new, range(len(vocab), len(vocab) + len(new))))
    checkpoint["config"]["bert"]["vocab_size"] = len(vocab)
    weights = checkpoint["model"][table]
    fresh = 0.02 * torch.randn(len(new), weights.shape[1])  # as BERT starts
    checkpoint["model"][table] = torch.cat([weights, fresh])
    return len(new)


def make_optimizer(model: VEGA, lr: float, weight_decay: float, bert_lr: float, beta2: float) -> torch.optim.AdamW:
    """AdamW. Norms, biases, the temperature and relative position tables do not decay.

    BERT's learning rate is a share of the others', `bert_lr`: "share" in its groups.
    """
    groups = {(share, stays): [] for share in (bert_lr, 1.0) for stays in (False, True)}
    for name, parameter in model.named_parameters():
        stays = parameter.dim() < 2 or name.endswith("relative_position_bias_table")
        groups[bert_lr if name.startswith("bert.") else 1.0, stays].append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "share": share, "weight_decay": 0.0 if stays else weight_decay}
         for (share, stays), group in groups.items()], lr, betas=(0.9, beta2), fused=True,
    )  # fmt: skip


# The log and the checkpoints


def write_log(out: Path, line: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)  # not before: a run that never began leaves nothing
    try:
        with open(out / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
    except OSError as error:
        raise InputError(f"can't write {out / 'log.jsonl'} ({error.strerror}). Make room, then --resume") from None


def cut_log(path: Path, step: int) -> None:
    """Leave out the lines past a step, which a resumed run writes again, and what a kill or a power cut left of one."""
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
    part = path.with_name(path.name + ".part")
    part.write_text("".join(kept))
    part.replace(path)


def save(path: Path, checkpoint: dict) -> None:
    """Write beside, flush to the disk, then rename: a kill or a full disk leaves the previous file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer turns some of the first into the second
        part.unlink(missing_ok=True)
        kept = f"{path} from before is whole" if path.exists() else "there was none before"
        raise InputError(
            f"can't write {path} ({str(error).splitlines()[0]}); {kept}. Make room, then --resume"
        ) from None


# Several processes, signals, losses that are not finite


@contextlib.contextmanager
def noted_signals():
    """A list that SIGINT and SIGTERM are added to, instead of what they do else; a second Ctrl-C stops at once."""
    received = []

    def note(number, frame):
        received.append(signal.Signals(number).name)
        if number == signal.SIGINT:  # not so SIGTERM: schedulers and torchrun may both send it
            signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def mean_over_processes(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same scalars in every process: their means."""
    if world() == 1 or not sums:
        return sums
    values = torch.stack(list(sums.values()))
    dist.all_reduce(values)
    return dict(zip(sums, values / world()))


def stop_if_not_finite(loss: torch.Tensor, recent: list, model: VEGA, train: RefDataset, last: Path) -> None:
    """Every process stops if a loss was, or a weight is not finite; rank 0 says which samples the loss had.

    Args:
        loss: sum over steps and processes.
        recent: of each step and part, its step, samples and loss in this process.
        last: the checkpoint that an earlier, finite state was saved to.
    """
    finite = torch.stack([p.detach().isfinite().all() for p in model.parameters()]).all()
    if loss.isfinite() and finite:
        return
    mine = [(step, index.tolist(), bool(value.isfinite())) for step, index, value in recent]
    parts = [mine]
    if world() > 1:
        parts = [None] * world()
        dist.all_gather_object(parts, mine)
    if rank():
        raise SystemExit(1)
    kept = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
    wrong = sorted((step, index) for part in parts for step, index, is_finite in part if not is_finite)
    if not wrong:
        raise InputError(f"the weights are not finite after step {recent[-1][0]}, though its loss is; {kept}")
    first = wrong[0][0]
    ids = [train.ids(i) for step, index in wrong if step == first for i in index]
    named = ", ".join(f"{one['ref_id']}/{one['sent_id']}" for one in ids)
    raise InputError(f"the loss is not finite at step {first}; its ref_id/sent_id are {named}; {kept}")


if __name__ == "__main__":
    main()
