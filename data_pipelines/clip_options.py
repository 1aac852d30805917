"""The options that ingest_clips and ingest_speech share: a source that is read shard by shard, and how it is split."""

from __future__ import annotations

from data_pipelines.options import JobOptions, Number, option


class IngestOptions(JobOptions):
    """Options of a job that cuts clips out of a source's files."""

    heldout: Number = option(0.125, ge=0, lt=1, description="share of groups that is held out")
    seed: int = option(0, description="of the split and the order")
    max_bad: float = option(
        0.01,
        ge=0,
        le=1,
        description="share of files that may be broken before the job gives up; other rules drop without a limit",
    )
    workers: int | None = option(
        None, ge=0, description="processes of Ray Data; 0: in this process (default: one for each CPU)"
    )
