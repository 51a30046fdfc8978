"""All sites' tensors of one model, read and written together."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from eafo_dynamic.apply.site import Site
from eafo_dynamic.apply.surgery import hosted_sites, site_source
from eafo_dynamic.correction.bases import Base, as_base
from eafo_dynamic.correction.kernels import EPS, RoundKernel
from eafo_dynamic.correction.stacked import Functions
from eafo_dynamic.errors import SiteError
from eafo_dynamic.internals.torch_internals import clamp_all_, copy_all_, own_buffers, own_parameters

__all__ = ["Bank", "moved_channels"]

_MOST_ELEMENTS = 1 << 48  # of a tensor


class Bank:
    """The sites of a wrapped model, as stacked tensors and back.

    Args:
        model: the wrapped model.
        hosted: its sites, each with the module that hosts its tensors.
    """

    def __init__(self, model: nn.Module, hosted: list[tuple[nn.Module, Site]]) -> None:
        self._hosted = hosted
        self._plain = [site_source(model, site) for _, site in hosted]

    def belongs_to(self, model: nn.Module) -> bool:
        """Whether these are the sites of a model now: it may have been unwrapped, merged, or wrapped again.

        Args:
            model: any module.

        Returns:
            Whether they are.
        """
        return {site for _, site in hosted_sites(model)} == set(self.sites)

    @property
    def sites(self) -> list[Site]:
        """The sites, in the order of the log."""
        return [site for _, site in self._hosted]

    @property
    def names(self) -> list[str]:
        """Names of the sites, in that order."""
        return [site.name for site in self.sites]

    def check_names(self, saved: list[str]) -> None:
        """Checks that a checkpoint's sites are these.

        Args:
            saved: their names.

        Raises:
            SiteError: if they differ; the message lists them.
        """
        if self.names != saved:
            missing = ", ".join(sorted(set(saved) - set(self.names))) or "none"
            extra = ", ".join(sorted(set(self.names) - set(saved))) or "none"
            raise SiteError(
                f"the checkpoint's sites are not this model's: only in the checkpoint: {missing}; "
                f"only in the model: {extra}. Use the same model and the same target_modules, exclude_modules."
            )

    @functools.cached_property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms, the same for all sites, in the order of the stacked amplitudes."""
        host, site = self._hosted[0]
        return site.names(host)

    def of_term(self, name: str) -> list[nn.Parameter]:
        """Amplitudes of one term, one parameter a site.

        Args:
            name: of one of the terms.

        Returns:
            In the order of the log.
        """
        return [_own_tensor(host, site.key(name)) for host, site in self._hosted]

    @property
    def eps(self) -> list[nn.Parameter]:
        """Amplitudes of the first local term, one parameter a site."""
        return self.of_term(EPS.name)

    @property
    def amplitudes(self) -> list[nn.Parameter]:
        """Amplitudes of all sites, term by term."""
        return [amplitude for name in self.terms for amplitude in self.of_term(name)]

    def _own(self, name: str) -> list[Tensor | None]:
        """Shape or table of all sites; None where a site has none."""
        return [_own_tensor(host, site.key(name)) for host, site in self._hosted]

    def states(self) -> list[str]:
        """Amplitudes, mu and sigma of every site, as text.

        Returns:
            For example ``eps=+0.0100, mu=+0.000, sigma=1.000``.
        """
        return [site.describe(host) for host, site in self._hosted]

    def widths(self) -> list[str]:
        """The base and the shapes of the tensors of every site, as text.

        Returns:
            For example ``ReLU with [] [2]``.
        """
        widths: list[str] = []
        for plain, (host, site) in zip(self._plain, self._hosted, strict=True):
            tensors = [getattr(host, key, None) for key in site.keys]
            shapes = [str(list(each.shape)) for each in tensors if each is not None]
            widths.append(f"{type(plain).__name__} with {' '.join(shapes)}")
        return widths

    @property
    def device(self) -> torch.device:
        """Where rounds are computed: the device of the first site."""
        host, site = self._hosted[0]
        return getattr(host, site.key("shape")).device

    def functions(self, kernel: RoundKernel | None = None) -> Functions:
        """All sites' functions as they are now.

        Args:
            kernel: what computes them on the CPU; None for torch's operations.

        Returns:
            Stacked copies of amplitudes, mu, sigma and tables.
        """
        device = self.device
        one: dict[Base, Base] = {}  # equal bases become the same, so that nobody has to compare them again
        tables = self._own("table")
        with torch.no_grad():
            return Functions(
                bases=[one.setdefault(base, base) for base in map(as_base, self._plain)],
                # one amplitude a channel: the log and the entropies see their mean
                amplitudes=torch.stack([_stacked(_means(self.of_term(name)), device) for name in self.terms]),
                shape=_stacked(_present(self._own("shape")), device),
                tables=_stacked(_present(tables), device),
                tabulated=torch.tensor(
                    [row for row, table in enumerate(tables) if table is not None], dtype=torch.long, device=device
                ),
                names=self.terms,
                kernel=kernel,
            )

    def channels(self) -> Tensor | None:
        """The amplitudes of every channel, where a site has several.

        Returns:
            Float32, shape [T, S, C], C the most channels of a site: one with fewer repeats its first amplitude. None
            where every site has one amplitude a term.
        """
        if not any(amplitude.dim() for amplitude in self.amplitudes):
            return None
        return torch.stack([_padded(self.of_term(name), self.device) for name in self.terms])

    def commit(self, old: Functions, new: Functions, bound: float = math.inf) -> None:
        """Writes functions back into the model, in place.

        Args:
            old: what ``functions`` gave before.
            new: what to write.
            bound: largest absolute amplitude of a channel; see :func:`moved_channels`.
        """
        with torch.no_grad():
            for name, before, after in zip(self.terms, old.amplitudes, new.amplitudes, strict=True):
                amplitudes = self.of_term(name)
                copy_all_(amplitudes, _moved(amplitudes, before, after, bound))
            copy_all_(_present(self._own("shape")), new.shape.unbind())
            tables = _present(self._own("table"))
            if tables:
                copy_all_(tables, new.tables.unbind())

    def drain(self) -> tuple[list[tuple[Tensor, Tensor]], list[str | None]]:
        """Hands out what every site has collected since the last round, and forgets it.

        Returns:
            Its sample, as from ``Collector.drain``, and the kind of a value that it could not correct, if any.
        """
        collectors = [site.collector for site in self.sites]
        passed_over = [each.passed_over for each in collectors]
        for each in collectors:
            each.passed_over = None
        return [each.drain() for each in collectors], passed_over

    def pending(self) -> dict[str, Any]:
        """What ``drain`` would hand out, for a checkpoint; it stays where it is.

        Returns:
            Samples, a list a site, on the CPU, and the kinds.
        """
        collectors = [site.collector for site in self.sites]
        samples = [[(values.cpu(), *rest) for values, *rest in each.pending()] for each in collectors]
        return {"samples": samples, "passed_over": [each.passed_over for each in collectors]}

    def restore_pending(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Puts back what ``pending`` gave, of one rank or of several, in place of what there is.

        Args:
            states: one a rank.
        """
        for place, site in enumerate(self.sites):
            chunks = [_checked(*chunk) for state in states for chunk in state["samples"][place]]
            site.collector.restore(chunks, self.device)
            kinds = [str(state["passed_over"][place] or "") for state in states]
            site.collector.passed_over = next(filter(None, kinds), None)

    def bound(self, bound: float) -> None:
        """Brings every amplitude back into [-bound, bound]; values on an accelerator are not waited for.

        Args:
            bound: largest absolute value.
        """
        outside: list[Tensor] = []
        for host, site in self._hosted:
            for each in site.amplitudes(host):
                if not _is_within(each, bound):
                    outside.append(each.detach())
        if outside:
            clamp_all_(outside, bound)


def _own_tensor(host: nn.Module, key: str) -> Any:
    """An attribute of a module, without its ``__getattr__`` where that would look up what the module owns."""
    for table in (own_parameters(host), own_buffers(host)):
        if key in table:
            return table[key]
    return getattr(host, key)


def _is_within(amplitude: Tensor, bound: float) -> bool:
    """Whether one number is known to be within a bound: a look on the CPU takes a tenth of the time of a clamp."""
    return amplitude.is_cpu and not amplitude.dim() and abs(amplitude.item()) <= bound


def _checked(values: Tensor, shape: Sequence[int], channels_last: bool) -> tuple[Tensor, list[int], bool]:
    """A part of a sample, if it can be one: what a checkpoint holds may be anything."""
    size = [index(each) for each in shape]
    small = values.dim() == 1 and values.is_floating_point() and 0 < len(values) <= math.prod(size) < _MOST_ELEMENTS
    if not small or min(size, default=1) < 1 or (channels_last and len(size) < 3):
        raise ValueError(f"a sample of {values.dtype} {list(values.shape)} from a tensor {size}")
    return values, size, bool(channels_last)


def _stacked(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Tensors of equal shape one above the other, float32; no tables are an empty stack."""
    if any(each.device != device or each.dtype != torch.float32 for each in tensors):
        tensors = [each.to(device, torch.float32) for each in tensors]
    return torch.stack(list(tensors)) if tensors else torch.empty(0, 4, 1, dtype=torch.float32, device=device)


def _present(column: Sequence[Tensor | None]) -> list[Tensor]:
    return [each for each in column if each is not None]


def moved_channels(channels: Tensor, before: Tensor, after: Tensor, bound: float) -> Tensor:
    """Where each channel's amplitude goes when their mean moves: they keep their differences, within the bound.

    Args:
        channels: amplitudes, shape [..., C]; one that is not finite counts as the mean before.
        before: mean before, shape [...].
        after: mean after, shape [...].
        bound: largest absolute amplitude.

    Returns:
        Amplitudes, shape [..., C].
    """
    kept = torch.where(channels.isfinite(), channels, before.unsqueeze(-1))
    return (kept + (after - before).unsqueeze(-1)).clamp(-bound, bound)


def _moved(amplitudes: Sequence[Tensor], old: Tensor, new: Tensor, bound: float) -> list[Tensor]:
    """Where every site's move takes its amplitude, or those of its channels."""
    moved = list(new.unbind())
    for place, amplitude in enumerate(amplitudes):
        if amplitude.dim():
            before, after = old[place].to(amplitude.device), new[place].to(amplitude.device)
            moved[place] = moved_channels(amplitude, before, after, bound)
    return moved


def _padded(amplitudes: Sequence[Tensor], device: torch.device) -> Tensor:
    """Amplitudes of all channels, float32, shape [S, C]; see ``Bank.channels``."""
    width = max(amplitude.numel() for amplitude in amplitudes)
    rows = [amplitude.detach().reshape(-1).to(device, torch.float32) for amplitude in amplitudes]
    return torch.stack([torch.cat([row, row[:1].expand(width - len(row))]) for row in rows])


def _means(amplitudes: Sequence[Tensor]) -> list[Tensor]:
    # in half precision the sum over many channels would be too coarse
    return [each.to(torch.float32).mean() if each.dim() else each for each in amplitudes]
