"""GPT-2 from its configuration, by FSDP2 on several ranks in bfloat16: checkpoint, resume, merge, export.

The ranks train, and save every few steps into one distributed checkpoint; started again, they go on from it, also with
another number of ranks. At the end the first rank puts the shards together, merges the corrections into the model and
writes a graph that needs nothing of this package.

Needs: pip install transformers
Run: torchrun --nproc-per-node 2 examples/recipes/gpt2_fsdp2.py runs/gpt2             (a tiny model, on a CPU too)
Or:  torchrun --nproc-per-node 8 examples/recipes/gpt2_fsdp2.py runs/gpt2 124M 2000   (124 million parameters)
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import GPT2Config, GPT2LMHeadModel

from eafo_dynamic import EAFOController, apply_from_checkpoint, merge, own_group, save_merged

CONFIGS = {
    "tiny": GPT2Config(vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0),
    "124M": GPT2Config(),
}


def blocks() -> torch.Tensor:
    """Bytes of a module of Python's standard library, 64 a row; put your own tokens here."""
    text = torch.tensor(list(inspect.getsource(json.decoder).encode()))
    return text[: len(text) // 64 * 64].view(-1, 64)


def parts(model: Any, optimizer: torch.optim.Optimizer, controller: EAFOController, step: int) -> dict[str, Any]:
    """What a checkpoint has."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "eafo": controller, "step": step}


def main(folder: str | Path, size: str = "tiny", steps: int = 20, save_every: int = 10) -> None:
    """Trains up to a step, from where the folder's checkpoint is."""
    folder = Path(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    torch.manual_seed(0)  # the same model on every rank
    model: Any = GPT2LMHeadModel(CONFIGS[size]).to(device)
    data = blocks()

    controller = EAFOController.attach(model, data[:2].to(device), update_every_n_steps=save_every)
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.transformer.h:
        fully_shard(block, mp_policy=low, **controller.shard_options())
    fully_shard(model, mp_policy=low, **controller.shard_options())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    own_group([optimizer], controller.amplitudes, model)

    begin, checkpoint = 0, folder / "checkpoint"
    if checkpoint.exists():
        saved = parts(model, optimizer, controller, 0)
        dcp.load(saved, checkpoint_id=checkpoint)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        begin = saved["step"]

    model.train()
    for step in range(begin + 1, steps + 1):
        chosen = torch.randint(len(data), (8 * ranks,), generator=torch.Generator().manual_seed(step))
        tokens = data[chosen.chunk(ranks)[rank]].to(device)
        torch.manual_seed(ranks * step + rank)  # of dropout, so that a resumed training draws what this one does
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        controller.clip_grad_norm_(1.0)
        controller.before_optimizer_step(step - 1)
        optimizer.step()
        controller.step(step)
        if step % save_every == 0:  # a step with a round, after which no rank has a sample waiting
            dcp.save(parts(model, optimizer, controller, step), checkpoint_id=checkpoint)
    eps = [round(float(each), 6) for each in controller.amplitudes.values()]
    print(f"rank {rank} of {ranks}: steps {begin + 1} to {steps}, eps {eps}", flush=True)

    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        export(folder, size, whole, data[:2])
    distributed.barrier()
    distributed.destroy_process_group()


def export(folder: Path, size: str, whole: dict[str, Any], tokens: torch.Tensor) -> None:
    """Writes the weights, and the merged model as a graph."""
    torch.save(whole, folder / "weights.pt")
    model = apply_from_checkpoint(GPT2LMHeadModel(CONFIGS[size]), folder / "weights.pt", tokens).eval()
    model.config.use_cache = False  # no graph returns a cache
    with torch.no_grad():
        wanted = model(tokens).logits
        file = save_merged(merge(model), folder / "gpt2.pt2", tokens)
        found = torch.export.load(file).module()(tokens)
    difference = float((found.logits - wanted).abs().max())
    print(f"{file}: largest difference to the trained model {difference:.1e}", flush=True)


if __name__ == "__main__":
    given = sys.argv[1:] or ["runs/gpt2"]
    main(given[0], *given[1:2], *map(int, given[2:4]))
