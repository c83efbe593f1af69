"""Prefect flows and the ``fixative`` command: plan, protect, check, commit, publish."""

import os

# Nothing phones home unless the user turns it on. Set before prefect and ray are imported, which read them then.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Ray Data's actors always trip one error line of Ray's core (ray#53727); what matters reaches Python as exceptions.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
# Prefect gives its own server 20 s to start; on a busy machine, or while it builds its database, that is too short.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
