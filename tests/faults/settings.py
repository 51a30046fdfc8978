"""Models that several real processes train in settings of torch's own; imported in the children."""

from __future__ import annotations

import contextlib
import datetime
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader

from eafo_dynamic import EAFOController
from eafo_dynamic.policy import agreement

Setting = Callable[[Path, int, Any], Any]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def batches(steps: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 8, generator=generator) for _ in range(steps)]


def optimizer_of(name: str, model: nn.Module, controller: EAFOController) -> torch.optim.Optimizer:
    own = set(controller.amplitudes.values())
    rest = [parameter for parameter in model.parameters() if parameter not in own]
    groups = [{"params": rest}, {"params": list(controller.amplitudes.values())}]
    if name == "SGD":
        return torch.optim.SGD(groups, lr=0.1)
    return torch.optim.Adam(groups, lr=1e-2)


def clip(model: nn.Module, most: float = 0.05) -> float:
    """Clips the norm of the gradient over all parameters, whole ones and shards."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    wholes = [getattr(grad, "full_tensor", lambda grad=grad: grad)() for grad in grads]
    norm = torch.stack([whole.norm() for whole in wholes]).norm()
    for grad in grads:
        grad.mul_((most / norm).clamp(max=1.0))
    return float(norm)


def train(
    model: nn.Module,
    controller: EAFOController,
    inputs: list[Tensor],
    name: str,
    parts: int = 1,
    clips: bool = False,
    forward: Callable[[Tensor], Tensor] | None = None,
    begin: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Any]:
    """Trains on every batch, in micro-batches.

    Returns:
        Amplitudes, weights and the rows of the log.
    """
    if optimizer is None:
        optimizer = optimizer_of(name, model, controller)
    rows: list[Any] = []
    for step, x in enumerate(inputs, begin + 1):
        optimizer.zero_grad()
        for part in x.chunk(parts):
            ((forward or model)(part).square().mean() / parts).backward()
        if clips:
            clip(model)
        controller.before_optimizer_step(step - 1)
        optimizer.step()
        rows += controller.step(step)
    return summary(model, controller, rows)


def summary(model: nn.Module, controller: EAFOController, rows: list[Any]) -> dict[str, Any]:
    weights = [getattr(p, "full_tensor", lambda p=p: p)().detach().flatten() for p in model.parameters()]
    columns = ("eps", "mu", "sigma", "entropy", "mean", "std")
    return {
        "eps": torch.cat([each.detach().flatten() for each in controller.bank.amplitudes]),
        "weights": torch.cat(weights),
        "rows": torch.tensor([[float(row[column]) for column in columns] for row in rows]),
    }


def alone(name: str, inputs: list[Tensor] | None = None, **options: Any) -> dict[str, Any]:
    """One process on the whole batch."""
    model, options = net(), dict(options)
    parts, clips = options.pop("parts", 1), options.pop("clips", False)
    controller = EAFOController.attach(model, torch.zeros(2, 8), update_every_n_steps=2, **options)
    return train(model, controller, inputs or batches(), name, parts, clips)


def start(setting: Setting, folder: Path, rank: int, ranks: int, port: int, given: Any) -> None:
    """What a child runs: its result goes into ``<rank>.pt``, its error into ``<rank>.txt``."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    distributed.init_process_group("gloo", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=120))
    result: Any = None
    try:
        result = setting(folder, rank, given)
    except Exception as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    else:
        torch.save(result, folder / f"{rank}.pt")
        distributed.barrier()
    os._exit(0)  # a group whose ranks have stopped at different places cannot be taken down


def tripwire(folder: Path, rank: int, what: str) -> Any:
    """Two ranks of which the second is different in one thing."""
    model, options = net(), {}
    if what == "only one attached":
        agreement._PATIENCE = datetime.timedelta(seconds=2)
    if what == "options" and rank:
        options["max_eps"] = 0.5
    if what == "sites" and rank:
        model[3] = nn.SiLU()
    if what == "only one attached" and rank:
        import time

        time.sleep(6)
        return None
    if what == "groups of one":
        options["process_group"] = [distributed.new_group([each]) for each in range(2)][rank]
    controller = EAFOController.attach(model, torch.zeros(2, 8), update_every_n_steps=2, **options)
    parallel: nn.Module = model
    if what in ("Join", "step"):
        parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    context = contextlib.nullcontext()
    if what == "Join":
        context = Join([parallel])
    with context:
        for step, x in enumerate(batches(), 1):
            optimizer.zero_grad()
            parallel(x.chunk(2)[rank] + rank).square().mean().backward()
            optimizer.step()
            controller.step(step * (1 + rank) if what == "step" else step)
    return summary(model, controller, list(controller.records))


def attached_late(folder: Path, rank: int, what: str) -> Any:
    """Attaches on, or inside, a model that is wrapped already."""
    from torch.distributed.fsdp import fully_shard

    model = net()
    if what.startswith("DDP"):
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(model)
    else:
        wrapped = fully_shard(nn.Sequential(model) if what.endswith("inside") else model)
    EAFOController.attach(model if what.endswith("inside") else wrapped)
    return wrapped


def sharded(folder: Path, rank: int, given: tuple[str, dict[str, Any]]) -> Any:
    """FSDP2, each rank on its share of every batch."""
    from torch.distributed.fsdp import fully_shard

    name, options = given[0], dict(given[1])
    parts, clips, asks = options.pop("parts", 1), options.pop("clips", False), options.pop("asks", True)
    layers = options.pop("layers", True)
    model = net()
    controller = EAFOController.attach(model, torch.zeros(2, 8), update_every_n_steps=2, **options)
    ignored: dict[str, Any] = {"ignored_params": set(controller.amplitudes.values())}
    if asks:
        ignored = controller.shard_options()
    for layer in (model[0], model[2]) if layers else ():
        fully_shard(layer, **ignored)
    fully_shard(model, **ignored)
    ranks = distributed.get_world_size()
    return train(model, controller, [shares(x, ranks, rank, parts) for x in batches()], name, parts, clips)


def shares(x: Tensor, ranks: int, rank: int, parts: int) -> Tensor:
    """This rank's share of every micro-batch."""
    return torch.cat([part.chunk(ranks)[rank] for part in x.chunk(parts)])


def resharded(folder: Path, rank: int, given: tuple[str, int, int]) -> Any:
    """FSDP2 for some steps, from the checkpoint of others and into one of its own."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    name, begin, end = given
    model = net()
    controller = EAFOController.attach(model, torch.zeros(2, 8), update_every_n_steps=2, density="histogram")
    ranks = distributed.get_world_size()
    if ranks > 1:
        fully_shard(model, **controller.shard_options())
    optimizer = optimizer_of(name, model, controller)

    def state() -> dict[str, Any]:
        of_optimizer = get_optimizer_state_dict(model, optimizer)
        return {"model": model.state_dict(), "optimizer": of_optimizer, "eafo": controller}

    if begin:
        saved = state()
        dcp.load(saved, checkpoint_id=str(folder.parent / f"step{begin}"))
        model.load_state_dict(saved["model"])
        set_optimizer_state_dict(model, optimizer, saved["optimizer"])
    inputs = [x.chunk(ranks)[rank] for x in batches()[begin:end]]
    result = train(model, controller, inputs, name, begin=begin, optimizer=optimizer)
    dcp.save(state(), checkpoint_id=str(folder.parent / f"step{end}"))
    return result


def lightning(folder: Path, rank: int, way: str) -> Any:
    """Lightning's ModelParallelStrategy, by FSDP2 or by tensor parallelism; "auto" trains in one process.

    With "meta" the model is made without memory, in ``configure_model``; with "clipped" Lightning clips gradients.
    """
    way, *more = way.split()
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from eafo_dynamic import EAFOCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.example_input_array, self.is_cut = net(), torch.zeros(2, 8), False

        def configure_model(self) -> None:
            if self.is_cut or way == "auto":
                return
            self.is_cut = True
            mesh: Any = self.device_mesh
            if "meta" in more:
                with torch.device("meta"):
                    self.net = net()
            if way == "fully_shard":
                fully_shard(self.net, mesh=mesh["data_parallel"])
            else:
                plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
                parallelize_module(self.net, mesh["tensor_parallel"], plan)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Tensor, number: int) -> Tensor:
            return self(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            if "meta" in more and way != "auto":
                options = StateDictOptions(full_state_dict=True, strict=False)
                set_model_state_dict(self.net, net().state_dict(), options=options)
            return torch.optim.SGD(self.parameters(), lr=0.1)

    ranks = 1 if way == "auto" else 2
    inputs = [x.chunk(ranks)[rank] if way == "fully_shard" else x for x in batches()]
    callback = EAFOCallback(update_every_n_steps=2, verbose=False, lr_multiple=1.0)
    strategy: Any = "auto"
    if ranks > 1:
        data = 2 if way == "fully_shard" else 1
        strategy = ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=2 // data)
        os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing"), False)
    module = Module()
    Trainer(
        accelerator="cpu",
        devices=ranks,
        max_epochs=1,
        strategy=strategy,
        use_distributed_sampler=False,
        callbacks=[callback],
        default_root_dir=folder,
        enable_model_summary=False,
        gradient_clip_val=0.05 if "clipped" in more else None,
        **quiet,
    ).fit(module, DataLoader(inputs, batch_size=None))
    assert callback.controller is not None
    return summary(module, callback.controller, list(callback.controller.records))


def whole_amplitudes_forgotten(folder: Path, rank: int, given: None) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = net()
    controller = EAFOController.attach(model, torch.zeros(2, 8), per_channel=True)
    fully_shard(model)
    return train(model, controller, batches(), "SGD")


def flattened(folder: Path, rank: int, given: None) -> Any:
    """A parameter as FullyShardedDataParallel marks it, which itself wants an accelerator."""
    model = net()
    controller = EAFOController.attach(model, torch.zeros(2, 8))
    model[0].weight._fsdp_flattened = True
    return train(model, controller, batches(), "SGD")


def pipeline(folder: Path, rank: int, given: tuple[str, dict[str, Any]]) -> Any:
    """Two stages, each on a rank of its own, with its own statistics."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    name, options = given
    groups = [distributed.new_group([each]) for each in range(2)]
    stage = halves()[rank]
    example = torch.zeros(2, 8 if rank == 0 else 16)
    controller = EAFOController.attach(stage, example, update_every_n_steps=2, process_group=groups[rank], **options)
    optimizer = optimizer_of(name, stage, controller)
    runs = ScheduleGPipe(
        PipelineStage(stage, rank, 2, torch.device("cpu")), 2, loss_fn=lambda out, _: out.square().mean()
    )
    rows: list[Any] = []
    for step, x in enumerate(batches(), 1):
        optimizer.zero_grad()
        if rank == 0:
            runs.step(x)
        else:
            runs.step(target=torch.zeros(16, 4))
        optimizer.step()
        rows += controller.step(step)
    return summary(stage, controller, rows)


def halves() -> list[nn.Sequential]:
    model = net()
    return [model[:2], nn.Sequential(model[2], nn.GELU(), nn.Linear(16, 16), model[3], model[4])]


def pipeline_alone(name: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Both stages in one process."""
    stages = halves()
    examples = [torch.zeros(2, 8), torch.zeros(2, 16)]
    controllers = [
        EAFOController.attach(stage, example, update_every_n_steps=2, **options)
        for stage, example in zip(stages, examples, strict=True)
    ]
    optimizers = [optimizer_of(name, *each) for each in zip(stages, controllers, strict=True)]
    rows: list[list[Any]] = [[], []]
    for step, x in enumerate(batches(), 1):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for part in x.chunk(2):
            (stages[1](stages[0](part)).square().mean() / 2).backward()
        for place, optimizer in enumerate(optimizers):
            optimizer.step()
            rows[place] += controllers[place].step(step)
    return [summary(*each) for each in zip(stages, controllers, rows, strict=True)]


def tensor_parallel(folder: Path, rank: int, given: tuple[str, dict[str, Any]]) -> Any:
    """The first two layers sharded by columns and rows; the second activation sees whole vectors."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    name, options = given[0], dict(given[1])
    tells = options.pop("tells", True)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("tensor",))
    if tells:
        options["tensor_parallel"] = mesh["tensor"]
    model = net()
    controller = EAFOController.attach(model, torch.zeros(2, 8), update_every_n_steps=2, **options)
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return train(model, controller, batches(), name)
