"""The report of an output folder: one page that a person reads in the morning, from the ledger and the manifests."""

from segcore.report.page import write_report

__all__ = ["write_report"]
