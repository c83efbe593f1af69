"""Prefect flows and the ``fixative`` command: plan, protect, check, commit, publish."""

import os

# Nothing phones home unless the user turns it on. Set before prefect and ray are imported, which read them then.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# One process, one run: the flow's own log lines are enough, and a server of its own needs no copy of them.
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
