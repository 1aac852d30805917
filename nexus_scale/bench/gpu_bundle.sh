#!/usr/bin/env bash
# Packs what a bare GPU machine needs to run `nexus bench gpu` and `pytest -m gpu`: x86-64 Linux, Python 3.12, torch 2.11 or later with CUDA,
# numpy, pandas, pyarrow, transformers and pytest, no network. Two archives, less than 60 MiB together: the packages that it lacks, and this
# project as committed.
#
#   make gpu-bundle                                     into build/gpu
#   nexus_scale/bench/gpu_bundle.sh FOLDER [PYTHON]     PYTHON: of an environment with this project's packages (default: .venv/bin/python)
set -euo pipefail

project=$(cd "$(dirname "$0")/../.." && pwd)
out=$(realpath -m "${1:-$project/build/gpu}")
python=${2:-$project/.venv/bin/python}
limit_mib=60
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for tool in unzip xz git; do
  command -v "$tool" >/dev/null || { echo "gpu_bundle.sh: needs $tool, which is not installed; install it and run this again" >&2; exit 1; }
done
mkdir -p "$out" "$work/wheels" "$work/site" "$work/project"

# Ours, and what Ray's dashboard and agent import on their start, beyond what such an image has.
packages=(
  pydantic pydantic_core annotated-types typing-inspection
  hjson diffusers importlib_metadata webdataset braceexpand
  ray jsonschema referencing jsonschema-specifications rpds-py smart_open tensorboardX aiohttp-cors colorful py-spy
  opencensus opencensus-context opentelemetry-sdk opentelemetry-api opentelemetry-proto opentelemetry-exporter-prometheus
  opentelemetry-semantic-conventions google-api-core googleapis-common-protos google-auth proto-plus pyasn1 pyasn1_modules
  cffi cryptography pycparser
)
pinned=()
for name in "${packages[@]}"; do
  pin=$(grep -i "^$name==" "$project/constraints.txt") || { echo "constraints.txt has no version of $name" >&2; exit 1; }
  pinned+=("$pin")
done
platforms=()
for glibc in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${glibc}_x86_64")
done
echo "downloading ${#pinned[@]} packages"
"$python" -m pip --disable-pip-version-check download --progress-bar off --no-deps --only-binary=:all: \
  --python-version 3.12 --implementation cp "${platforms[@]}" --dest "$work/wheels" "${pinned[@]}"

echo "unpacking them"
# Ray without Java, its reinforcement learning, its web page and its model server, none of which runs here: 80 MB become 30.
without=('ray/jars/*' 'ray/rllib/*' 'ray/serve/*' 'ray/dashboard/client/*' 'ray/core/libjemalloc.so')
for wheel in "$work"/wheels/*.whl; do
  exclude=()
  case $(basename "$wheel") in ray-*) exclude=(-x "${without[@]}") ;; esac
  unzip -qo "$wheel" -d "$work/site" "${exclude[@]}"
done

# DeepSpeed has no wheel; installed without compiled operators it is plain Python, for any version.
installed=$("$python" -c 'import importlib.metadata as m; print(m.distribution("deepspeed").locate_file(""))')
cp -r "$installed"/deepspeed "$installed"/deepspeed-*.dist-info "$work/site"
rm -rf "$work/site/deepspeed/ops/csrc"
find "$work/site" -name __pycache__ -prune -exec rm -rf {} +

git -C "$project" archive --prefix=nexus-scale/ HEAD | tar -x -C "$work/project"
find "$work/project" -path '*/bench/results/*' \( -name '*.png' -o -name '*.wav' \) -delete

echo "compressing them"
XZ_OPT='-6 -T2' tar --checkpoint=1000 --checkpoint-action=echo='%u0 KiB packed' -cJf "$out/site.txz" -C "$work/site" .
XZ_OPT='-6 -T2' tar -cJf "$out/project.txz" -C "$work/project" .
bytes=$(($(stat -c %s "$out/site.txz") + $(stat -c %s "$out/project.txz")))
echo "$out: site.txz and project.txz, $((bytes / 2**20)) MiB together"
((bytes < limit_mib * 2**20)) || { echo "more than $limit_mib MiB" >&2; exit 1; }
cat <<'RUN'
On the GPU machine, in the folder of the two archives:
  mkdir -p site && tar -xJf site.txz -C site && tar -xJf project.txz && cd nexus-scale && export PYTHONPATH=$PWD/../site:$PWD
  python3 -m nexus_scale.cli bench gpu --minutes 7 --json > gpu.json
  python3 -m pytest -m gpu $(grep -rlE 'mark\.(gpu|device)' tests --include='test_*.py')
RUN
