#!/usr/bin/env bash
# rules.yaml as Prometheus' operator takes it: cluster/prometheus/prometheusrule.sh | kubectl -n sae-ray apply -f -
set -euo pipefail
cat << 'HEAD'
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: sae-ray
  labels: {app.kubernetes.io/part-of: sae-ray, release: prometheus}
spec:
HEAD
sed '/^#/d; s/^./  &/' "$(dirname "$0")/rules.yaml"
