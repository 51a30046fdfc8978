"""One update round over all sites, for any training loop: collect, estimate, correct, record."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import torch
from torch import Tensor, nn

from eafo_dynamic.apply.bank import Bank
from eafo_dynamic.apply.corrections import keep_beside
from eafo_dynamic.apply.manifest import manifest
from eafo_dynamic.apply.observing import observe_only, refuse_corrected
from eafo_dynamic.apply.surgery import put_back, take_off, unwrap, wrap
from eafo_dynamic.correction.kernels import resolve_backend
from eafo_dynamic.density.ranks import everyones, is_first_rank
from eafo_dynamic.errors import CompoundingError, SiteError, legible
from eafo_dynamic.find.adopting import with_new_calls
from eafo_dynamic.find.probe import structural_copy
from eafo_dynamic.find.sites import SiteReport, find_sites
from eafo_dynamic.internals.declared import named
from eafo_dynamic.internals.version import package_versions
from eafo_dynamic.policy.agreement import Agreement
from eafo_dynamic.policy.alerts import Alerts
from eafo_dynamic.policy.amplitudes import assigned
from eafo_dynamic.policy.attachment import JoinWatch, OptimizerWatch, refuse_replicas, thaw_under_adapters
from eafo_dynamic.policy.diagnostics import snapshot
from eafo_dynamic.policy.gradients import SharedGradients, clip_gradients
from eafo_dynamic.policy.options import Options
from eafo_dynamic.policy.round import Rounds, unpacked
from eafo_dynamic.policy.schedule import Pace, Schedule
from eafo_dynamic.records.notebook import SiteList
from eafo_dynamic.records.reader import CorrectionLog
from eafo_dynamic.records.schema import Record

__all__ = ["EAFOController"]


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
        bank: the sites' tensors, read and written together.
        pace: how many optimiser steps a batch takes.
        agreement: of the ranks that train the model.

    Raises:
        SiteError, PatternError: if the model has nothing to wrap, or a pattern matches nothing.
    """

    KEPT_RECORDS = 20_000

    def __init__(self, model: nn.Module, options: Options | None = None, report: SiteReport | None = None) -> None:
        self.options = options or Options()
        self.model = model
        self.report = report or find_sites(model, selection=self.options.selection)
        self.policies = assigned(self.options.policy, self.report.wrapped)
        self.schedule = self.options.schedule
        self.trust_region = self.options.trust_region
        self.records: deque[Record] = deque(maxlen=self.KEPT_RECORDS)
        self.pace = Pace()
        self.bank = self._wrapped()
        self._alerts: Alerts | None = None
        if self.options.observes:
            self._alerts = self._new_alerts()
        self._watch: OptimizerWatch | None = None
        self._watches_optimizers = False
        self.agreement = Agreement(self.options.process_group)
        self.agreement.announce()
        self._rounds = Rounds(self.bank, self.policies, self.options, self.agreement)
        self._joins = JoinWatch(model)
        self._gradients: SharedGradients | None = None
        if self.agreement.size > 1:
            self._gradients = self._shared_gradients()
        self._switch = self.bank.sites[0].switch
        self._switch.backend = self.options.backend
        self._switch.options = self.options.primitives()
        self._share_out_samples()
        self.expect(0)

    @classmethod
    @named(Options)
    def attach(cls, model: nn.Module, *example_args: Any, **options: Any) -> EAFOController:
        """Wraps a model; one that is wrapped already keeps the corrections it has learned.

        Call it before the optimiser is made, so that the optimiser gets the amplitudes, and before
        DistributedDataParallel wraps the model. At the first ``step`` a warning says if no optimiser has them.

        Args:
            model: any module.
            *example_args: an example input, to find activations that are called several times a forward.
            **options: see Options.

        Returns:
            The controller; call ``step(global_step)`` after each optimiser step.

        Raises:
            SiteError: if DistributedDataParallel has wrapped the model already.
        """
        checked = Options(**options)
        if checked.observes:
            refuse_corrected(model)
        else:
            refuse_replicas(model)
        earlier = take_off(model)
        controller = cls(model, checked, find_sites(model, *example_args, selection=checked.selection))
        put_back(model, earlier)
        controller._watch = OptimizerWatch(model, lambda: controller.trained)
        controller._watches_optimizers = True
        return controller

    def _wrapped(self) -> Bank:
        """The sites of the report in the model; those that are there already stay as they are."""
        eps_init = 0.0 if self.options.observes else self.options.eps_init
        hosted = wrap(self.model, self.report, eps_init, backend=self.options.backend, **self.options.form)
        if self.options.observes:
            observe_only(hosted)
        else:
            keep_beside(self.model)
        return Bank(self.model, hosted)

    def _new_alerts(self) -> Alerts:
        return Alerts(self.bank.functions().bases, self.options.resolution, is_first_rank())

    def _share_out_samples(self) -> None:
        """Sets how many samples each site takes from one batch, so that a round has ``samples_per_site`` of it."""
        steps_between_batches = max(self.schedule.collect_period, self.pace.stride)
        batches = max(1, math.ceil(self.schedule.update_every_n_steps / steps_between_batches))
        quota = math.ceil(self.options.samples_per_site / (batches * self.agreement.size))
        for site in self.bank.sites:
            site.collector.quota = quota

    def reschedule(self, schedule: Schedule) -> None:
        """Changes when rounds run.

        Args:
            schedule: the new schedule.
        """
        self.schedule = schedule
        self._share_out_samples()

    @property
    def sites(self) -> SiteList:
        """The wrapped sites, in the order of the log; shows as a table with their live state in a notebook."""
        return SiteList(self.bank.sites, self.bank.states())

    def __repr__(self) -> str:
        policies = ", ".join(dict.fromkeys(policy.name for policy in self.policies))
        model = type(self.model).__name__
        return f"EAFOController of {model}: {len(self.bank.sites)} sites, {policies}, {self.rounds} rounds"

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>{self.sites._repr_html_()}"

    def plot(self, what: str = "heatmap", column: str = "entropy") -> Any:
        """Draws the newest rows of the log (``records``), or the functions as they are now.

        Args:
            what: ``heatmap``, ``trajectories``, ``functions``, ``densities``, ``prediction`` or ``ranking``.
            column: of the log, for the figures that show one.

        Returns:
            A matplotlib figure.

        Raises:
            LogError: if there was no update round yet.
        """
        now = [{"step": self.pace.last, **row} for row in self.snapshot()]
        return CorrectionLog.of_rows(list(self.records), self.about(), now).plot(what, column)

    @property
    def amplitudes(self) -> dict[str, nn.Parameter]:
        """Eps, and lift where terms are free, of all sites by parameter name, for an optimiser; none where observed."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return {names[id(each)]: each for each in self.bank.amplitudes if id(each) in names}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Those of the ``amplitudes`` that the loss trains, also where the user has frozen their layer for a while."""
        mine = {id(amplitude) for amplitude in self._rounds.amplitudes.trained}
        return {name: amplitude for name, amplitude in self.amplitudes.items() if id(amplitude) in mine}

    def shard_options(self) -> dict[str, set[nn.Parameter]]:
        """What ``torch.distributed.fsdp.fully_shard`` has to know, for the model and for each part of it.

        ``fully_shard(model, **controller.shard_options())``: amplitudes stay whole on every rank. Their gradients are
        averaged over the ranks at the end of each backward, before they are clipped.

        Returns:
            ``{"ignored_params": amplitudes}``.
        """
        if self._gradients is None:
            self._gradients = self._shared_gradients()
        self._gradients.start()
        return {"ignored_params": set(self.bank.amplitudes)}

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """As ``torch.nn.utils.clip_grad_norm_(model.parameters(), ...)``, also where some parameters are in shards.

        All ranks have to call it.

        Args:
            max_norm: of the gradients of all parameters together.
            norm_type: p of the p-norm.

        Returns:
            The norm before, 0-dim, the same on every rank.
        """
        return clip_gradients(self.model.parameters(), max_norm, norm_type)

    def _shared_gradients(self) -> SharedGradients:
        def collect() -> None:
            self.collecting = True

        return SharedGradients(self.model, self.bank, self.agreement.among, self.options.tensor_parallel, collect)

    @property
    def met_unknown(self) -> bool:
        """Whether a forward has made a call that is left plain since no example has made it; set it back to False."""
        return self._switch.met_unknown

    @met_unknown.setter
    def met_unknown(self, value: bool) -> None:
        self._switch.met_unknown = value

    def adopt(
        self, *example_args: Any, run: Callable[[nn.Module], object] | None = None, **example_kwargs: Any
    ) -> dict[str, nn.Parameter]:
        """Gives the calls of an example that have no correction yet, one each; all others keep theirs.

        For a branch that opens in mid-training: no example before has made its calls, so they are plain. The optimiser
        needs what is returned::

            new = controller.adopt(x)
            optimizer.add_param_group({"params": list(new.values()), "weight_decay": 0.0})

        ``EAFOCallback(adopt=True)`` does all this when it meets such a call.

        Args:
            *example_args: example input; the model is copied and run once, as it is now.
            run: called with the copy in place of ``copy(*example_args, **example_kwargs)``.
            **example_kwargs: example input.

        Returns:
            The new amplitudes that the loss trains, by parameter name; empty if the example makes no new call.

        Raises:
            SiteError: if several ranks train the model, whose parameters cannot become more; if the example's forward
                fails. The corrections are then as they were.
        """
        if self.agreement.size > 1:
            raise SiteError(
                "several ranks train this model, and a parameter that is new on them belongs to no bucket of "
                "DistributedDataParallel. Attach with an example that makes all calls."
            )
        with structural_copy(self.model) as plain:
            now = find_sites(unwrap(plain), *example_args, selection=self.options.selection, run=run, **example_kwargs)
        grown = with_new_calls(self.report, now)
        before = set(self.trained)
        if len(grown.wrapped) > len(self.report.wrapped):
            self._grow(grown)
        return {name: amplitude for name, amplitude in self.trained.items() if name not in before}

    def _grow(self, report: SiteReport) -> None:
        """Takes sites in behind those that there are."""
        frozen = [amplitude for amplitude in self.bank.amplitudes if not amplitude.requires_grad]
        self.report = report
        self.policies = assigned(self.options.policy, report.wrapped)
        self.bank = self._wrapped()
        self._rounds = self._rounds.grown(self.bank, self.policies)
        for amplitude in frozen:
            amplitude.requires_grad_(False)
        if self._alerts is not None:
            state = self._alerts.state_dict()
            self._alerts = self._new_alerts()
            self._alerts.load_state_dict(state)
        if self._watch is None and self._watches_optimizers:
            self._watch = OptimizerWatch(self.model, lambda: self.trained)
        self._share_out_samples()

    @property
    def rounds(self) -> int:
        """Update rounds so far."""
        return self._rounds.count

    @property
    def attached(self) -> bool:
        """Whether the model still has these corrections: it may have been unwrapped, merged, or wrapped again."""
        return self.bank.belongs_to(self.model)

    @property
    def backend(self) -> str:
        """What computes activations where the model is: "native", "eager", "triton" or "formula"."""
        return resolve_backend(self.options.backend, self.bank.device)

    @property
    def collecting(self) -> bool:
        """Whether the coming training forwards leave samples."""
        return self._switch.collecting

    @collecting.setter
    def collecting(self, value: bool) -> None:
        self._switch.collecting = value

    def snapshot(self) -> list[Record]:
        """Every site's function on a grid, with the density it was fitted to and the last round's samples.

        Returns:
            One row per site, as the log keeps them; see ``diagnostics.snapshot``.
        """
        rounds = self._rounds
        return snapshot(self.bank.names, self.bank.functions(), rounds.density.density, rounds.histogram)

    def about(self) -> dict[str, Any]:
        """What the correction log's manifest says of this run.

        Returns:
            The model's class, package versions, options, back end and sites; text and numbers only.
        """
        return {
            "model": type(self.model).__name__,
            "packages": package_versions(),
            "options": self.options.primitives(),
            "backend": self.backend,
            **manifest(self.report, **self.options.form),
        }

    def detach(self) -> nn.Module:
        """Takes all corrections out of the model.

        Returns:
            The model as it was.
        """
        if self._gradients is not None:
            self._gradients.release()
        unwrap(self.model)
        return self.model

    def begin(self, global_step: int = 0) -> None:
        """Call where a training begins, if there was one before: nothing of it is mixed into this one.

        Args:
            global_step: optimiser steps taken so far.
        """
        if self.pace.last > global_step:
            self.bank.drain()
            self._forget()
        self.pace.last = global_step
        self.expect(global_step)

    def _forget(self) -> None:
        self._rounds.forget()
        if self._alerts is not None:
            self._alerts.load_state_dict({"before": {}, "since": {}})
        self.pace = Pace()
        self._share_out_samples()

    def step(self, global_step: int, epoch: int = 0, due: bool | None = None) -> list[Record]:
        """Call after each optimiser step (or after each micro-batch: only a changed step counts).

        Keeps every eps in the trust region and runs an update round when the schedule says so.

        Args:
            global_step: optimiser steps taken so far.
            epoch: for the log.
            due: whether it is time for a round; None: after every multiple of ``update_every_n_steps``.

        Returns:
            The rows of this update round; empty if there was none.
        """
        if self._watch is not None:
            thaw_under_adapters(self.model, self.trained)  # made after attach
            if self._watch.is_done():
                self._watch = None
        if self._gradients is not None:
            self._gradients.settle()
        if global_step == self.pace.last:
            return self._update_at_the_same_step(global_step, epoch, due)
        if global_step < self.pace.last:  # another training
            self._forget()
        stride = self.pace.stride
        since = self.pace.advance(global_step)
        self.bank.bound(self.trust_region.max_eps)
        rows: list[Record] = []
        if self.schedule.updates(global_step, since, due):
            rows = self.update(global_step, epoch)
        if self.pace.stride != stride:
            self._share_out_samples()
        self.expect(global_step)
        return rows

    def _update_at_the_same_step(self, global_step: int, epoch: int, due: bool | None) -> list[Record]:
        """A round that falls due when no optimiser has stepped since the last call, as at the end of an epoch."""
        has_run = bool(self.records) and self.records[-1]["step"] == global_step
        if not due or has_run or not self.schedule.updates(global_step, due=due):
            return []
        return self.update(global_step, epoch)

    def expect(self, global_step: int, due: bool = False) -> None:
        """Lets the coming batch leave samples if the schedule says so; ``step`` does it too.

        Args:
            global_step: optimiser steps taken so far.
            due: whether a round is due after that batch, whatever its number.
        """
        collects = self.schedule.collects(global_step, self.pace.stride, self.pace.overrun)
        has_round = due and self.schedule.updates(global_step + 1, due=True)
        self._switch.collecting = collects or has_round

    def before_optimizer_step(self, global_step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Call between backward and the optimiser's step, for the policies and options that touch eps.grad.

        Adds ``weight * dH_r/d eps`` of the last round (policy ``hybrid``); drops the gradients of what is frozen.

        Args:
            global_step: optimiser steps taken so far.
            optimizer: the one that is about to step; None: all.
        """
        frozen = self.schedule.frozen(global_step + 1)
        self._rounds.amplitudes.before_step(frozen, self._rounds.gradient, optimizer)

    def observe_loss(self, loss: Tensor) -> None:
        """Call with the training loss of each batch where ``rollback_factor`` is set.

        Args:
            loss: 0-dim.
        """
        self._rounds.losses.observe(loss)

    def update(self, step: int, epoch: int = 0) -> list[Record]:
        """Runs one update round now: all sites at once. See ``round.Rounds.run``.

        Args:
            step: optimiser steps taken so far, for the log.
            epoch: for the log.

        Returns:
            One row per site.
        """
        if self.agreement.size > 1:
            self._joins.check()
        rows = self._rounds.run(step, epoch)
        if self._alerts is not None:
            self._alerts.add_to(rows)
        self.records.extend(rows)
        return rows

    def end_rows(self, step: int, epoch: int = 0) -> list[Record]:
        """Says where a training leaves the corrections, for the end of the log; see ``LogWriter.write_end``.

        Changes nothing: no amplitude, no shape, no estimate, no sample that is waiting for a round.

        Args:
            step: optimiser steps taken.
            epoch: for the log.

        Returns:
            One row per site: eps and lift with their change since the last round, mu and sigma. What a round
            measures is missing.
        """
        return self._rounds.end_rows(step, epoch)

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the model alone collects nothing; what watches the optimisers of the process cannot be copied
        return {**vars(self), "collects": self.collecting, "_watch": None, "_gradients": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.collecting = vars(self).pop("collects")

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on where training stopped; tensors and primitives only.

        It has the same keys and shapes from the first step to the last, as torch.distributed.checkpoint needs it:
        ``dcp.save({"model": model.state_dict(), "eafo": controller})``.

        Returns:
            The state. Eps, mu, sigma and tables are in the model's own state_dict.
        """
        ranks: tuple[dict[str, Any], ...] = ()
        if self.agreement.size == 1:
            ranks = (self.own_state(),)
        alerts = {} if self._alerts is None else {"alerts": self._alerts.state_dict()}
        return {
            **alerts,
            **self._rounds.state_dict(),
            "last_step": self.pace.last,
            "stride": self.pace.stride,
            "overrun": self.pace.overrun,
            "sites": self.bank.names,
            "ranks": ranks,
        }

    def gathered_state(self) -> dict[str, Any]:
        """As ``state_dict``, with what every rank has seen since the last round; all ranks have to call it.

        With it a training of several ranks goes on from a checkpoint between two rounds as if nothing had interrupted
        it. With ``state_dict`` they collect anew until the next round.

        Returns:
            The state, the same on every rank. ``load_state_dict`` takes it with any number of ranks;
            torch.distributed.checkpoint does not, since it grows with what has been seen.
        """
        state = self.state_dict()
        if self.agreement.size > 1:
            state["ranks"] = everyones(self.own_state(), self.agreement.among)
        return state

    def own_state(self) -> dict[str, Any]:
        """The part of the state that is this rank's own: what it has seen since the last round.

        Where several ranks train, ``gathered_state`` has those of all of them.

        Returns:
            Tensors on the CPU and primitives only.
        """
        return {"pending": self.bank.pending(), "losses": self._rounds.losses.own_state()}

    @legible("the checkpoint's state of the corrections is damaged, or of another version")
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` gave.

        Args:
            state: from a controller of the same model.

        Raises:
            SiteError: if it is no such state, or the sites differ; the message lists them.
            CompoundingError: if it is of a run of version 0.1.0 whose corrections compound.
        """
        if "offsets" in (unpacked(state["undo"]) or {}):
            raise CompoundingError("the state of the corrections")
        self.bank.check_names(list(state["sites"]))
        self.pace = Pace(*map(int, (state["last_step"], state.get("stride", 1), state.get("overrun", 0))))
        self._rounds.load_state_dict(state)
        if self._alerts is not None and "alerts" in state:
            self._alerts.load_state_dict(state["alerts"])
        # all that the ranks had seen is shared out, also if there were more or fewer of them
        mine = (state["ranks"] or ())[self.agreement.rank :: self.agreement.size]
        self.bank.restore_pending([each["pending"] for each in mine])
        self._rounds.losses.load_own_states([each["losses"] for each in mine])
        self._share_out_samples()
        self.expect(self.pace.last)
