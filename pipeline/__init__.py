"""Archives, shards, workers, commits and checks: the way of the data. Never imports prefect."""
