"""The study: every variant, and `vega` at three other ratios, on the demo's shapes, with 3 seeds, five of them with 5.

    python -m studies.study          the table of the runs in studies/results.jsonl
    python -m studies.study --run    train those that are missing there, as many side by side as there are cores

A run takes about 15 minutes of a core. Stopped and started again, the study goes on where it was. Another processor or
another number of threads is another run of the same seed; each line of the results names them.
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
FIVE_SEEDS = ("vega", "contrastive-only", "linguistic", "enhanced-linguistic", "local-only", "global-only")
ROWS = {name: ["--variant", name] for name in VARIANTS} | {f"ratio={r}": ["--ratio", str(r)] for r in (0.1, 0.5, 0.8)}
ROWS |= {f"{name},weight=0.5": ["--variant", name, "--contrastive", "0.5"] for name in ("vega", "contrastive-only")}


def read_results(file: Path = RESULTS) -> list[dict]:
    """One dict a run: "name", "seed", "processor", "threads", and the scores of each split."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def train(name: str, seed: int, flags: list[str], folder: Path, results: Path) -> None:
    """One run, on one thread; its scores become a line of the results."""
    out = folder / f"{name}-{seed}"
    command = [sys.executable, HERE.parent / "train.py", *ROWS[name], "--seed", str(seed), "--out", out, "--resume"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(f"{out.suffix}.log"), "a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*map(str, command), *flags], stdout=log, stderr=log, env=environment, check=True)
    scores = json.loads((out / "metrics.json").read_text())
    line = {"name": name, "seed": seed, "processor": processor(), "threads": 1, **scores}
    with open(results, "a") as file:
        file.write(json.dumps(line) + "\n")


def processor() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return (names or [platform.processor()])[0] + (", AVX-512" if "avx512f" in info else "")


def table(runs: list[dict]) -> str:
    """The paper's ablations beside these runs' scores on val.

    Of mIoU and oIoU: mean and standard deviation over the seeds, the paper's on RefCOCO, the mean difference to vega's
    run of the same seed, and its two-sided p by the exact permutation test of the differences' signs.
    """
    by_name = collections.defaultdict(dict)  # name -> seed -> scores on val
    for run in runs:
        by_name[run["name"]][run["seed"]] = run["val"]
    paper = {name: (v.table, v.mIoU, v.oIoU) for name, v in VARIANTS.items()}
    paper |= {f"ratio={ratio}": ("6", *scores) for ratio, scores in RATIOS.items()}
    columns = "".join(f" {column} (sd) | paper | - vega | p |" for column in ("mIoU", "oIoU"))
    lines = [f"| table | row | n |{columns}", "| --- " * 11 + "|"]
    for name in filter(by_name.get, paper):
        number, *theirs = paper[name]
        lines.append(f"| {number} | `{name}` | {len(by_name[name])} |")
        for column, score in zip(("mIoU", "oIoU"), theirs):
            ours = {seed: scores[column] for seed, scores in by_name[name].items()}
            sd = f" ({statistics.stdev(ours.values()):.2f})" if len(ours) > 1 else ""
            lines[-1] += f" {np.mean(list(ours.values())):.2f}{sd} | {f'{score:.2f}' if score else ''} |"
            shared = [seed for seed in ours if name != "vega" and seed in by_name["vega"]]
            change = [ours[seed] - by_name["vega"][seed][column] for seed in shared]
            lines[-1] += f" {np.mean(change):+.2f} | {sign_test(change):.3f} |" if change else " | |"
    return "\n".join(lines)


def sign_test(differences: list[float]) -> float:
    """The share of all ways to sign the differences whose sum is as far from zero as theirs."""
    sums = [sum(signed) for signed in itertools.product(*((d, -d) for d in differences))]
    return float(np.mean(np.abs(sums) >= abs(sum(differences)) - 1e-9))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="train the runs that are missing in the results")
    parser.add_argument("--only", nargs="+", default=list(ROWS), metavar="NAME", help="of these rows alone")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), metavar="DIR", help="where the runs go")
    args, flags = parser.parse_known_args(argv)  # other flags are train.py's
    if args.run:
        seeds = {name: range(5 if name in FIVE_SEEDS else 3) for name in args.only}
        here = processor(), 1  # another processor or number of threads is another run of the same seed
        done = {(r["name"], r["seed"]) for r in read_results(args.results) if (r["processor"], r["threads"]) == here}
        todo = sorted((seed, name) for name in seeds for seed in seeds[name] if (name, seed) not in done)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            runs = pool.map(lambda one: train(one[1], one[0], flags, args.folder, args.results), todo)
            list(tqdm(runs, "training", len(todo), unit="run", disable=None))
    print(table(read_results(args.results)))


if __name__ == "__main__":
    main()
