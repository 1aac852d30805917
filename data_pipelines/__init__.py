"""Jobs that make data: each file is one job, a recipe's `prepare:` names it, and it is a command too.

`data_pipelines.job` says what a job is, `data_pipelines.options` how its options are stated.
"""

from data_pipelines.job import JOBS, Job, check_options, load_job

__all__ = ["JOBS", "Job", "check_options", "load_job"]
