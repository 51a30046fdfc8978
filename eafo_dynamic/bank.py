"""All sites' tensors of one model, read and written together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eafo_dynamic.activation import Site, describe_state
from eafo_dynamic.bases import as_base
from eafo_dynamic.surgery import site_source
from eafo_dynamic.update import Functions

__all__ = ["Bank"]


class Bank:
    """The sites of a wrapped model, as stacked tensors and back.

    Args:
        model: the wrapped model.
        hosted: its sites, each with the module that hosts its tensors.
    """

    def __init__(self, model: nn.Module, hosted: list[tuple[nn.Module, Site]]) -> None:
        self._hosted = hosted
        self._plain = [site_source(model, site) for _, site in hosted]

    @property
    def sites(self) -> list[Site]:
        """The sites, in the order of the log."""
        return [site for _, site in self._hosted]

    @property
    def eps(self) -> list[nn.Parameter]:
        """Amplitudes, one parameter a site."""
        return [getattr(host, site.keys[0]) for host, site in self._hosted]

    def states(self) -> list[str]:
        """Eps, mu and sigma of every site, as text.

        Returns:
            For example ``eps=+0.0100, mu=+0.000, sigma=1.000``.
        """
        return [describe_state(getattr(host, s.keys[0]), getattr(host, s.keys[1])) for host, s in self._hosted]

    @property
    def device(self) -> torch.device:
        """Where rounds are computed: the device of the first site."""
        host, site = self._hosted[0]
        return getattr(host, site.keys[0]).device

    def functions(self) -> Functions:
        """All sites' functions as they are now.

        Returns:
            Stacked copies of eps, mu, sigma and tables.
        """
        device = self.device
        states = [[getattr(host, key) for key in site.keys] for host, site in self._hosted]
        settled = [offset for *_, offset in states if offset is not None]
        with torch.no_grad():
            return Functions(
                bases=[as_base(view) for view in self._plain],
                # one amplitude a channel: the log and the entropies see their mean
                eps=torch.stack([eps.to(device, torch.float32).mean() for eps, *_ in states]),
                shape=torch.stack([shape.to(device, torch.float32) for _, shape, *_ in states]),
                tables=self._stacked([table for _, _, table, _ in states]),
                tabulated=torch.tensor(
                    [i for i, s in enumerate(states) if s[2] is not None], dtype=torch.long, device=device
                ),
                offsets=self._stacked(settled) if settled else None,
            )

    def _stacked(self, tables: list[Tensor | None]) -> Tensor:
        present = [table.to(self.device, torch.float32) for table in tables if table is not None]
        return torch.stack(present) if present else torch.empty(0, 4, 1, device=self.device)

    def commit(self, old: Functions, new: Functions) -> None:
        """Writes functions back into the model, in place.

        Args:
            old: what ``functions`` gave before.
            new: what to write.
        """
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

    def bound(self, bound: float) -> None:
        """Brings every amplitude back into [-bound, bound], without a look at their values.

        Args:
            bound: largest absolute value.
        """
        amplitudes = [eps.detach() for eps in self.eps]
        torch._foreach_clamp_min_(amplitudes, -bound)
        torch._foreach_clamp_max_(amplitudes, bound)
