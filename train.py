"""Train VEGA, evaluate it and show it.

    python train.py                                            the demo: generated shapes, tiny model
    torchrun --nproc_per_node=4 train.py --dataset refcoco     the paper's settings; ours or LAVT's where it gives none
    python train.py --variant global-only                      an ablation; also --ratio 0.1
    python train.py --resume                                   go on with the newest run

A run leaves in runs/NAME/: best.safetensors, the model of the best oIoU on val; metrics.json, its scores; pictures;
log.jsonl; and from the first checkpoint on settings.json and last.pt, from which --resume goes on.
In the help, "ours" marks what the paper does not say, or where we differ; "LAVT" was taken from that work.
"""

import json
import math
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm
from transformers import BertTokenizer

from data import DATASETS, InputError, RefDataset, command_line, input_errors, make_tokenizer, read_dataset
from evaluate import (
    RANK, WORLD, Options, autocast, evaluate, gather, load_batches, parse_flags, resolve_precision, score_splits,
    start_processes, wait_for_all,
)  # fmt: skip
from model import (
    PRETRAINED_BERT, PRETRAINED_SWIN, TINY, VEGA, VEGAConfig, flag, load_bert, load_model, load_swin, load_weights,
    model_file, newest, read_about, save_model, tokenizer_rules, whole_file,
)  # fmt: skip
from selection import RATIOS, VARIANTS


def positive(value) -> bool:
    return 0 < value < math.inf


@dataclass
class Settings(VEGAConfig):
    """All of a run's settings, each a flag, after those of the model.

    Defaults: Sec. 4.1 where it gives a value, else as the help says. --dataset shapes starts from PRESETS["tiny"].
    """

    dataset: str = flag("shapes", f"{', '.join(DATASETS)}, or a folder in REFER's format", metavar="NAME")
    data: str = flag("data", "folder of the datasets that have a name", metavar="DIR")
    image_folder: str = flag(None, "where the dataset's images are, if not where data.py says", metavar="DIR")
    model: str = flag(None, "preset: base, the paper's, or tiny, the demo's; default: tiny for shapes, else base",
                      choices=("base", "tiny"))  # fmt: skip
    swin: str = flag(PRETRAINED_SWIN, "weights to start from: a file, or a name in timm", metavar="SOURCE")
    bert: str = flag(PRETRAINED_BERT, "weights to start from: a folder, or a name in transformers", metavar="SOURCE")
    pretrained: bool = flag(True, "start from --swin and --bert, not at random")
    init: str = flag(None, "start from a trained model: its weights, vocabulary and sizes; the rest is the preset's",
                     metavar="MODEL")  # fmt: skip
    epochs: float = flag(40, "passes over the objects (LAVT: one sentence of each); may be 1.5", positive)
    max_steps: int = flag(None, "train for this many steps; --epochs is ignored", positive, metavar="STEPS")
    batch_size: int = flag(16, "images a step (ours: the paper's 16 is over all processes)", positive)
    micro_batch: int = flag(None, "gradient accumulation: each process computes N images of its share at a time",
                            positive, metavar="N")  # fmt: skip
    lr: float = flag(3e-5, "the highest learning rate", lambda rate: 0 <= rate < math.inf)
    bert_factor: float = flag(1.0, "ours: BERT's learning rate as a share of --lr", positive)
    warmup: float = flag(0.0, "LAVT has none: share of the steps in which the rate rises", lambda share: 0 <= share < 1)
    beta2: float = flag(0.999, "torch: AdamW's second beta", lambda beta: 0 <= beta < 1)
    power: float = flag(0.9, "LAVT: exponent of the rate's decay", positive)
    weight_decay: float = flag(0.01, "LAVT: AdamW's weight decay", lambda decay: decay >= 0)
    max_norm: float = flag(0.0, "LAVT has none: clip the gradient's norm at this; 0: no clipping", lambda n: n >= 0)
    seed: int = flag(0, "random seed of starting weights, order, sentences, dropout", lambda n: n >= 0)
    precision: str = flag(None, "ours: bf16 on cards that have it, else fp32", choices=("fp32", "bf16"))
    gradient_checkpointing: bool = flag(False, "compute Swin's blocks again in backward: less memory")
    compile: str = flag(None, "compile the model for training with this backend, such as inductor",
                        lambda name: name in torch.compiler.list_backends(()), metavar="BACKEND")  # fmt: skip
    device: str = flag(None, "cpu, cuda or cuda:1; default: cuda if there is one")
    workers: int = flag(4, "processes that load images, for each GPU", lambda n: n >= 0)
    log_every: int = flag(10, "steps between two lines of the log", positive, metavar="STEPS")
    validate_every: int = flag(None, "steps between validations; default: an epoch", positive, metavar="STEPS")
    checkpoint_every: int = flag(1000, "steps between writes of last.pt", positive, metavar="STEPS")
    out: str = flag(None, "the run's folder; default: runs/DATASET-TIME", metavar="DIR")
    resume: bool = flag(False, "go on from last.pt of --out, or of the newest run; start if there is none")


PRESETS = {
    "base": {},
    "tiny": dict(  # ours: the demo's
        **TINY, swin=None, bert=None, epochs=4, batch_size=8, lr=1e-3, bert_factor=0.05, warmup=0.05, beta2=0.98,
        max_norm=1.0, workers=0,
    ),
}  # fmt: skip
# Flags that may differ beside --resume; all others must stay as they were. The first two stretch the rate's decay.
CHANGEABLE = (
    "epochs max_steps device workers data image_folder log_every validate_every checkpoint_every micro_batch "
    "gradient_checkpointing".split()
)


@command_line
def main(argv: list[str] | None = None) -> dict:
    """Train, validate and save; returns the best model's scores of each split but train."""
    settings, resumed = read_settings(argv)
    device = start_processes(settings.device)
    settings.out = gather(settings.out)[0]  # the clock of rank 0 names the run
    out = Path(settings.out)
    settings.precision = resolve_precision(settings.precision, device)
    run_training(settings, resumed, device, out)

    # the best model's scores on every split but the training one, and pictures of them
    model, tokenizer = load_model(out)
    splits, _ = read_dataset(settings.dataset, settings.data, settings.image_folder)
    tests = sorted(splits.keys() - {"train", "val"})
    options = Options(split=["val", *tests], pictures=8, json=out / "metrics.json")
    options = SimpleNamespace(**{**vars(options), **vars(settings)})  # settings count before evaluate.py's defaults
    scores = score_splits(model.to(device), tokenizer, options, device, out)
    if RANK == 0:
        about = {"settings": asdict(settings), "step": read_about(out)["step"], "scores": scores}
        save_model(out / "best.safetensors", model, tokenizer, **about)
    tqdm.write(f'segment your own: python evaluate.py --checkpoint {out} --image photo.jpg --expression "the dog"')
    return scores


def run_training(settings: Settings, resumed: dict | None, device: torch.device, out: Path) -> None:
    """Run all steps, or those that remain. resumed: what last.pt holds, or None."""
    share = settings.batch_size // WORLD  # images a step of this process
    micro_batch = min(settings.micro_batch or share, share)
    if settings.batch_size % WORLD or share % micro_batch:
        way = f"{WORLD} process(es) with {settings.micro_batch or 'all its'} images at a time"
        raise InputError(f"--batch-size {settings.batch_size} does not divide among {way}")

    # data and model
    if RANK:
        wait_for_all()  # rank 0 goes first: it downloads or generates what is missing
    model, tokenizer = build_model(settings, resumed)
    if RANK == 0:
        wait_for_all()
    model.to(device)
    if settings.gradient_checkpointing:
        model.vision.swin.set_grad_checkpointing()
    source = settings.data, settings.image_folder, tokenizer, settings.max_tokens, settings.image_size
    train = RefDataset(settings.dataset, "train", *source, training=True, seed=settings.seed)
    val = RefDataset(settings.dataset, "val", *source)
    steps_per_epoch = len(train) // settings.batch_size
    if steps_per_epoch == 0:
        raise InputError(f"only {len(train)} objects to train on: lower --batch-size, which is {settings.batch_size}")
    total = settings.max_steps or max(1, round(settings.epochs * steps_per_epoch))
    validate_every = settings.validate_every or steps_per_epoch

    # where the run stands: at its start, or as last.pt says
    optimizer = make_optimizer(model, settings)
    done, best = 0, -1.0
    if resumed:
        done, best = resumed["step"], resumed["best"]
        optimizer.load_state_dict(resumed["optimizer"])
        resumed.clear()  # as large as model and optimiser
    if done > total:
        raise InputError(f"{out} has done {done} steps already, more than the {total} that it would end with")
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    tqdm.write(f"{settings.model} VEGA, {parameters:.1f} M parameters, on {settings.dataset}: {len(train)} objects")
    tqdm.write(f"{total} steps of {settings.batch_size} on {WORLD} x {device.type}, {settings.precision}; run: {out}")
    if settings.compile:
        model.compile(backend=settings.compile, dynamic=False)  # every batch has one shape
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True) if WORLD > 1 else model
    parallel.broadcast_buffers = False  # of DDP: they are constants (set here, for torch 2.15 deprecates the argument)
    order = training_batches(len(train), settings.batch_size, done, total, settings.seed, RANK, WORLD)
    sums, logged, began = defaultdict(float), done, time.perf_counter()  # sums: of the losses since the step `logged`
    bar = tqdm(load_batches(train, order, settings.workers, device), "training", total, initial=done, unit="step",
               disable=bool(RANK) or None)  # fmt: skip

    for step, batch in enumerate(bar, done + 1):
        lr = learning_rate(step, total, settings)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        dropout_seed = np.random.default_rng((settings.seed, step, RANK)).integers(2**63)  # the same after --resume
        torch.manual_seed(int(dropout_seed))
        losses, norm = take_step(model, parallel, optimizer, batch, micro_batch, settings)
        for name, loss in losses.items():
            sums[name] += loss

        # what does not happen in every step, and may make a GPU wait
        logging = step % settings.log_every == 0 or step == total
        validating = step % validate_every == 0 or step == total
        saving = step % settings.checkpoint_every == 0 or validating
        if logging or saving:
            means = mean_losses(sums, step - logged)
            if not (math.isfinite(means["loss"]) and get_total_norm(model.parameters()).isfinite()):
                raise InputError(f"the loss or a weight is not finite after step {step}; {out} keeps what it had")
        if logging:
            tau = {} if model.log_tau is None else {"tau": model.log_tau.exp().item()}
            line = {"step": step, "epoch": step / steps_per_epoch, **means, "gradient norm": norm.item(), "lr": lr}
            write_log(out, {**line, **tau, "seconds": time.perf_counter() - began})
            bar.set_postfix(loss=f"{means['loss']:.3f}")
            sums, logged = defaultdict(float), step
        if validating:
            scores = evaluate(model, val, device, settings.precision, settings.workers).compute()
            tqdm.write(f"step {step}: val mIoU {scores['mIoU']:.2f}, oIoU {scores['oIoU']:.2f}")
            write_log(out, {"step": step, "split": "val", **scores})
            if scores["oIoU"] > best:  # LAVT: the best by oIoU on val
                best = scores["oIoU"]
                if RANK == 0:
                    about = {"settings": asdict(settings), "step": step, "scores": {"val": scores}}
                    save_model(out / "best.safetensors", model, tokenizer, **about)
        if saving:
            if RANK == 0:
                save_last(out / "last.pt", model, optimizer, tokenizer, step, best, settings)
            wait_for_all()


def take_step(
    model: VEGA, parallel: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: dict, micro_batch: int,
    settings: Settings,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:  # fmt: skip
    """One step on this process's share of a batch; returns the losses and the gradient's norm, before it is clipped.

    parallel: the model, or DDP around it. Nothing here makes a GPU wait.
    """
    share = len(batch["image"])
    micro_batches, sums = share // micro_batch, defaultdict(float)
    model.train()
    optimizer.zero_grad()
    with autocast(batch["image"].device, settings.precision):  # around all, so that weights are cast once
        for first in range(0, share, micro_batch):
            micro = {name: values[first : first + micro_batch] for name, values in batch.items()}
            # gradients add up in each process; DDP averages the sums once, in the last micro-batch's backward
            parallel.require_backward_grad_sync = first + micro_batch == share
            output = parallel(micro["image"], micro["input_ids"], micro["attention_mask"])
            losses = model.loss(output, micro["mask"])
            (losses["loss"] / micro_batches).backward()
            for name, loss in losses.items():
                sums[name] += loss.detach() / micro_batches
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if settings.max_norm:
        clip_grads_with_norm_(model.parameters(), settings.max_norm, norm)
    optimizer.step()
    return sums, norm


# What main and run_training call, in their order


def read_settings(argv: list[str] | None) -> tuple[Settings, dict | None]:
    """All settings, and what last.pt holds if the run goes on, else None.

    What was typed counts first; then what the run was started with if it goes on; then the preset, then the defaults.
    Raises InputError if a flag contradicts the run.
    """
    rows = [f"  {name:<22}{v.table:<5}{v.oIoU or '-':>5}  {v.row}" for name, v in VARIANTS.items()]
    rows += [f"  --ratio {ratio:<14}6    {oIoU:>5.2f}  pixels selected" for ratio, (_, oIoU) in RATIOS.items()]
    epilog = "\n".join(["ablations: name, the paper's table, its oIoU on RefCOCO val, its row:", *rows])
    typed = parse_flags(argv, Settings, __doc__, PRESETS["tiny"], epilog)
    out = Path(typed["out"]) if "out" in typed else None
    resume = typed.pop("resume", False)
    last = out / "last.pt" if out else newest("last.pt") if resume else None
    if resume:
        if last and last.exists():
            with input_errors(f"{last.with_name('settings.json')} can't be read"):
                before = json.loads(last.with_name("settings.json").read_text())
            typed["out"] = before["out"]  # the same folder, perhaps by another name
            if "bert_config" in typed:
                typed["bert_config"] = {**before["bert_config"], **typed["bert_config"]}
            others = [name for name in typed if name not in CHANGEABLE and typed[name] != before.get(name)]
            if others:
                values = ", ".join(f"{name} {before.get(name)}, not {typed[name]}" for name in others)
                raise InputError(f"the run in {last.parent} has {values}: leave such flags out, or name another --out")
            if "epochs" in typed:
                before["max_steps"] = None
            with input_errors(f"{last} is not of this program, or not whole"):
                resumed = torch.load(last, map_location="cpu", weights_only=True, mmap=True)
            return Settings(**{**before, **typed, "out": str(last.parent)}), resumed
        if RANK == 0:
            tqdm.write(f"there is no {last or 'last.pt under runs/'}: a new run starts")
    if out and any((out / file).exists() for file in ("last.pt", "best.safetensors", "metrics.json")):
        # a run that was killed while it saved for the first time may start again: it has a log, but none of these yet
        later = out / "settings.json", out / "metrics.json"
        killed = (out / "log.jsonl").exists() and not any(file.exists() for file in later)
        if not (resume and killed):
            raise InputError(f"{out} holds a run already: choose another --out, go on with --resume, or delete it")
    if out and out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file, not a folder")

    dataset = typed.get("dataset", "shapes")
    preset, config = "tiny" if dataset == "shapes" else "base", {}
    if "init" in typed:
        about = read_about(model_file(typed["init"]))
        preset, config = about["settings"]["model"], about["config"]
    preset = typed.get("model", preset)
    new = {"model": preset, "out": f"runs/{Path(dataset).resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"}
    return Settings(**{**PRESETS[preset], **config, **new, **typed}), None


def build_model(settings: Settings, resumed: dict | None) -> tuple[VEGA, BertTokenizer]:
    """The model and its tokenizer: of last.pt, of --init, or new ones at their starting weights.

    A new model has pretrained BERT's tokenizer, or one made of the training words. Their number, or the sizes of
    pretrained BERT, go into the settings.
    """
    expressions = RefDataset(settings.dataset, "train", settings.data, settings.image_folder).expressions
    names = [one.name for one in fields(VEGAConfig)]
    if settings.init and not resumed:
        return load_model(settings.init, **{name: getattr(settings, name) for name in names})
    swin, bert = (settings.swin, settings.bert) if settings.pretrained and not resumed else (None, None)
    if resumed:
        tokenizer = BertTokenizer(**resumed["tokenizer"])
    elif bert:
        pretrained_bert, tokenizer = load_bert(bert)
        settings.bert_config = {name: getattr(pretrained_bert.config, name) for name in settings.bert_config}
    else:
        tokenizer = make_tokenizer(expressions)
        settings.bert_config["vocab_size"] = len(tokenizer)
    torch.manual_seed(settings.seed)
    with input_errors("these sizes make no model"):
        model = VEGA(VEGAConfig(**{name: getattr(settings, name) for name in names}))
    if resumed:
        load_weights(model, resumed["model"], "last.pt")
    if bert:
        model.bert.load_state_dict(pretrained_bert.state_dict())
        tqdm.write(f"BERT: {len(model.bert.state_dict())} tensors from {bert}; VEGA has no pooler")
    if swin:
        tqdm.write(load_swin(model.vision.swin, swin, settings.window_size))
        gates = [fusion.gate for fusion in model.vision.fusions if fusion.gate]
        for layer in (layer for gate in gates for layer in (gate[0], gate[2])):
            torch.nn.init.trunc_normal_(layer.weight, std=0.02)  # LAVT: a pretrained Swin is hardly disturbed at first
    return model, tokenizer


def make_optimizer(model: VEGA, settings: Settings) -> torch.optim.AdamW:
    """AdamW on all weights, Swin's and BERT's too, with a "factor" of the learning rate in each group.

    No weight decay for Swin's norms and relative position tables (LAVT), nor for any other vector or number (ours).
    """
    groups = {(factor, decay): [] for factor in (settings.bert_factor, 1.0) for decay in (settings.weight_decay, 0.0)}
    for name, parameter in model.named_parameters():
        free = parameter.dim() < 2 or name.endswith("relative_position_bias_table")
        factor = settings.bert_factor if name.startswith("bert.") else 1.0
        groups[factor, 0.0 if free else settings.weight_decay].append(parameter)
    groups = [{"params": group, "factor": factor, "weight_decay": decay} for (factor, decay), group in groups.items()]
    return torch.optim.AdamW(groups, settings.lr, betas=(0.9, settings.beta2), fused=True)


def training_batches(objects: int, batch_size: int, done: int, total: int, seed: int, rank: int = 0, world: int = 1):
    """Yield each batch after step `done`, as a list of (epoch, object): the share of one of `world` processes.

    The order of each epoch is drawn from (seed, epoch). LAVT: what does not fill a last batch is left out.
    """
    size = batch_size // world
    for step in range(done, total):
        epoch, batch = divmod(step, objects // batch_size)
        if batch == 0 or step == done:
            order = np.random.default_rng((seed, epoch)).permutation(objects)
        first = batch * batch_size + rank * size
        yield [(epoch, int(number)) for number in order[first : first + size]]


def learning_rate(step: int, total: int, settings: Settings) -> float:
    """Of a step from 1 to total: polynomial decay (Sec. 4.1), after the warm-up. Without warm-up step 1 has --lr."""
    warmup = settings.warmup * total
    if step < warmup + 1:
        return settings.lr * step / (warmup + 1)
    return settings.lr * (1 - (step - 1 - warmup) / (total - warmup)) ** settings.power


def mean_losses(sums: dict[str, torch.Tensor], steps: int) -> dict[str, float]:
    """The losses' means over the steps and over the processes."""
    values = torch.stack(list(sums.values()))
    if WORLD > 1:
        dist.all_reduce(values)
        values /= WORLD
    return {name: value / steps for name, value in zip(sums, values.tolist())}


def save_last(path: Path, model: VEGA, optimizer, tokenizer: BertTokenizer, step: int, best: float, settings) -> None:
    """Write all that --resume needs: last.pt, and settings.json beside it.

    No random state: order, sentences and dropout follow from (seed, epoch or step), and the rate from the step.
    """
    with whole_file(path.with_name("settings.json")) as file:
        file.write_text(json.dumps(asdict(settings), indent=2))
    with whole_file(path) as file:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "tokenizer": tokenizer_rules(tokenizer), "step": step, "best": best}, file)


def write_log(out: Path, line: dict) -> None:
    """Append a line. After a kill and --resume some steps stand twice: of two lines of one step the later counts."""
    if RANK == 0:
        with input_errors(f"can't write {out / 'log.jsonl'}; make room, then --resume"):
            out.mkdir(parents=True, exist_ok=True)  # not before: a run that never began leaves nothing
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
