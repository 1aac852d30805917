"""Ray: supervised training, elastic workers, sharded data jobs, job submission. The one door to ray."""
