#!/usr/bin/env bash
# What docker/compose.yaml keeps secret, drawn at random, once: docker/.secrets/ray_token and docker/.env. Git ignores
# both.
set -euo pipefail
cd "$(dirname "$0")"

drawn() {
    head -c 24 /dev/urandom | od -An -v -tx1 | tr -d ' \n'
}

if [[ ! -e .secrets/ray_token ]]; then
    mkdir -p .secrets
    chmod 700 .secrets
    drawn > .secrets/ray_token
    # Readable by the containers' users, who are not this one; the folder is closed to everybody else here.
    chmod 644 .secrets/ray_token
fi
if [[ ! -e .env ]]; then
    (umask 077 && printf '%s\n' "S3_ACCESS_KEY=$(drawn)" "S3_SECRET_KEY=$(drawn)" "GRAFANA_PASSWORD=$(drawn)" > .env)
fi
echo "docker/.secrets/ray_token and docker/.env are there"
