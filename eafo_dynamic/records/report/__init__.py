"""One HTML file that shows what a run did to every site; it needs neither a network nor a server."""

from eafo_dynamic.records.report.page import render_report, write_report

__all__ = ["render_report", "write_report"]
