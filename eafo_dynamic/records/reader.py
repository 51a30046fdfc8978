"""Read a correction log: rows, columns, filters, several runs; also while training still writes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from itertools import islice, pairwise
from operator import le
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eafo_dynamic.errors import LogError
from eafo_dynamic.internals.tables import as_html
from eafo_dynamic.records.files import find_log, read_lines, read_manifest
from eafo_dynamic.records.notebook import newest
from eafo_dynamic.records.schema import COLUMNS, CORRECTIONS, FIT_END, MANIFEST, SHAPES
from eafo_dynamic.records.select import matching_sites
from eafo_dynamic.records.table import Table

if TYPE_CHECKING:
    import pandas

__all__ = ["CorrectionLog"]


class CorrectionLog:
    """The correction log of one run, in memory.

    `CorrectionLog.load(run)` reads it; `select` gives a smaller log of the same kind. A row is one update of
    one site; `COLUMNS` says what each of its values means. Missing values are None.

    Where a fit changed the model after its last update, the log ends with one more row per site, in which `fit_end` is
    set: eps, lift, mu and sigma as the fit left them. Nothing was measured for it.

    Args:
        path: folder of the log.
        manifest: the run's manifest.
        table: the rows, by columns.
        notes: what the reader passed over, in words.

    Attributes:
        path: folder of the log.
        manifest: the run's manifest.
        notes: what the reader passed over, in words.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], table: Table, notes: Sequence[str] = ()) -> None:
        self.path = path
        self.manifest: dict[str, Any] = dict(manifest)
        self.notes = list(notes)
        self._table = table
        self._shapes: list[dict[str, Any]] | None = None  # None: in the log's file
        self._offset = 0
        self._inode = -1
        self._line = 0

    @classmethod
    def load(cls, run: str | os.PathLike[str]) -> CorrectionLog:
        """Read the log of a run.

        Args:
            run: the run's folder, its `eafo` folder, or a folder above with exactly one log in it.

        Returns:
            The log; a torn last line is left out and said in `notes`.
        """
        path = find_log(Path(run))
        log = cls(path, read_manifest(path / MANIFEST), Table())
        log.refresh()
        return log

    @classmethod
    def of_rows(
        cls, rows: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any], shapes: Iterable[Mapping[str, Any]] = ()
    ) -> CorrectionLog:
        """Make a log of rows in memory, such as `callback.history`.

        Args:
            rows: of update rounds, at least one.
            manifest: what is known of the run.
            shapes: snapshots of the sites' functions, each with `step`.

        Returns:
            A log that has no files.

        Raises:
            LogError: if there are no rows.
        """
        if not rows:
            raise LogError("there are no rows yet: train until the first update round.")
        log = cls(Path("history"), manifest, Table())
        log._table.extend(rows)
        log._shapes = [dict(shape) for shape in shapes]
        return log

    def refresh(self) -> int:
        """Read the rows that were written since the log was loaded.

        Returns:
            The number of new rows; of all rows if the file was replaced meanwhile, as a resumed run does.

        Raises:
            LogError: if a line before the last is damaged, or rows of several runs are mixed.
        """
        file = self.path / CORRECTIONS
        if not file.exists():
            return 0
        stat = file.stat()
        if stat.st_ino != self._inode or stat.st_size < self._offset:
            self._table, self._offset, self._line, self._inode = Table(), 0, 0, stat.st_ino
        before = len(self._table)
        found = read_lines(file, self._offset, self._line)
        for rows in found:
            try:
                self._table.extend(rows)
            except (TypeError, OverflowError) as error:
                raise LogError(f"{file}: a number is damaged near line {found.line} ({error})") from None
        self._offset, self._line = found.offset, found.line
        self._refuse_mixed(before)
        self.notes = []
        if found.note:
            self.notes.append(found.note)
        return len(self._table) - before

    def _refuse_mixed(self, before: int) -> None:
        """Check the steps of new rows: in the log of one run they never go back."""
        first = max(0, before - 1)  # the last row that was read before, too
        steps = self._table.take("step", range(first, len(self)))
        if all(map(le, steps, islice(steps, 1, None))):
            return
        place = next(k for k, (left, right) in enumerate(pairwise(steps)) if right < left)
        raise LogError(
            f"{self.path / CORRECTIONS}: rows of several runs are mixed: "
            f"step {steps[place]} is followed by step {steps[place + 1]}"
        )

    def __len__(self) -> int:
        return len(self._table)

    def _repr_html_(self) -> str:
        return as_html(newest(self.last()), f"{self!r}: the last row of each site")

    def plot(self, what: str = "heatmap", column: str = "entropy") -> Any:
        """Draws the log.

        Args:
            what: ``heatmap``, ``trajectories``, ``functions``, ``densities``, ``prediction`` or ``ranking``.
            column: of the log, for the figures that show one.

        Returns:
            A matplotlib figure.
        """
        figures = import_module("eafo_dynamic.records.figures.logs")  # which imports this module
        return figures.plot(self, what, column)

    def __repr__(self) -> str:
        steps = self.steps
        span = ""
        if steps:
            span = f", steps {steps[0]}..{steps[-1]}"
        return f"CorrectionLog({str(self.path)!r}, {len(self.sites)} sites, {len(self)} rows{span})"

    @property
    def name(self) -> str:
        """Name of the run: that of the folder which holds the log; of `version_0` and `eafo-2`, two names."""
        run = self.path.resolve()
        if run.name == "eafo":
            run = run.parent
        if run.name.startswith(("version_", "eafo-")):
            return f"{run.parent.name}/{run.name}"
        return run.name

    @property
    def columns(self) -> list[str]:
        """Names of the columns present, the schema's first and in its order."""
        present = self._table.columns
        return [name for name in COLUMNS if name in present] + [name for name in present if name not in COLUMNS]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows in the order they were written, each with every column; a missing value is None."""
        return self._table.rows(self.columns)

    @property
    def sites(self) -> list[str]:
        """Names of the sites with rows, in the manifest's order, which is the model's."""
        order = {name: number for number, name in enumerate(self._manifest_sites)}
        return sorted(self._table.by_site, key=lambda name: order.get(name, len(order)))

    @property
    def steps(self) -> list[int]:
        """Steps of the rows, ascending: those of the updates, and that at which the fit ended."""
        return sorted(set(self._table.column("step")))

    @property
    def update_steps(self) -> list[int]:
        """Steps at which any site was updated, ascending."""
        steps = self._table.column("step")
        ends = self._table.column(FIT_END)
        return sorted({step for step, end in zip(steps, ends, strict=True) if end is None})

    @property
    def _manifest_sites(self) -> dict[str, Mapping[str, Any]]:
        entries = self.manifest.get("sites")
        if not isinstance(entries, list):
            return {}
        return {str(entry.get("name")): entry for entry in entries if isinstance(entry, dict)}

    def site_info(self, site: str) -> dict[str, Any]:
        """Return what the manifest says about a site, such as `base`, `kind`, `call` and `shape`.

        Args:
            site: name of the site.

        Returns:
            The manifest's entry; empty if it has none.
        """
        return dict(self._manifest_sites.get(site, {}))

    def series(self, site: str, column: str) -> list[Any]:
        """Return one column of one site, one value per row.

        Args:
            site: name of the site.
            column: name of the column; None throughout if the log does not have it.

        Returns:
            The values in the order they were written.
        """
        return self._table.take(column, self._table.by_site.get(site, []))

    def select(
        self,
        site: str | Iterable[str] | None = None,
        steps: tuple[int | None, int | None] | None = None,
    ) -> CorrectionLog:
        """Return the log of some sites and steps.

        Args:
            site: one pattern or several: a site's name, a glob, a part of the dotted name
                (`blocks.0` is all of that block) or a regular expression for the whole name.
            steps: first and last step, both included; None leaves an end open.

        Returns:
            A log with the same manifest and those rows only.
        """
        table = self._table
        if site is not None:
            table = table.of_sites(matching_sites(site, self.sites, self.path))
        if steps is not None:
            table = table.between(*steps)
        selected = CorrectionLog(self.path, self.manifest, table, self.notes)
        selected._shapes = self._shapes
        return selected

    def last(self) -> list[dict[str, Any]]:
        """Return the last row of each site, in the order of `sites`.

        Returns:
            One row per site. Where it is that of the end of a fit, what was not measured then (the entropies,
            moments, `n`, ...) is taken from the last update before it; `event` is not.
        """
        return [self._last_row(self._table.by_site[site]) for site in self.sites]

    def _last_row(self, positions: Sequence[int]) -> dict[str, Any]:
        row = self._table.row(positions[-1], self.columns)
        if row.get(FIT_END) is None or len(positions) == 1:
            return row
        update = self._table.row(positions[-2], self.columns)
        known = {name: value for name, value in row.items() if value is not None or name == "event"}
        return {**update, **known}

    def events(self) -> list[dict[str, Any]]:
        """Return the updates at which something was out of the ordinary.

        Returns:
            Rows with `step`, `epoch`, `site` and `event`, in the order they were written.
        """
        positions = [place for place, event in enumerate(self._table.column("event")) if event]
        return [self._table.row(place, ("step", "epoch", "site", "event")) for place in positions]

    def shapes(self, site: str | None = None) -> list[dict[str, Any]]:
        """Read the snapshots of the sites' functions.

        Args:
            site: name of one site; None for all.

        Returns:
            Mappings as `LogWriter.write_shapes` took them, with `step`, in the order they were written, those
            of the selected sites only; empty if the run wrote none.
        """
        wanted = {site}
        if site is None:
            wanted = set(self._table.by_site)
        if self._shapes is not None:
            return [row for row in self._shapes if row["site"] in wanted]
        file = self.path / SHAPES
        if not file.exists():
            return []
        found = read_lines(file, lists=("z", "base", "function"))
        return [row for rows in found for row in rows if row["site"] in wanted]

    def to_pandas(self) -> pandas.DataFrame:
        """Return the rows as a pandas data frame.

        Returns:
            One line per row, `columns` as its columns; missing numbers are NaN.

        Raises:
            LogError: if pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise LogError("to_pandas needs pandas: pip install pandas") from None
        return pandas.DataFrame(self._arrays())

    def to_arrow(self) -> Any:
        """Return the rows as a `pyarrow.Table`, from which `polars.from_arrow` and Parquet are one call away.

        Returns:
            One line per row, `columns` as its columns; missing values are null.

        Raises:
            LogError: if pyarrow is not installed.
        """
        try:
            pyarrow = import_module("pyarrow")
        except ImportError:
            raise LogError("to_arrow needs pyarrow: pip install pyarrow") from None
        return pyarrow.Table.from_arrays(
            [pyarrow.array(values, from_pandas=True) for values in self._arrays().values()], names=self.columns
        )

    def _arrays(self) -> dict[str, Any]:
        return {name: self._table.columns[name].numpy() for name in self.columns}
