# syntax=docker/dockerfile:1.9
# The same without a GPU: for the quickstart, for tests, and for trying a cluster with docker/compose.yaml.
#
#   docker build -f docker/cpu.Dockerfile -t nexus-scale-cpu:0.1.0 .
#
# A digest pins the base to the bit: --build-arg PYTHON_DIGEST=@sha256:...
ARG PYTHON_TAG=3.11.13-slim-bookworm
ARG PYTHON_DIGEST=

# ------------------------------------------------------------------------------------------------- build
FROM python:${PYTHON_TAG}${PYTHON_DIGEST} AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS=0 DS_ACCELERATOR=cpu PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN python -m venv /opt/venv \
 && pip install -c constraints.txt pip setuptools wheel packaging ninja py-cpuinfo hatchling editables \
 && pip install --index-url "${TORCH_INDEX}" "torch==${TORCH_VERSION}" \
 && pip install -c constraints.txt --no-build-isolation deepspeed
COPY nexus_scale nexus_scale
COPY data_pipelines data_pipelines
COPY configs configs
RUN pip install -c constraints.txt --no-build-isolation ".[quickstart]" \
 && pip check

# ----------------------------------------------------------------------------------------------- runtime
FROM python:${PYTHON_TAG}${PYTHON_DIGEST}
RUN apt-get update \
 && apt-get install -y --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 nexus \
 && useradd --uid 10001 --gid nexus --create-home --shell /usr/sbin/nologin nexus \
 && install -d -o nexus -g nexus -m 0750 /shared

COPY --from=build /opt/venv /opt/venv
COPY --chown=root:root launch /app/launch

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    DS_ACCELERATOR=cpu \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    TORCH_FORCE_WEIGHTS_ONLY_LOAD=1 \
    WDS_SECURE=1 \
    HF_HUB_OFFLINE=1 \
    NEXUS_DATA_ROOT=/shared/data \
    NEXUS_RUNS_ROOT=/shared/runs
WORKDIR /app
USER 10001:10001
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["nexus", "doctor"]
