"""The per-layer correction log: write it, read it, look things up in it."""

from eafo_dynamic.records.reader import CorrectionLog
from eafo_dynamic.records.schema import COLUMNS, SCHEMA_VERSION, Column
from eafo_dynamic.records.writer import LogWriter

__all__ = ["COLUMNS", "SCHEMA_VERSION", "Column", "CorrectionLog", "LogWriter"]
