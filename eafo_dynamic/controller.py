"""One update round over all sites, for any training loop: collect, estimate, correct, record."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from eafo_dynamic.activation import Site
from eafo_dynamic.bases import as_base
from eafo_dynamic.entropy import entropy_gradient, mixed_entropy
from eafo_dynamic.errors import SiteError
from eafo_dynamic.options import Options
from eafo_dynamic.policy import make_policy
from eafo_dynamic.sites import SiteReport, find_sites
from eafo_dynamic.statistics import dead_fraction, gather_ranks, moments, stack_samples
from eafo_dynamic.surgery import plain_view, unwrap, wrap
from eafo_dynamic.update import Functions, RunningDensity, bounded_move, make_estimator, refreshed

__all__ = ["EAFOController", "Record"]

Record = dict[str, object]
"""One row of the correction log: one site at one update round."""



class EAFOController:
    """The corrections of one model: wraps it, and updates every site when it is time.

    Use in any training loop::

        controller = EAFOController.attach(model)
        ...
        optimizer.step()
        controller.step(global_step)

    Args:
        model: any module, not wrapped yet; it is wrapped in place.
        options: see Options.
        report: sites to wrap, from ``find_sites``; None: a static search.

    Attributes:
        records: the newest rows of the correction log, oldest first; at most ``KEPT_RECORDS``.
        report: what was found in the model.

    Raises:
        SiteError: if the model has nothing to wrap.
        PatternError: if a pattern matches nothing.
    """

    KEPT_RECORDS = 20_000

    def __init__(self, model: nn.Module, options: Options | None = None, report: SiteReport | None = None) -> None:
        self.options = options or Options()
        self.model = model
        self.report = report or find_sites(model, selection=self.options.selection)
        self.policy = make_policy(self.options.policy)
        self.schedule = self.options.schedule
        self.trust_region = self.options.trust_region
        self._running = RunningDensity(make_estimator(self.options.density), self.options.momentum)
        self.records: deque[Record] = deque(maxlen=self.KEPT_RECORDS)
        self.rounds = 0
        self._last_step = -1
        self._gradient: Tensor | None = None
        self._eps_before: Tensor | None = None  # eps after the previous round
        self._hosted = wrap(model, self.report, self.options.eps_init, tabulated=self.options.tabulated)
        self._prepare()

    @classmethod
    def attach(cls, model: nn.Module, *example_args: Any, **options: Any) -> EAFOController:
        """Wraps a model and returns its controller.

        Args:
            model: any module.
            *example_args: an example input, to find activations that are called several times a forward.
            **options: see Options.

        Returns:
            The controller; call ``step(global_step)`` after each optimiser step.
        """
        checked = Options(**options)
        return cls(model, checked, find_sites(model, *example_args, selection=checked.selection))

    def _prepare(self) -> None:
        self._plain = [plain_view(self.model.get_submodule(site.module_name)) for site in self.sites]
        policy = self.policy
        collects = max(1, math.ceil(self.schedule.update_every_n_steps / self.schedule.collect_period))
        quota = math.ceil(self.options.samples_per_site / (collects * _world_size()))
        for (host, site) in self._hosted:
            site.collector.quota = quota
            self._eps(host, site).requires_grad_(policy.trains_eps)
        self._switch = self._hosted[0][1].switch
        self._switch.collecting = self.schedule.collects(0)

    # ------------------------------------------------------------------ what others ask

    @property
    def sites(self) -> list[Site]:
        """The wrapped sites, in the order of the log."""
        return [site for _, site in self._hosted]

    @property
    def amplitudes(self) -> dict[str, nn.Parameter]:
        """Eps of every site by its parameter name in the model, for an optimiser."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return {names[id(eps)]: eps for host, site in self._hosted for eps in [self._eps(host, site)]}

    @property
    def collecting(self) -> bool:
        """Whether the coming training forwards leave samples."""
        return self._switch.collecting

    @collecting.setter
    def collecting(self, value: bool) -> None:
        self._switch.collecting = value

    def detach(self) -> nn.Module:
        """Takes all corrections out of the model.

        Returns:
            The model as it was.
        """
        unwrap(self.model)
        return self.model

    # ------------------------------------------------------------------ the training loop's calls

    def step(self, global_step: int, epoch: int = 0) -> list[Record]:
        """Call after each optimiser step (or after each micro-batch: only a changed step counts).

        Keeps every eps in the trust region and runs an update round when the schedule says so.

        Args:
            global_step: optimiser steps taken so far.
            epoch: for the log.

        Returns:
            The rows of this update round; empty if there was none.
        """
        if global_step == self._last_step:
            return []
        self._last_step = global_step
        if self.policy.trains_eps:
            self._bound_eps()
        rows = self.update(global_step, epoch) if self.schedule.updates(global_step) else []
        self._switch.collecting = self.schedule.collects(global_step)
        return rows

    def before_optimizer_step(self, global_step: int) -> None:
        """Call between backward and the optimiser's step, for the policies and options that touch eps.grad.

        Adds ``weight * dH_r/d eps`` of the last round (policy ``hybrid``); drops the gradient once frozen.

        Args:
            global_step: optimiser steps taken so far.
        """
        if self.schedule.frozen(global_step + 1):
            for host, site in self._hosted:
                self._eps(host, site).grad = None
        elif self.policy.adds_gradient and self._gradient is not None:
            for (host, site), gradient in zip(self._hosted, self._gradient, strict=True):
                eps = self._eps(host, site)
                extra = (self.policy.adds_gradient * gradient).to(eps.dtype)
                eps.grad = extra.clone() if eps.grad is None else eps.grad + extra

    @torch.no_grad()
    def update(self, step: int, epoch: int = 0) -> list[Record]:
        """Runs one update round now: all sites at once.

        Args:
            step: optimiser steps taken so far, for the log.
            epoch: for the log.

        Returns:
            One row a site.
        """
        samples, dead = self._samples()
        stats = moments(samples)
        usable = (stats.n >= 2) & (stats.std > 0) & stats.std.isfinite() & stats.mean.isfinite()
        old = self.functions()
        resolution = self.options.resolution
        outputs = old.outputs(samples)
        entropies = mixed_entropy(outputs, resolution=resolution)
        gradient = entropy_gradient(outputs, old.direction(samples), resolution=resolution)
        self._gradient = torch.where(usable, gradient, 0.0).nan_to_num().to(old.eps.dtype)

        new, fraction = bounded_move(old, self._wanted(old, samples, usable), self.trust_region)
        self._commit(new)
        self.rounds += 1
        columns = {
            "eps": new.eps,
            "delta_eps": new.eps - (old.eps if self._eps_before is None else self._eps_before),
            "d_entropy_d_eps": gradient,
            "entropy": entropies.entropy,
            "continuous_entropy": entropies.continuous_entropy,
            "atom_mass": entropies.atom_mass,
            "dead_fraction": dead,
            "mean": stats.mean,
            "std": stats.std,
            "skew": stats.skew,
            "kurtosis": stats.kurtosis,
            "n": stats.n,
            "mu": new.shape[:, 0],
            "sigma": new.shape[:, 1],
        }
        self._eps_before = new.eps
        rows = self._rows(step, epoch, columns, _events(stats.n, usable, fraction))
        self.records.extend(rows)
        return rows

    def _samples(self) -> tuple[Tensor, Tensor]:
        """Samples of all sites and ranks [S, n], and dead fractions [S]; the collectors are empty afterwards."""
        drained = [site.collector.drain() for site in self.sites]
        dead = torch.tensor([dead_fraction(values, units) for values, units in drained], device=self._device)
        width = math.ceil(self.options.samples_per_site / _world_size())
        stacked = stack_samples([values.to(self._device) for values, _ in drained], width)
        return gather_ranks(stacked, width), dead

    def functions(self) -> Functions:
        """All sites' functions as they are now.

        Returns:
            Stacked copies of eps, mu, sigma and tables.
        """
        states = [[getattr(host, key) for key in site.keys] for host, site in self._hosted]
        tables = [table for _, _, table in states if table is not None]
        return Functions(
            bases=[as_base(view) for view in self._plain],
            eps=torch.stack([eps.detach().to(self._device, torch.float32) for eps, _, _ in states]),
            shape=torch.stack([shape.to(self._device, torch.float32) for _, shape, _ in states]),
            tables=torch.stack([table.to(self._device, torch.float32) for table in tables])
            if tables
            else torch.empty(0, 4, 1, device=self._device),
            tabulated=torch.tensor([i for i, s in enumerate(states) if s[2] is not None], device=self._device).long(),
        )

    def _wanted(self, old: Functions, samples: Tensor, usable: Tensor) -> Functions:
        """Where the policy wants every function to be, before the trust region bounds the move."""
        assert self._gradient is not None
        moved = self.trust_region.clamp(self.policy.move(old.eps, self._gradient))
        wanted = replace(old, eps=torch.where(usable, moved, old.eps))
        if not self.policy.follows_data:
            return wanted
        return refreshed(wanted, self._running.follow(samples, usable), usable, self.options.resolution)

    def _commit(self, new: Functions) -> None:
        place = {row: k for k, row in enumerate(new.tabulated.tolist())}
        targets: list[Tensor] = []
        values: list[Tensor] = []
        for row, (host, site) in enumerate(self._hosted):
            eps, shape, table = (getattr(host, key) for key in site.keys)
            targets += [eps.detach(), shape]
            values += [new.eps[row], new.shape[row]]
            if table is not None:
                targets.append(table)
                values.append(new.tables[place[row]])
        torch._foreach_copy_(targets, values)

    def _bound_eps(self) -> None:
        bound = self.trust_region.max_eps
        amplitudes = [self._eps(host, site).detach() for host, site in self._hosted]
        torch._foreach_clamp_min_(amplitudes, -bound)
        torch._foreach_clamp_max_(amplitudes, bound)

    def _rows(
        self, step: int, epoch: int, columns: Mapping[str, Tensor], events: Sequence[str | None]
    ) -> list[Record]:
        # one transfer to the host for the whole round
        table = torch.stack([column.to(torch.float64) for column in columns.values()], dim=-1).tolist()
        rows: list[Record] = []
        for site, values, event in zip(self.sites, table, events, strict=True):
            row: Record = {"step": step, "epoch": epoch, "site": site.name}
            row.update(zip(columns, values, strict=True))
            row["n"] = int(values[list(columns).index("n")])
            row.update(policy=self.policy.name, event=event)
            rows.append(row)
        return rows

    @property
    def _device(self) -> torch.device:
        return self._eps(*self._hosted[0]).device

    def _eps(self, host: nn.Module, site: Site) -> nn.Parameter:
        return getattr(host, site.keys[0])

    # ------------------------------------------------------------------ checkpoint

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on where training stopped; tensors and primitives only.

        Returns:
            The state. Eps, mu, sigma and tables are in the model's own state_dict.
        """
        return {
            "rounds": self.rounds,
            "last_step": self._last_step,
            "sites": [site.name for site in self.sites],
            "running": self._running.state_dict(),
            "gradient": self._gradient,
            "eps_before": self._eps_before,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` gave.

        Args:
            state: from a controller of the same model.

        Raises:
            SiteError: if the sites differ; the message lists them.
        """
        names, saved = [site.name for site in self.sites], list(state["sites"])
        if names != saved:
            missing = ", ".join(sorted(set(saved) - set(names))) or "none"
            extra = ", ".join(sorted(set(names) - set(saved))) or "none"
            raise SiteError(
                f"the checkpoint's sites are not this model's: only in the checkpoint: {missing}; "
                f"only in the model: {extra}. Use the same model and the same target_modules, exclude_modules."
            )
        self.rounds, self._last_step = int(state["rounds"]), int(state["last_step"])
        for name in ("gradient", "eps_before"):
            setattr(self, f"_{name}", None if state[name] is None else state[name].to(self._device))
        self._running.load_state_dict(state["running"], self._device)
        self._switch.collecting = self.schedule.collects(self._last_step)


def _events(n: Tensor, usable: Tensor, fraction: Tensor) -> list[str | None]:
    def event(count: float, good: bool, taken: float) -> str | None:
        if count == 0:
            return "no samples"
        if not good:
            return "no spread"
        if taken == 0.0:
            return "held"
        return "bounded" if taken < 1.0 else None

    return [event(*each) for each in zip(n.tolist(), usable.tolist(), fraction.tolist(), strict=True)]


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
