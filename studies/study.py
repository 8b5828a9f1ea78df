"""The study: which part of VEGA helps? Variants, trained several times on a small task, are compared.

    python -m studies.study                       the tables of the runs in studies/results.jsonl
    python -m studies.study --claims              the paper's claims one by one
    python -m studies.study --pairs NAME NAME     two rows, seed by seed
    python -m studies.study --run                 train on the shapes what is missing there, a run on each core
    python -m studies.study --run --task things   the same on data/things, which `python -m studies.things` writes

A run takes about 15 to 30 minutes of a core. Stopped and started again, the study goes on where it was. The same seed
gives another result on another processor or with another number of threads, so each line of the results names them,
and only runs of one processor and number of threads are compared.
"""

import argparse
import collections
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from selection import RATIOS, VARIANTS

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
ROWS = {name: ["--variant", name] for name in VARIANTS} | {f"ratio={r}": ["--ratio", str(r)] for r in (0.1, 0.5, 0.8)}
ROWS |= {f"{name},weight=0.5": ["--variant", name, "--contrastive", "0.5"] for name in ("vega", "contrastive-only")}
FIVE_SEEDS = ("vega", "contrastive-only", "linguistic", "enhanced-linguistic", "local-only", "global-only")
# train.py's flags for a task; typed after them, they can be changed
TASKS = {
    "shapes": [],
    "things": [
        "--dataset", "data/things", "--model", "tiny", "--bert", "sentence-transformers/all-MiniLM-L6-v2",
        "--epochs", "2", "--max-tokens", "16",  # the longest sentence has 16
    ],
}  # fmt: skip
TASK_ROWS = {
    "shapes": {name: 5 if name in FIVE_SEEDS else 3 for name in ROWS},  # row -> number of seeds
    "things": dict.fromkeys(("vega", "contrastive-only", "enhanced-linguistic", "linguistic", "sum-once-sharp"), 3),
}
# table -> what the paper says of its rows: (better, worse). "ours": more that its tables imply, for rows without Eq. 5
CLAIMS = {
    "2": [("enhanced-linguistic", "linguistic"), ("vega", "linguistic"), ("vega", "enhanced-linguistic")],
    "3a": [("vega", "all-pixels"), ("topk-pixels", "all-pixels"), ("vega", "topk-pixels")],
    "3b": [("vega", "no-cues"), ("vega", "local-only"), ("vega", "global-only")],
    "4a": [("vega", "sigmoid-threshold")],
    "4b": [("vega", "no-contrastive")],
    "4c": [("vega", "no-similarity-weights")],
    "4d": [("vega", "no-normalisation"), ("unmasked-softmax", "no-normalisation"), ("vega", "unmasked-softmax")],
    "4e": [("vega", "no-cross-attention")],
    "6": [("vega", "ratio=0.1"), ("vega", "ratio=0.5"), ("vega", "ratio=0.8")],
    "ours": [
        ("no-contrastive", "linguistic"), ("no-contrastive", "enhanced-linguistic"), ("no-contrastive", "all-pixels"),
        ("no-contrastive", "no-cues"), ("no-contrastive", "local-only"), ("all-pixels", "enhanced-linguistic"),
        ("local-only", "enhanced-linguistic"), ("enhanced-linguistic", "no-cues"),
    ],
}  # fmt: skip


def read_results(file: Path = RESULTS) -> list[dict]:
    """One dict a run: "task", "name", "seed", "processor", "threads", and the scores of each split."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def train(task: str, name: str, seed: int, flags: list[str], folder: Path, results: Path) -> None:
    """One run, on one thread; its scores become a line of the results."""
    out = folder / f"{task}-{name}-{seed}"
    command = [sys.executable, HERE.parent / "train.py", *TASKS[task], *ROWS[name], "--seed", seed, "--out", out]
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(f"{out.suffix}.log"), "a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*map(str, command), "--resume", *flags], stdout=log, stderr=log, env=environment, check=True)
    scores = json.loads((out / "metrics.json").read_text())
    line = {"task": task, "name": name, "seed": seed, "processor": processor(), "threads": 1, **scores}
    with open(results, "a") as file:
        file.write(json.dumps(line) + "\n")


def processor() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return (names or [platform.processor()])[0] + (", AVX-512" if "avx512f" in info else "")


def groups(runs: list[dict]) -> dict[str, list[dict]]:
    """The runs that may be compared: of one task, processor and number of threads."""
    groups = collections.defaultdict(list)
    for run in runs:
        groups[f"{run['task']}; {run['processor']}; {run['threads']} thread"].append(run)
    return groups


def paper_row(name: str) -> tuple[str, float | None, float | None]:
    """A row's table in the paper, and its oIoU and mIoU there less those of vega, on RefCOCO val; None for our rows."""
    row = VARIANTS.get(name)
    if name.startswith("ratio="):
        table, (mIoU, oIoU) = "6", RATIOS[float(name[6:])]
    elif row is None or row.oIoU is None:
        return "ours", None, None
    else:
        table, mIoU, oIoU = row.table, row.mIoU, row.oIoU
    if name == "vega":
        return table, None, None
    vega = VARIANTS["vega"].mIoU if table[0] in "23" else RATIOS[0.3][0]  # 76.28 and 76.27
    return table, oIoU - VARIANTS["vega"].oIoU, mIoU - vega


def table(runs: list[dict], split: str = "val") -> str:
    """The runs of one task, processor and number of threads: a row a variant, and for oIoU and mIoU

    - mean and standard deviation over the seeds
    - the difference to vega's run of the same seed: mean, smallest and largest
    - its two-sided p by the exact permutation test of the differences' signs, from 5 seeds on
    - the paper's difference, on RefCOCO val.

    A row "NAME,weight=0.5" is compared with vega of that weight, and that with vega.
    """
    by_name = collections.defaultdict(dict)  # name -> seed -> scores
    for run in runs:
        by_name[run["name"]][run["seed"]] = run[split]
    columns = "".join(f" {column} (sd) | - vega | p | paper |" for column in ("oIoU", "mIoU"))
    lines = [f"| table | row | n |{columns}", "| --- " * 11 + "|"] if runs else []
    for name in filter(by_name.get, ROWS):
        number, *paper = paper_row(name)
        lines.append(f"| {number} | `{name}` | {len(by_name[name])} |")
        variant, comma, weight = name.partition(",")
        reference = "vega" if variant == "vega" else f"vega{comma}{weight}"
        for column, theirs in zip(("oIoU", "mIoU"), paper):
            ours = {seed: scores[column] for seed, scores in by_name[name].items()}
            sd = f" ({statistics.stdev(ours.values()):.2f})" if len(ours) > 1 else ""
            lines[-1] += f" {np.mean(list(ours.values())):.2f}{sd} |"
            shared = [seed for seed in ours if seed in by_name[reference] and name != reference]
            change = [ours[seed] - by_name[reference][seed][column] for seed in shared]
            between = f" ({min(change):+.2f} to {max(change):+.2f})" if len(change) > 1 else ""
            lines[-1] += f" {np.mean(change):+.2f}{between} |" if change else " |"
            lines[-1] += f" {sign_test(change):.3f} |" if len(change) >= 5 else " |"
            lines[-1] += f" {theirs:+.2f} |" if theirs is not None else " |"
    return "\n".join(lines)


def pairs(runs: list[dict], one: str, other: str, split: str = "val") -> str:
    """Two rows' runs of the same seeds, seed by seed: both oIoU and their difference, both mIoU and theirs."""
    lines = [f"| seed | oIoU: `{one}` | `{other}` | difference | mIoU: `{one}` | `{other}` | difference |"]
    lines.append("| --- " * 7 + "|")
    scores = {(run["name"], run["seed"]): run[split] for run in runs}
    found = []
    for seed in sorted(seed for name, seed in scores if name == one and (other, seed) in scores):
        mine, theirs = scores[one, seed], scores[other, seed]
        found.append([x for c in ("oIoU", "mIoU") for x in (mine[c], theirs[c], mine[c] - theirs[c])])
        lines.append(f"| {seed} |" + "".join(" {:.2f} | {:.2f} | {:+.2f} |".format(*found[-1][i:]) for i in (0, 3)))
    if len(found) > 1:
        means = np.mean(found, axis=0)
        lines.append("| mean |" + "".join(" {:.2f} | {:.2f} | {:+.2f} |".format(*means[i:]) for i in (0, 3)))
    return "\n".join(lines) if found else ""


def claims(runs: list[dict], split: str = "val") -> str:
    """CLAIMS in oIoU: the paper's difference, better minus worse; ours over the shared seeds; what is seen of it.

    - shows: ours is positive on every seed
    - cannot be seen: it is not, but the paper's is not above our largest
    - does not show: the paper's is above our largest.
    """
    scores = {(run["name"], run["seed"]): run[split]["oIoU"] for run in runs}
    lines = ["| table | better in the paper | worse | Eq. 5 in | paper | n | ours, smallest to largest | |"]
    lines.append("| --- " * 8 + "|")
    for number, better, worse in [(number, *rows) for number in CLAIMS for rows in CLAIMS[number]]:
        change = [scores[better, seed] - scores[worse, seed] for name, seed in scores
                  if name == better and (worse, seed) in scores]  # fmt: skip
        if not change:
            continue
        theirs = (paper_row(better)[1] or 0) - (paper_row(worse)[1] or 0)
        seen = "shows" if min(change) > 0 else "cannot be seen" if theirs <= max(change) else "does not show"
        having = [name not in VARIANTS or VARIANTS[name].eq5 for name in (better, worse)]
        eq5 = "both" if all(having) else "the better" if any(having) else "neither"
        lines.append(f"| {number} | `{better}` | `{worse}` | {eq5} | {theirs:+.2f} | {len(change)} |"
                     f" {np.mean(change):+.2f} ({min(change):+.2f} to {max(change):+.2f}) | {seen} |")  # fmt: skip
    return "\n".join(lines) if len(lines) > 2 else ""


def sign_test(differences: list[float]) -> float:
    """The share of all ways to sign the differences whose sum is as far from zero as theirs."""
    sums = [sum(signed) for signed in itertools.product(*((d, -d) for d in differences))]
    return float(np.mean(np.abs(sums) >= abs(sum(differences)) - 1e-9))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="Other flags are train.py's."
    )
    parser.add_argument("--run", action="store_true", help="train the runs that are missing in the results")
    parser.add_argument("--task", choices=TASKS, default="shapes", help="of --run")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="NAME", help="of these rows alone")
    parser.add_argument("--pairs", nargs=2, choices=ROWS, metavar="NAME", help="instead, two rows seed by seed")
    parser.add_argument("--claims", action="store_true", help="instead, the paper's claims one by one")
    parser.add_argument("--split", default="val", metavar="NAME", help="of the tables; each task has val")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), metavar="DIR", help="where the runs go")
    args, flags = parser.parse_known_args(argv)
    if args.run:
        here = {"task": args.task, "processor": processor(), "threads": 1}
        done = {(r["name"], r["seed"]) for r in read_results(args.results) if here.items() <= r.items()}
        seeds = TASK_ROWS[args.task]
        todo = [(name, seed) for name in args.only or seeds for seed in range(seeds.get(name, 3))]
        todo = sorted({*todo} - done, key=lambda run: run[::-1])  # seed 0 of all rows first
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            runs = pool.map(lambda one: train(args.task, *one, flags, args.folder, args.results), todo)
            list(tqdm(runs, "training", len(todo), unit="run", disable=None))
    for title, runs in groups(read_results(args.results)).items():
        runs = [run for run in runs if args.split in run]
        if args.pairs:
            shown = pairs(runs, *args.pairs, args.split)
        else:
            shown = (claims if args.claims else table)(runs, args.split)
        if shown:
            print(f"\n{title}; {args.split}\n\n{shown}")


if __name__ == "__main__":
    main()
