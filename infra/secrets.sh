#!/usr/bin/env sh
# Prints random secrets for infra/compose.yaml, and names what else may be set: infra/secrets.sh > infra/.env
set -eu
umask 077
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
cat <<END
RAY_AUTH_TOKEN=$(random)
PREFECT_PASSWORD=$(random)
POSTGRES_PASSWORD=$(random)
S3_ACCESS_KEY=fixative
S3_SECRET_KEY=$(random)
GRAFANA_PASSWORD=$(random)
# What follows is no secret; these are the defaults.
FIXATIVE_JOB=./job.yaml
FIXATIVE_CRON=0 3 * * *
FIXATIVE_TIMEZONE=UTC
FIXATIVE_VARIANT=cpu
RAY_WORKER_CPUS=2
END
