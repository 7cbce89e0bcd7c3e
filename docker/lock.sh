#!/usr/bin/env bash
# Resolves the .in files beside this script into complete, hashed lock files (run by `make lock`).
# Torch is left out: it is installed first and apart, from whichever build the machine's pip is set up for.
set -euo pipefail
cd "$(dirname "$0")"
torch_only=$(grep -v '^#' overrides-cpu.txt | sed -E 's/[ =].*//' | sed 's/^/--no-emit-package /')
common=(--python-version 3.11 --universal --generate-hashes --no-annotate --no-header)
# shellcheck disable=SC2086
uv pip compile requirements-cpu.in --override overrides-cpu.txt $torch_only "${common[@]}" -o /dev/stdout -q | python3 strip_never.py > requirements-cpu.lock.new
mv requirements-cpu.lock.new requirements-cpu.lock
# CUDA's packages are one platform's.
uv pip compile ../pyproject.toml requirements-gpu.in --override overrides-gpu.txt --extra gpu --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate --no-header -o requirements-gpu.lock -q
uv pip compile requirements-dev.in "${common[@]}" -o requirements-dev.lock -q
uv pip compile requirements-triton.in "${common[@]}" -o requirements-triton.lock -q
