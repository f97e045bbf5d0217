"""Endurance: long runs with faults on purpose, by hand (`make endurance WHAT='kills 100'`). Not collected by pytest."""
