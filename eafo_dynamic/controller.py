"""One update round over all sites, for any training loop: collect, estimate, correct, record."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from eafo_dynamic.activation import Site
from eafo_dynamic.bases import as_base
from eafo_dynamic.diagnostics import OutputEntropy, Record, describe_events, diagnostics, to_rows
from eafo_dynamic.errors import ConfigError, PatternError, SiteError
from eafo_dynamic.options import Options
from eafo_dynamic.policy import Policy, make_policy, make_rules
from eafo_dynamic.running import LossWatch, RunningDensity, make_estimator
from eafo_dynamic.schedule import Schedule
from eafo_dynamic.sites import SiteReport, find_sites, matches
from eafo_dynamic.statistics import dead_fractions, gather_ranks, moments, stack_samples
from eafo_dynamic.surgery import site_source, unwrap, wrap
from eafo_dynamic.update import Functions, bounded_move, compounded, refreshed

__all__ = ["EAFOController", "Record"]


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
        self.policies = self._assign_policies()
        self.schedule = self.options.schedule
        self.trust_region = self.options.trust_region
        self._running = RunningDensity(make_estimator(self.options.density), self.options.momentum)
        self.records: deque[Record] = deque(maxlen=self.KEPT_RECORDS)
        self.rounds = 0
        self._last_step = -1
        self._losses = LossWatch(self.options.rollback_factor)
        self._undo: Functions | None = None  # what the last round replaced
        self._gradient: Tensor | None = None
        self._hosted = wrap(model, self.report, self.options.eps_init, **self.options.form)
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

    def _assign_policies(self) -> list[Policy]:
        rules = make_rules(self.options.policy)
        found = self.report.wrapped
        for rule in rules:
            if found and not any(matches(rule.sites, site) for site in found):
                raise PatternError("policy.sites", rule.sites, [site.module for site in found])
        chosen = [next((rule.policy for rule in rules if matches(rule.sites, site)), None) for site in found]
        if None in chosen:
            open_sites = [site.name for site, policy in zip(found, chosen, strict=True) if policy is None]
            raise ConfigError("policy", open_sites[0], "matches none of the rules", "End the list with sites: '.*'.")
        return [make_policy(policy) for policy in chosen if policy is not None]

    def _prepare(self) -> None:
        self._plain = [site_source(self.model, site) for site in self.sites]
        self._set_quota()
        for (host, site), policy in zip(self._hosted, self.policies, strict=True):
            self._eps(host, site).requires_grad_(policy.trains_eps)
        self._follows = torch.tensor([policy.follows_data for policy in self.policies])
        self._eps_before = self.functions().eps
        self._switch = self._hosted[0][1].switch
        self._switch.collecting = self.schedule.collects(0)

    def _set_quota(self) -> None:
        collects = max(1, math.ceil(self.schedule.update_every_n_steps / self.schedule.collect_period))
        for site in self.sites:
            site.collector.quota = math.ceil(self.options.samples_per_site / (collects * _world_size()))

    def reschedule(self, schedule: Schedule) -> None:
        """Changes when rounds run.

        Args:
            schedule: the new schedule.
        """
        self.schedule = schedule
        self._set_quota()

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

    def snapshot(self, points: int = 65) -> list[Record]:
        """Every site's function on a grid of 4 standard deviations around its mean, with the density it was fitted to.

        Args:
            points: of the grid.

        Returns:
            One row a site, as the log keeps them: site, z, base, function, eps, mu, sigma and, where the shape follows
            the data, u and pdf (density per standard deviation).
        """
        functions = self.functions()
        u = torch.linspace(-4.0, 4.0, points, device=self._device)
        z = functions.shape[:, :1] + functions.sigma * u
        corrected = functions.outputs(z)
        base = corrected - functions.correction(z)
        density = self._running.density
        pdf = None if density is None else density.pdf(u)
        rows: list[Record] = []
        for row, site in enumerate(self.sites):
            mu, sigma = functions.shape[row].tolist()
            entry: Record = {"site": site.name, "eps": functions.eps[row].item(), "mu": mu, "sigma": sigma}
            entry.update(z=z[row].tolist(), base=base[row].tolist(), function=corrected[row].tolist())
            if pdf is not None:
                entry.update(u=u.tolist(), pdf=pdf[row].tolist())
            rows.append(entry)
        return rows

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
        elif self._gradient is not None:
            for (host, site), policy, gradient in zip(self._hosted, self.policies, self._gradient, strict=True):
                if policy.adds_gradient:
                    eps = self._eps(host, site)
                    extra = (policy.adds_gradient * gradient).to(eps.dtype)
                    eps.grad = extra.clone() if eps.grad is None else eps.grad + extra

    def observe_loss(self, loss: Tensor) -> None:
        """Call with the training loss of each batch where ``rollback_factor`` is set.

        Args:
            loss: 0-dim.
        """
        self._losses.observe(loss)

    @torch.no_grad()
    def update(self, step: int, epoch: int = 0) -> list[Record]:
        """Runs one update round now: all sites at once.

        Args:
            step: optimiser steps taken so far, for the log.
            epoch: for the log.

        Returns:
            One row a site.
        """
        samples, dead, nonfinite = self._samples()
        stats = moments(samples)
        usable = (stats.n >= 2) & (stats.std > 0) & stats.std.isfinite() & stats.mean.isfinite()
        old = self.functions()
        broken = ~old.eps.isfinite()  # by a gradient that was not; the optimiser itself cannot mend it
        old = replace(old, eps=torch.where(broken, self._eps_before, old.eps))
        direction = old.direction(samples)
        before = OutputEntropy(old.outputs(samples, direction), self.options.resolution)
        gradient = before.gradient(direction)
        self._gradient = torch.where(usable, gradient, 0.0).nan_to_num().to(old.eps.dtype)

        jumped = self._losses.jumped()  # every round: what is before it and what after must not mix
        rolled_back = jumped and self._undo is not None
        wanted = self._reverted(old) if rolled_back else self._wanted(old, samples, usable)
        new, fraction = bounded_move(old, wanted, self.trust_region)
        self._commit(old, new)
        self._undo = None if rolled_back or self.options.rollback_factor is None else old
        self.rounds += 1
        moved = old.eps if self.options.compounding else new.eps  # a settled eps starts again from 0
        columns = diagnostics(
            samples, stats, before, old, new, delta_eps=moved - self._eps_before, gradient=gradient
        )
        columns.update(dead_fraction=dead, n_nonfinite=nonfinite)
        self._eps_before = new.eps
        events = describe_events(stats.n, usable, fraction, rolled_back, nonfinite, broken)
        heads: list[Record] = [{"step": step, "epoch": epoch, "site": site.name} for site in self.sites]
        tails = [{"policy": policy.name, "event": event} for policy, event in zip(self.policies, events, strict=True)]
        rows = to_rows(heads, columns, tails)
        self.records.extend(rows)
        return rows

    def _samples(self) -> tuple[Tensor, Tensor, Tensor]:
        """Empties the collectors.

        Returns:
            Samples of all sites and ranks, [S, n]; dead fractions and non-finite samples of this rank, [S].
        """
        device = self._device
        drained = [site.collector.drain() for site in self.sites]
        values = [sample.to(device) for sample, _ in drained]
        longest = max(sample.numel() for sample in values)
        padded = stack_samples(values, longest)
        units = torch.nn.utils.rnn.pad_sequence([each.to(device) for _, each in drained], batch_first=True)
        missing = torch.tensor([longest - sample.numel() for sample in values], device=device)
        nonfinite = (~padded.isfinite()).sum(1) - missing
        width = math.ceil(self.options.samples_per_site / _world_size())
        stacked = padded if longest <= width else stack_samples(values, width)
        return gather_ranks(stacked, width), dead_fractions(padded, units), nonfinite

    def functions(self) -> Functions:
        """All sites' functions as they are now.

        Returns:
            Stacked copies of eps, mu, sigma and tables.
        """
        states = [[getattr(host, key) for key in site.keys] for host, site in self._hosted]
        with torch.no_grad():
            return Functions(
                bases=[as_base(view) for view in self._plain],
                # one amplitude a channel: the log and the entropies see their mean
                eps=torch.stack([eps.to(self._device, torch.float32).mean() for eps, *_ in states]),
                shape=torch.stack([shape.to(self._device, torch.float32) for _, shape, *_ in states]),
                tables=self._stacked([table for _, _, table, _ in states]),
                tabulated=torch.tensor(
                    [i for i, s in enumerate(states) if s[2] is not None], dtype=torch.long, device=self._device
                ),
                offsets=self._stacked([offset for *_, offset in states]) if self.options.compounding else None,
            )

    def _stacked(self, tables: list[Tensor | None]) -> Tensor:
        present = [table.to(self._device, torch.float32) for table in tables if table is not None]
        return torch.stack(present) if present else torch.empty(0, 4, 1, device=self._device)

    def _wanted(self, old: Functions, samples: Tensor, usable: Tensor) -> Functions:
        """Where the policy wants every function to be, before the trust region bounds the move."""
        assert self._gradient is not None
        moved = old.eps.clone()
        for policy, rows in self._rows_of_policies():
            moved[rows] = policy.move(old.eps[rows], self._gradient[rows])
        wanted = replace(old, eps=torch.where(usable, self.trust_region.clamp(moved), old.eps))
        follows = usable & self._follows.to(usable.device)
        if not self._follows.any():
            return wanted
        density = self._running.follow(samples, usable)
        if self.options.compounding:
            # the offset may take half of what the trust region allows, so that eps keeps room to move
            return compounded(wanted, density, follows, self.options.resolution, self.trust_region.max_eps / 2)
        return refreshed(wanted, density, follows, self.options.resolution)

    def _reverted(self, old: Functions) -> Functions:
        """The functions before the last round; an eps that the optimiser moves stays where it is now."""
        assert self._undo is not None
        trained = torch.tensor([policy.trains_eps for policy in self.policies], device=old.eps.device)
        return replace(self._undo, bases=old.bases, eps=torch.where(trained, old.eps, self._undo.eps))

    def _rows_of_policies(self) -> list[tuple[Policy, list[int]]]:
        rows: dict[Policy, list[int]] = {}
        for row, policy in enumerate(self.policies):
            rows.setdefault(policy, []).append(row)
        return list(rows.items())

    def _commit(self, old: Functions, new: Functions) -> None:
        place = {row: k for k, row in enumerate(new.tabulated.tolist())}
        targets: list[Tensor] = []
        values: list[Tensor] = []
        for row, (host, site) in enumerate(self._hosted):
            eps, shape, table, offset = (getattr(host, key) for key in site.keys)
            targets += [eps.detach(), shape]
            # channels keep their differences; one amplitude is simply the new one
            kept = torch.where(eps.detach().isfinite(), eps.detach(), old.eps[row])
            moved = kept + (new.eps[row] - old.eps[row]) if eps.dim() else new.eps[row]
            values += [moved, new.shape[row]]
            if table is not None:
                targets.append(table)
                values.append(new.tables[place[row]])
            if offset is not None and new.offsets is not None:
                targets.append(offset)
                values.append(new.offsets[place[row]])
        torch._foreach_copy_(targets, values)

    def _bound_eps(self) -> None:
        bound = self.trust_region.max_eps / 2 if self.options.compounding else self.trust_region.max_eps
        amplitudes = [self._eps(host, site).detach() for host, site in self._hosted]
        torch._foreach_clamp_min_(amplitudes, -bound)
        torch._foreach_clamp_max_(amplitudes, bound)

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
            "losses": self._losses.state_dict(),
            "undo": None if self._undo is None else self._undo.tensors(),
            # each rank has its own sample, a checkpoint has one: several ranks collect anew after a resume
            "pending": [site.collector.pending() for site in self.sites] if _world_size() == 1 else None,
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
        self._losses.load_state_dict(state["losses"])
        self._undo = (
            None
            if state["undo"] is None
            else replace(self.functions(), **{name: value.to(self._device) for name, value in state["undo"].items()})
        )
        for site, pending in zip(self.sites, state["pending"] or [], strict=False):
            site.collector.restore(pending, self._device)
        self._switch.collecting = self.schedule.collects(self._last_step)


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
