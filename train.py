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
import signal
import sys
import time
from math import inf
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import BertTokenizer

from data import InputError, RefDataset, command_line, input_errors, load_batches, make_tokenizer, read_dataset
from evaluate import (
    autocast, common_flags, evaluate, gather, model_inputs, rank, resolve_precision, start_processes, world,
)  # fmt: skip
from evaluate import main as evaluate_main
from model import (
    BERT_FIELDS, FORMAT, PRETRAINED_BERT, PRETRAINED_SWIN, VEGA, VEGAConfig, add_words, load_bert, load_swin,
    newest_run, read_checkpoint, restore, save_checkpoint,
)  # fmt: skip
from selection import RATIOS, VARIANTS

# How a model is trained; flags set what has a flag. BERT learns at bert_factor * lr, the learning rate rises over the
# first `warmup` of the steps, and a gradient whose norm exceeds max_norm is scaled down to it.
RECIPES = {  # base's epochs, batch_size (ours: 16 on all GPUs together) and lr are of Sec. 4.1, all else is ours
    "tiny": dict(epochs=4, batch_size=8, lr=1e-3, bert_factor=0.05, warmup=0.05, beta2=0.98, max_norm=1.0, workers=0),
    "base": dict(epochs=40, batch_size=16, lr=3e-5, bert_factor=1.0, warmup=0.0, beta2=0.999, max_norm=inf, workers=4),
}
SETTABLE = ("variant", "ratio", "image_size", "dropout", "drop_path", "contrastive", "dice", "coordinates")
START_FLAGS = "dataset model init swin bert no_pretrained".split()  # fixed when a run starts
FREE_FLAGS = "device data images workers out resume resume_anyway overrides".split()  # not compared on --resume


@command_line
def main(argv: list[str] | None = None) -> dict:
    """Train, validate and save; returns the best checkpoint's scores of each split but train."""
    args, out, resumed = open_run(argv)
    device = start_processes(args.device)
    out = gather(out)[0]  # the clock of rank 0 names the run
    args.precision = resolve_precision(args.precision, device)
    per_process = args.batch_size // world()  # images of a step
    micro_batch = min(args.micro_batch or per_process, per_process)
    if args.batch_size % world() or per_process % micro_batch:
        shares = f"{world()} process(es) with {args.micro_batch or 'all its'} images at a time"
        raise InputError(f"--batch-size {args.batch_size} does not divide among {shares}")
    micro_batches = per_process // micro_batch  # of a step

    # data and model
    if rank():
        gather(None)  # wait for rank 0, which downloads or generates what is missing
    model, tokenizer = build(args, resumed)
    if rank() == 0:
        gather(None)
    model.to(device)
    if args.gradient_checkpointing:
        model.vision.swin.set_grad_checkpointing()
    config = model.config
    common = (args.data, args.images, tokenizer, config.max_tokens, config.image_size)
    train = RefDataset(args.dataset, "train", *common, training=True, seed=args.seed)
    val = RefDataset(args.dataset, "val", *common)
    steps_per_epoch = len(train) // args.batch_size
    if steps_per_epoch == 0:
        raise InputError(f"only {len(train)} objects to train on: lower --batch-size, which is {args.batch_size}")
    total = args.max_steps or round(args.epochs * steps_per_epoch)
    validate_every = args.validate_every or steps_per_epoch
    checkpoint_every = args.checkpoint_every or total

    # where the run stands: at its start, or as its last checkpoint says
    optimizer = make_optimizer(model, args)
    state = resumed or {"step": 0, "best": -1.0, "sums": {}, "logged_step": 0}
    done, best = state["step"], state["best"]
    if done > total:
        raise InputError(f"{out} has done {done} steps already, more than the {total} that it would end with")
    progress = Progress(total, done, state["sums"], state["logged_step"])
    if resumed:  # the moments as they were, the groups' settings as the flags say now
        optimizer.load_state_dict({**optimizer.state_dict(), "state": resumed["optimizer"]["state"]})
    del resumed, state  # as large as model and optimiser
    size = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"{args.model} VEGA, {size:.1f} M parameters, on {args.dataset}: {len(train)} objects, {total} steps of "
        f"{args.batch_size} on {world()} x {device.type}, {args.precision}; run: {out}")  # fmt: skip
    cut_log(out / "log.jsonl", done)

    def save(file: str, step: int) -> None:
        """Write all that a resumed run needs, as it is now; reading it needs no other file."""
        names = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
        text_rules = {name: getattr(tokenizer, name) for name in names}  # how it cuts a text
        if rank() == 0:
            save_checkpoint(out / file, {
                "format": FORMAT, "step": step, "best": best, "config": dataclasses.asdict(config), "args": vars(args),
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "sums": progress.sums,
                "logged_step": progress.logged_step, "tokenizer": {"vocab": tokenizer.get_vocab(), **text_rules},
            })  # fmt: skip
        gather(None)  # the others wait

    parallel = DistributedDataParallel(model) if world() > 1 else model
    parallel.broadcast_buffers = False  # buffers are constants; set here, for torch 2.15 deprecates the argument
    order = training_batches(len(train), args.batch_size, done, total, args.seed, rank(), world())
    batches = load_batches(train, order, args.workers, device)
    with noted_signals() as received:
        for step, batch in enumerate(batches, done + 1):
            # one step
            lr = learning_rate(step, total, args)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            dropout_seed = np.random.default_rng((args.seed, step, rank())).integers(2**63)  # the same after --resume
            torch.manual_seed(int(dropout_seed))
            model.train()
            optimizer.zero_grad()
            for start in range(0, per_process, micro_batch):
                part = {name: values[start : start + micro_batch] for name, values in batch.items()}
                # DDP averages the processes' gradients in the last micro-batch alone
                parallel.require_backward_grad_sync = start + micro_batch == per_process
                with autocast(device, args.precision):
                    output = parallel(*model_inputs(part, device))
                losses = model.loss(output, part["mask"].to(device, non_blocking=True))
                (losses["loss"] / micro_batches).backward()
                progress.add(step, part["index"], losses, micro_batches)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_norm)  # before it is clipped
            optimizer.step()
            progress.update(step)

            # what does not happen in every step
            logging = step % args.log_every == 0 or step == total
            validating = step % validate_every == 0 or step == total
            stopping = any(gather(bool(received)))
            saving = validating or stopping or step % checkpoint_every == 0
            if logging or saving:
                progress.average()
                progress.check(model, train, out / "last.pt")
            if logging:
                line = {"step": step, "epoch": step / steps_per_epoch, **progress.line(step)}
                line |= {"gradient norm": norm.item(), "lr": lr}
                if model.log_tau is not None:
                    line["tau"] = model.log_tau.exp().item()
                write_log(out, line)
            if validating:
                scores = evaluate(model, val, device, args.precision, args.workers).compute()
                say(f"step {step}: val mIoU {scores['mIoU']:.2f}, oIoU {scores['oIoU']:.2f}")
                write_log(out, {"step": step, "split": "val", **scores})
                if scores["oIoU"] > best:  # ours: the best by oIoU on val
                    best = scores["oIoU"]
                    save("best.pt", step)
                stopping = any(gather(bool(received)))  # a signal may have come meanwhile
            if saving:
                save("last.pt", step)
            if stopping:
                launch = "python" if world() == 1 else f"torchrun --nproc_per_node={world()}"
                say(f"stopped after step {step} of {total}; go on with: {launch} train.py --resume --out {out}")
                raise SystemExit(75)  # EX_TEMPFAIL of sysexits.h; --resume goes on
    progress.bar.close()

    # the best checkpoint's scores on every split but the training one, and pictures of them
    splits, _ = read_dataset(args.dataset, args.data, args.images)
    tests = [split for split in splits if split not in ("train", "val")]
    return evaluate_main([
        f"--checkpoint={out / 'best.pt'}", "--split", "val", *tests, f"--json={out / 'metrics.json'}", "--pictures=8",
        f"--data={args.data}", f"--images={args.images or ''}", f"--device={device}", f"--precision={args.precision}",
    ])  # fmt: skip


# What main calls, in its order: the settings


def parse(argv: list[str] | None, **defaults) -> argparse.Namespace:
    """The flags. args.overrides: the fields of VEGAConfig that were given, as a dict.

    defaults: of flags, and settings that have no flag, such as warmup.
    """
    rows = [f"  {name:<22}{v.table:<5}{v.oIoU or '-':>5}  {v.row}" for name, v in VARIANTS.items()]
    rows += [f"  --ratio {ratio:<14}6    {oIoU:>5.2f}  pixels selected" for ratio, (_, oIoU) in RATIOS.items()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = "\n".join(["ablations: name, the paper's table, its oIoU on RefCOCO val, its row:", *rows])
    common_flags(parser, "shapes, generated here", "data", "bf16 on cards that have it, else fp32")
    # fmt: off
    flag = parser.add_argument_group("training").add_argument
    flag("--variant", type=lambda name: config_field(f"variant={name}"), dest="overrides", action="append",
         metavar="NAME", help="an ablation, listed below (default: vega)")
    flag("--epochs", type=float, help="at least 1, also 1.5 (default: 40 for base, 4 for tiny)")
    flag("--max-steps", type=int, metavar="STEPS", help="train for this many steps; --epochs is ignored")
    flag("--lr", type=float, help="the highest learning rate (default: 3e-5 for base, 1e-3 for tiny)")
    flag("--batch-size", type=int, help="images per step, over all processes (default: 16 for base, 8 for tiny)")
    flag("--micro-batch", type=int, metavar="N", help="each process takes its share of the batch N images at a time")
    flag("--seed", type=int, default=0, help="of starting weights, order, sentences, dropout; the shapes stay the same")
    flag("--gradient-checkpointing", action="store_true", help="compute Swin's blocks again in backward: less memory")
    flag("--workers", type=int, help="processes that load images, for each GPU (default: 4 for base, 0 for tiny)")
    flag = parser.add_argument_group("the run").add_argument
    flag("--out", metavar="DIR", help="default: runs/DATASET-TIME")
    flag("--resume", action="store_true", help="go on from last.pt of --out, or of the newest run")
    flag("--resume-anyway", action="store_true", help="as --resume, with flags that differ from the run's")
    flag("--validate-every", type=int, metavar="STEPS", help="default: every epoch")
    flag("--checkpoint-every", type=int, metavar="STEPS", help="write last.pt also between validations")
    flag("--log-every", type=int, default=10, metavar="STEPS", help="default: 10")
    flag = parser.add_argument_group("the model").add_argument
    flag("--model", choices=RECIPES, help="preset of sizes and recipe (default: tiny for shapes, else base)")
    flag("--ratio", type=lambda ratio: config_field(f"ratio={ratio}"), dest="overrides", action="append",
         help="share of the pixels that each token selects (default: 0.3; Table 6)")
    flag("--set", type=config_field, dest="overrides", action="extend", nargs="+", metavar="NAME=VALUE",
         help=f"one of these fields of VEGAConfig (see model.py): {', '.join(SETTABLE)}")
    flag("--init", metavar="CHECKPOINT", help="start from a trained model's weights, words and sizes")
    flag("--swin", metavar="SOURCE", help="weights: a file, or a model's name in timm (base: ImageNet-22K's)")
    flag("--bert", metavar="SOURCE", help="a folder, or a model's name in transformers (base: BERT-base uncased)")
    flag("--no-pretrained", action="store_true", help="start base at random, not from pretrained weights")
    # fmt: on
    parser.set_defaults(**{"data": "data", **defaults, "overrides": []})
    args = parser.parse_args(argv)
    args.overrides = dict(args.overrides)
    args.resume = args.resume or args.resume_anyway
    counts = ("batch_size", "micro_batch", "epochs", "max_steps", "checkpoint_every", "validate_every", "log_every")
    for name in (*counts, "lr", "seed", "workers"):
        value, limit = getattr(args, name), int(name in counts)
        if value is not None and not limit <= value < inf:
            parser.error(f"--{name.replace('_', '-')} is {value}, but must be at least {limit}")
    return args


def config_field(text: str) -> tuple[str, int | float | bool]:
    """NAME=VALUE of --set, as a name and a value."""
    name, _, value = text.partition("=")
    if name not in SETTABLE:
        raise argparse.ArgumentTypeError(f"there is no {name!r}; it must be one of {', '.join(SETTABLE)}")
    kind = type(getattr(VEGAConfig, name))
    try:
        return name, {"true": True, "false": False}[value] if kind is bool else kind(value)
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{name} can't be {value!r}") from None


def open_run(argv: list[str] | None) -> tuple[argparse.Namespace, Path, dict | None]:
    """All settings, the run's folder, and the checkpoint to go on from: None if the run is new.

    The flags are parsed again when their defaults are known: a recipe, or the settings of the run to go on with.
    Raises InputError if a flag contradicts that run, unless --resume-anyway allows it.
    """
    args = parse(argv)
    if args.resume:
        out = Path(args.out) if args.out else newest_run("last.pt").parent
        resumed = read_checkpoint(out / "last.pt")
        before = {**resumed["config"], **resumed["args"]}
        steps = None if args.epochs else before["max_steps"]  # --epochs takes the place of an earlier --max-steps
        args = parse(argv, **{**resumed["args"], "max_steps": steps})
        now = {**vars(args), **args.overrides}
        others = [name for name in now if now[name] != before.get(name) and name not in FREE_FLAGS]
        fixed = set(others) & set(START_FLAGS)
        if fixed or others and not args.resume_anyway:
            told = "; ".join(f"{name} {before.get(name)}, not {now[name]}" for name in others)
            way = "start another run, perhaps with --init" if fixed else "add --resume-anyway"
            raise InputError(f"this run has {told}: leave such flags out to go on with it, or {way}")
        return args, out, resumed

    dataset = args.dataset or "shapes"
    preset = args.model or ("tiny" if dataset == "shapes" else "base")
    if args.init:
        if args.model or args.swin or args.bert:
            raise InputError("--init brings sizes and weights along: leave --model, --swin and --bert out")
        preset = read_checkpoint(args.init)["args"]["model"]
    pretrained = preset == "base" and not args.init and not args.no_pretrained
    weights = {"swin": PRETRAINED_SWIN, "bert": PRETRAINED_BERT} if pretrained else {}
    args = parse(argv, dataset=dataset, model=preset, **RECIPES[preset], **weights)
    name = f"{Path(dataset).resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = Path(args.out or f"runs/{name}")
    if any((out / file).exists() for file in ("last.pt", "best.pt", "metrics.json")):
        raise InputError(f"{out} holds a run already: choose another --out, go on with --resume, or delete it")
    return args, out, None


# The batches, the model and its optimiser


def training_batches(objects: int, batch_size: int, done: int, total: int, seed: int, part: int = 0, parts: int = 1):
    """Yield each batch after step `done`, as a list of (epoch, object): of `parts` equal shares that of number `part`.

    The order of each epoch is drawn from (seed, epoch). Ours: what does not fill a last batch is left out.
    """
    size = batch_size // parts
    for step in range(done, total):
        epoch, batch = divmod(step, objects // batch_size)
        if batch == 0 or step == done:
            order = np.random.default_rng((seed, epoch)).permutation(objects)
        first = batch * batch_size + part * size
        yield [(epoch, int(number)) for number in order[first : first + size]]


def build(args: argparse.Namespace, resumed: dict | None) -> tuple[VEGA, BertTokenizer]:
    """The model and its tokenizer: the resumed checkpoint's, those of --init, or new ones at their starting weights.

    A new model has pretrained BERT's tokenizer, or one made of the training words.
    """
    expressions = RefDataset(args.dataset, "train", args.data, args.images).expressions  # draws missing shapes first
    if resumed is not None:
        return restore(resumed, torch.device("cpu"), **args.overrides)
    if args.init:
        checkpoint = read_checkpoint(args.init)
        torch.manual_seed(args.seed)
        if added := add_words(checkpoint, expressions):
            say(f"{added} words of the training expressions are new to {args.init}: they start at random")
        return restore(checkpoint, torch.device("cpu"), **args.overrides)
    preset = getattr(VEGAConfig, args.model)
    if args.bert:
        bert, tokenizer = load_bert(args.bert)
        config = preset(**args.overrides, bert={name: getattr(bert.config, name) for name in BERT_FIELDS})
    else:
        tokenizer = make_tokenizer(expressions)
        config = preset(**args.overrides)
        config.bert["vocab_size"] = len(tokenizer)
    torch.manual_seed(args.seed)
    model = VEGA(config)
    if args.bert:
        model.bert.load_state_dict(bert.state_dict())
        say(f"BERT: {len(bert.state_dict())} tensors from {args.bert}; VEGA has no pooler")
    if args.swin:
        say(load_swin(model.vision.swin, args.swin, config.window_size))
    return model, tokenizer


def make_optimizer(model: VEGA, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW, with a "factor" of the learning rate in each group. Ours: betas, and a weight decay of 0.01, but none for
    what has fewer than two dimensions (log_tau too) and for Swin's relative position tables.
    """
    groups = {(factor, decay): [] for factor in (args.bert_factor, 1.0) for decay in (0.01, 0.0)}
    for name, parameter in model.named_parameters():
        decay = 0.0 if parameter.dim() < 2 or name.endswith("relative_position_bias_table") else 0.01
        groups[args.bert_factor if name.startswith("bert.") else 1.0, decay].append(parameter)
    groups = [{"params": group, "factor": factor, "weight_decay": decay} for (factor, decay), group in groups.items()]
    return torch.optim.AdamW(groups, args.lr, betas=(0.9, args.beta2), fused=True)


def learning_rate(step: int, total: int, args: argparse.Namespace) -> float:
    """Of a step from 1 to total: polynomial decay (Sec. 4.1). Ours: power 0.9, warm-up over the share args.warmup."""
    warmup = args.warmup * total
    if step < warmup + 1:
        return args.lr * step / (warmup + 1)
    return args.lr * (1 - (step - 1 - warmup) / (total - warmup)) ** 0.9


# The log, the progress, the signals


def write_log(out: Path, line: dict) -> None:
    if rank():
        return
    out.mkdir(parents=True, exist_ok=True)  # not before: a run that never began leaves nothing
    path = out / "log.jsonl"
    with input_errors(f"can't write {path}; make room, then --resume"), open(path, "a") as log:
        log.write(json.dumps(line) + "\n")


def cut_log(path: Path, step: int) -> None:
    """Drop the lines after a step, which will be written again, and a line that a kill cut short."""
    if rank() or not path.exists():
        return
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
    part = path.with_name(path.name + ".part")
    part.write_text("".join(kept))
    part.replace(path)


def say(text: str) -> None:
    """Print above the bar, on rank 0."""
    if rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


class Progress:
    """The losses since the last line of the log; a bar, or without a terminal the minutes left."""

    def __init__(self, total: int, done: int, sums: dict[str, torch.Tensor], logged_step: int):
        self.total, self.done = total, done
        self.sums, self.logged_step = sums, logged_step  # the losses' sums since the step that was last logged
        self.recent = []  # step, samples and loss of each micro-batch since the last `check`
        self.bar = tqdm(total=total, initial=done, unit="step", disable=bool(rank()) or None)
        self.began, self.said_at = time.perf_counter(), 0.0

    def add(self, step: int, index: torch.Tensor, losses: dict[str, torch.Tensor], micro_batches: int) -> None:
        """Count the samples and losses of one of a step's micro-batches."""
        self.recent.append((step, index, losses["loss"].detach()))
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach() / micro_batches

    def update(self, step: int) -> None:
        """A step is done. Without a bar, say now and then how many minutes are left."""
        self.bar.update()
        seconds = time.perf_counter() - self.began
        if self.bar.disable and seconds - self.said_at >= min(600, max(20, seconds / 10)):
            self.said_at = seconds
            left = (self.total - step) * seconds / (step - self.done) / 60
            say(f"step {step} of {self.total}: loss {self.recent[-1][2]:.3f}, {left:.0f} minutes left")

    def line(self, step: int) -> dict:
        """The mean losses since the last line of the log, and the seconds since this process began to train."""
        line = {name: value.item() / (step - self.logged_step) for name, value in self.sums.items()}
        self.bar.set_postfix(loss=f"{line['loss']:.3f}")
        self.sums, self.logged_step = {}, step
        return {**line, "seconds": time.perf_counter() - self.began}

    def average(self) -> None:
        """Average the losses over the processes."""
        if world() > 1:
            values = torch.stack(list(self.sums.values()))
            dist.all_reduce(values)
            self.sums = dict(zip(self.sums, values / world()))

    def check(self, model: VEGA, train: RefDataset, last: Path) -> None:
        """All processes stop if a loss or a weight is not finite, and rank 0 names the samples.

        `last` is the checkpoint of an earlier, finite state.
        """
        recent, self.recent = self.recent, []
        finite = [value.detach().isfinite().all() for value in (self.sums["loss"], *model.parameters())]
        if torch.stack(finite).all():
            return
        mine = [(step, index.tolist()) for step, index, loss in recent if not loss.isfinite()]
        wrong = sorted(sum(gather(mine), []))
        told = f"the weights are not finite after step {recent[-1][0]}, though the step's loss is"
        if wrong:
            first = [train.ids(number) for step, numbers in wrong if step == wrong[0][0] for number in numbers]
            named = ", ".join("{ref_id}/{sent_id}".format(**ids) for ids in first)
            told = f"the loss is not finite at step {wrong[0][0]}; its ref_id/sent_id are {named}"
        kept = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        if rank():
            raise SystemExit(1)
        raise InputError(f"{told}; {kept}")


@contextlib.contextmanager
def noted_signals():
    """Collect SIGINT and SIGTERM in a list instead of stopping; a second Ctrl-C stops at once."""
    received = []

    def note(number, frame):
        received.append(number)
        if number == signal.SIGINT:  # SIGTERM may come twice: from a scheduler and from torchrun
            signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
