"""A GPT of 30 million parameters on 50 MB of Python source: five activations, as many steps and seeds as time allows.

One GPU, twelve minutes at most:

    python configs/gpt_30m_gpu.py --out runs/gpt_30m --minutes 12

Arms take turns seed by seed, each with the same weights and batches; no run begins that would not end in time. Every
run adds a line to results.jsonl: validation loss against steps and against seconds of training. The text is the .py
files of the installed packages, or those below --text. --show prints the table of what is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eafo_dynamic import EAFOController, own_group
from eafo_dynamic.experiments import GPT
from eafo_dynamic.experiments.compare.paired import interval
from eafo_dynamic.experiments.text.stdlib import source_files

HELD = {"policy": "static", "terms": "free"}


def arms(best_base: str) -> dict[str, tuple[str, dict[str, Any] | None]]:
    """By name: the network's activation, and the options of its corrections."""
    return {
        "gelu": ("gelu", None),
        "relu": ("relu", None),
        "squared relu": ("squared_relu", None),
        "held": ("gelu", HELD),
        f"default on {best_base}": (best_base, {}),
    }


def read_text(root: Path, megabytes: float) -> Tensor:
    """The first bytes of the .py files below a folder, in an order that mixes packages; uint8."""
    files = source_files(root)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    text = bytearray()
    for index in order:
        if len(text) >= megabytes * 1e6:
            break
        text += files[index].read_bytes()
    if len(text) < 1e5:
        raise SystemExit(f"--text {root}: {len(text)} bytes of .py files; name a folder with more")
    return torch.frombuffer(text, dtype=torch.uint8)


def batch(text: Tensor, block: int, windows: int, draw: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Windows that start anywhere, and the byte after each of their bytes."""
    starts = torch.randint(len(text) - block - 1, (windows, 1), generator=draw)
    rows = text[starts + torch.arange(block + 1)].to(device, torch.int64)
    return rows[:, :-1], rows[:, 1:]


def train(
    activation: str, options: dict[str, Any] | None, seed: int, text: Tensor, val: Tensor, size: argparse.Namespace
) -> dict[str, Any]:
    """One run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = device.type == "cuda"
    torch.manual_seed(seed)
    model = GPT(block_size=size.block, dim=size.dim, depth=size.depth, heads=size.heads, activation=activation).to(
        device
    )
    draw = torch.Generator().manual_seed(seed)
    controller = None
    if options is not None:
        example, _ = batch(text, size.block, 2, torch.Generator().manual_seed(seed), device)
        controller = EAFOController.attach(model, example, **options)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=size.lr, betas=(0.9, 0.95))
    if controller is not None:
        own_group([optimizer], controller.amplitudes, model, lr_multiple=3.0)
    warmup = max(1, size.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / size.steps)))),
    )

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = model(inputs)
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def validation() -> float:
        model.eval()
        fixed = torch.Generator().manual_seed(1)
        losses = [
            loss_of(*batch(val, size.block, size.windows, fixed, device)).item() for _ in range(size.eval_batches)
        ]
        model.train()
        return math.fsum(losses) / len(losses)

    curve: dict[str, list[float]] = {"step": [], "seconds": [], "val_loss": []}
    seconds = 0.0
    every = max(1, size.steps // 15)
    model.train()
    start = time.perf_counter()
    for step in range(1, size.steps + 1):
        optimizer.zero_grad()
        loss = loss_of(*batch(text, size.block, size.windows, draw, device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if controller is not None:
            controller.step(step)
        if step % every == 0 or step == size.steps:
            if half:
                torch.cuda.synchronize()
            seconds += time.perf_counter() - start
            curve["step"].append(step)
            curve["seconds"].append(seconds)
            curve["val_loss"].append(validation())
            start = time.perf_counter()
    parameters = sum(p.numel() for name, p in model.named_parameters() if "eafo_" not in name)
    return {"val_loss": curve["val_loss"][-1], "seconds": seconds, "parameters": parameters, "curve": curve}


def show(path: Path) -> None:
    """The table of finished runs: each arm against plain GELU of the same seed, at equal steps and at equal seconds."""
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    plain = {run["seed"]: run for run in runs if run["arm"] == "gelu"}
    print("| arm | seeds | loss | at equal steps [%] | at equal seconds [%] | time |\n|---|---:|---:|---:|---:|---:|")
    for arm in dict.fromkeys(run["arm"] for run in runs):
        ours = [run for run in runs if run["arm"] == arm and run["seed"] in plain]
        if not ours:
            continue
        steps = [100 * (run["val_loss"] / plain[run["seed"]]["val_loss"] - 1) for run in ours]
        seconds = [100 * _at_equal_seconds(run["curve"], plain[run["seed"]]["curve"]) for run in ours]
        ratio = sum(run["seconds"] / plain[run["seed"]]["seconds"] for run in ours) / len(ours)
        loss = sum(run["val_loss"] for run in ours) / len(ours)
        print(f"| {arm} | {len(ours)} | {loss:.4f} | {_text(steps)} | {_text(seconds)} | {ratio:.2f} |")


def _at_equal_seconds(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> float:
    """Relative difference of the losses at the last second that both have trained."""
    last = min(ours["seconds"][-1], theirs["seconds"][-1])
    return _interpolated(ours, last) / _interpolated(theirs, last) - 1


def _interpolated(curve: dict[str, list[float]], second: float) -> float:
    pairs = list(zip(curve["seconds"], curve["val_loss"], strict=True))
    for (before, high), (after, low) in itertools.pairwise(pairs):
        if before <= second <= after:
            return high + (low - high) * (second - before) / (after - before)
    return pairs[-1][1] if second >= pairs[-1][0] else pairs[0][1]


def _text(differences: list[float]) -> str:
    low, high = interval(differences)
    mean = sum(differences) / len(differences)
    return f"{mean:+.2f}" if math.isnan(low) else f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def main(arguments: list[str] | None = None) -> None:
    """Runs what fits, or shows what is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpt_30m"))
    parser.add_argument("--text", type=Path, default=Path(torch.__file__).parents[1])
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--megabytes", type=float, default=50.0)
    parser.add_argument("--best-base", default="squared_relu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000, 1001, 1002, 1003, 1004])
    parser.add_argument("--show", action="store_true")
    for name, value in {
        "steps": 1500,
        "windows": 32,
        "block": 512,
        "dim": 576,
        "depth": 8,
        "heads": 9,
        "eval_batches": 8,
    }.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=1e-3)
    size = parser.parse_args(arguments)
    results = size.out / "results.jsonl"
    if size.show:
        show(results)
        return
    end = time.monotonic() + 60 * size.minutes
    size.out.mkdir(parents=True, exist_ok=True)
    whole = read_text(size.text, size.megabytes)
    cut = len(whole) * 19 // 20
    text, val = whole[:cut], whole[cut:]
    done: set[tuple[str, int]] = set()
    if results.exists():
        done = {(run["arm"], run["seed"]) for run in map(json.loads, results.read_text().splitlines())}
    longest = 0.0
    for seed in size.seeds:
        for arm, (activation, options) in arms(size.best_base).items():
            if (arm, seed) in done:
                continue
            if time.monotonic() + 1.1 * longest > end:
                print(f"{arm}, seed {seed}: would not end in time")
                continue
            start = time.monotonic()
            run = train(activation, options, seed, text, val, size)
            longest = max(longest, time.monotonic() - start)
            with results.open("a") as file:
                file.write(json.dumps({"arm": arm, "seed": seed, **run}) + "\n")
            print(f"{arm}, seed {seed}: {run['val_loss']:.4f} after {run['seconds']:.0f} s", flush=True)
    show(results)


if __name__ == "__main__":
    main()
