"""The outer floor: batches, the Prefect flow and the `segflow` command. URIs and small values, never arrays."""

from __future__ import annotations

import os

# Prefect reads these when it is first imported. Whoever sets them otherwise is obeyed.
for _name, _value in (
    # A fresh home migrates its database first, which takes longer than the default of 20 s.
    ("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180"),
    ("PREFECT_SERVER_ANALYTICS_ENABLED", "false"),
    ("DO_NOT_TRACK", "1"),
):
    os.environ.setdefault(_name, _value)
