# syntax=docker/dockerfile:1.9
# Training image for NVIDIA GPUs: torch, DeepSpeed, FlashAttention and NVIDIA Apex, all compiled here and none at run time.
#
#   docker build -f docker/gpu.Dockerfile -t nexus-scale-gpu:0.1.0 .
#
# A digest pins the base to the bit: --build-arg CUDA_DIGEST=@sha256:... (docker buildx imagetools inspect nvidia/cuda:<tag>).
ARG CUDA_VERSION=12.8.1
ARG CUDA_DIGEST=
ARG RUNTIME_DIGEST=

# ------------------------------------------------------------------------------------------------- build
FROM nvidia/cuda:${CUDA_VERSION}-cudnn-devel-ubuntu24.04${CUDA_DIGEST} AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# torch of the version that its FlashAttention and Apex builds are known with; all else follows constraints.txt.
ARG TORCH_VERSION=2.11.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu128
ARG FLASH_ATTN_VERSION=2.8.3.post2
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0"
ARG MAX_JOBS=8

RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates git ninja-build python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS=0 PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN python3 -m venv /opt/venv \
 && sed '/^torch==/d' constraints.txt > /opt/constraints.txt \
 && echo "torch==${TORCH_VERSION}" >> /opt/constraints.txt \
 && pip install -c /opt/constraints.txt pip setuptools wheel packaging ninja py-cpuinfo hatchling editables psutil \
 && pip install --index-url "${TORCH_INDEX}" "torch==${TORCH_VERSION}"

# FORCE_BUILD: its setup would otherwise download a prebuilt wheel from elsewhere.
RUN FLASH_ATTENTION_FORCE_BUILD=TRUE MAX_JOBS=${MAX_JOBS} \
    pip install -c /opt/constraints.txt --no-build-isolation "flash-attn==${FLASH_ATTN_VERSION}"

# The package named apex on the index is an unrelated project: NVIDIA's comes from its repository, at one commit.
RUN git init --quiet /apex \
 && git -C /apex fetch --quiet --depth 1 https://github.com/NVIDIA/apex.git "${APEX_COMMIT}" \
 && git -C /apex checkout --quiet FETCH_HEAD \
 && test "$(git -C /apex rev-parse HEAD)" = "${APEX_COMMIT}" \
 && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD=${MAX_JOBS} pip install --no-build-isolation --no-deps /apex \
 && rm -rf /apex

RUN pip install -c /opt/constraints.txt --no-build-isolation deepspeed
COPY nexus_scale nexus_scale
COPY data_pipelines data_pipelines
COPY configs configs
RUN pip install -c /opt/constraints.txt --no-build-isolation ".[gpu,quickstart]" wandb \
 && pip check

# ----------------------------------------------------------------------------------------------- runtime
FROM nvidia/cuda:${CUDA_VERSION}-cudnn-runtime-ubuntu24.04${RUNTIME_DIGEST}
# A C compiler for Triton's launchers, where `compile: true` asks for torch.compile.
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev tini \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 nexus \
 && useradd --uid 10001 --gid nexus --create-home --shell /usr/sbin/nologin nexus \
 && install -d -o nexus -g nexus -m 0750 /shared

COPY --from=build /opt/venv /opt/venv
COPY --chown=root:root launch /app/launch

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
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
