"""Dashboard, alert rules and scrape config: every expression parses and reads a series that the code exports."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import jsonschema
import pytest
from manifests import CLUSTER, ROOT, only
from promql import PromQLError, parse
from ray.util import metrics as ray_metrics
from registered_metrics import SUFFIXES, registered, series
from schemas import RULES

DASHBOARD = CLUSTER / "grafana/dashboards/sae-ray.json"
PROGRAM = CLUSTER / "grafana/dashboard.jq"
RULES_FILE = CLUSTER / "prometheus/rules.yaml"
# What Prometheus itself makes of a scrape.
OF_PROMETHEUS = {"up": ("job", "instance")}

VALID = [
    "up",
    'sum by (run, role) (rate(a_total{run=~"$run"}[5m]))',
    "sum(a) by (run) / ignoring(le) group_left(x) b > bool 1",
    "histogram_quantile(0.95, sum by (le) (rate(a_bucket[1h30m])))",
    "avg_over_time((a > bool 1)[15m:15s]) > 0.5",
    "-a ^ -2 + 3 * (b offset 5m)",
    "a > 0 and on (run) b < 1 unless c == 2 or vector(1)",
    "topk(3, a)",
]
INVALID = [
    "",
    "sum by run (a)",
    "rate(a)",  # a range is missing
    "rate(rate(a[5m])[5m])",  # a subquery needs its step
    "increase(a[5m]",
    "a{run=run}",
    "a{run~'x'}",
    'a{run=~"("}',
    "a and 1",
    "1 > 2",
    "sum(a[5m])",
    "histogram_quantile(a, 0.95)",
    "rates(a[5m])",
    "a b",
    "a +",
    "a + bool b",
    "a $ b",
]
# Fine with Prometheus; ours asks for a unit and for a name, so that what is read is written.
STRICTER = ["rate(a[5])", '{run="x"}']


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, ...]]:
    return {**series(registered(monkeypatch)), **OF_PROMETHEUS}


def dashboard_expressions() -> list[str]:
    """Every query of the dashboard, Grafana's variables put in."""
    board = json.loads(DASHBOARD.read_text())
    targets = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    variables = [each["definition"] for each in board["templating"]["list"] if each["type"] == "query"]
    found = [re.fullmatch(r"label_values\((\w+), (\w+)\)", each) for each in variables]
    assert all(found)
    asked = [f"count by ({match.group(2)}) ({match.group(1)})" for match in found if match]
    return [each.replace("$__rate_interval", "5m") for each in targets] + asked


def alerts() -> list[dict[str, Any]]:
    return [rule for group in only(RULES_FILE)["groups"] for rule in group["rules"]]


def misnamed(expression: str, exported: dict[str, tuple[str, ...]]) -> list[str]:
    """Series that nobody exports and labels that none of those read has."""
    query = parse(expression)
    labels = {label for metric in query.metrics for label in exported.get(metric, ())}
    return [each for each in query.metrics if each not in exported] + sorted(query.labels - labels)


# -- the parser ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("expression", VALID)
def test_the_parser_takes_what_prometheus_takes(expression: str) -> None:
    parse(expression)


@pytest.mark.parametrize("expression", INVALID + STRICTER)
def test_the_parser_refuses_what_prometheus_refuses(expression: str) -> None:
    with pytest.raises(PromQLError):
        parse(expression)


def test_the_parser_tells_metrics_and_labels() -> None:
    query = parse('sum by (role) (a{run="x"}) / on (le) b > 1')
    assert (query.metrics, query.labels, query.type) == (["a", "b"], {"role", "run", "le"}, "vector")


def test_another_parser_agrees() -> None:
    other = pytest.importorskip("promql_parser", reason="promql-parser is not installed")
    for expression in VALID + STRICTER + dashboard_expressions() + [rule["expr"] for rule in alerts()]:
        other.parse(expression)
    for expression in INVALID:
        with pytest.raises(ValueError, match=r"."):
            other.parse(expression)


# -- what is exported ---------------------------------------------------------------------------------


def test_the_names_are_those_that_rays_agent_exposes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the recorder that Ray's agent has: its prefix, and OpenTelemetry's suffixes for Prometheus."""
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from opentelemetry.sdk.metrics import MeterProvider
    from prometheus_client import generate_latest
    from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder

    reader = PrometheusMetricReader()
    recorder = OpenTelemetryMetricRecorder(gauge_metric_ttl_seconds=60)
    provider = MeterProvider(metric_readers=[reader], shutdown_on_exit=False)
    recorder.meter = provider.get_meter("test")
    made = registered(monkeypatch)
    for name, (kind, tags) in made.items():
        more = {"buckets": [0.1, 1.0]} if kind == "Histogram" else {}
        getattr(recorder, f"register_{kind.lower()}_metric")(name, "a description", **more)
        recorder.set_metric_value(name, dict.fromkeys(tags, "x"), 1.0)
    text = generate_latest().decode()
    provider.shutdown()
    for name, labels in series(made).items():
        (line,) = [line for line in text.splitlines() if re.match(rf"{name}{{", line)][:1]
        assert {f'{label}="' in line for label in labels} == {True}


def test_every_kind_of_metric_was_found(exported: dict[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    made = registered(monkeypatch)
    assert {kind for kind, _ in made.values()} == set(SUFFIXES)
    assert {name.removeprefix("ray_") for name in exported} >= {"sae_ray_step", "sae_ray_pool_call_seconds_bucket"}
    assert ray_metrics.Gauge.__name__ == "Gauge"


# -- dashboard and rules ------------------------------------------------------------------------------


def test_every_query_of_the_dashboard_reads_what_is_exported(exported: dict[str, tuple[str, ...]]) -> None:
    expressions = dashboard_expressions()
    assert len(expressions) > 30
    assert {each: misnamed(each, exported) for each in expressions} == {each: [] for each in expressions}


def test_a_query_that_reads_nothing_is_found(exported: dict[str, tuple[str, ...]]) -> None:
    assert misnamed("ray_sae_ray_fvus", exported) == ["ray_sae_ray_fvus"]
    assert misnamed("sae_ray_fvu", exported) == ["sae_ray_fvu"]
    assert misnamed("rate(ray_sae_ray_pool_done[5m])", exported) == ["ray_sae_ray_pool_done"]
    assert misnamed("sum by (role) (ray_sae_ray_fvu)", exported) == ["role"]


def test_every_metric_has_a_panel(exported: dict[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {metric for each in dashboard_expressions() for metric in parse(each).metrics}
    made = registered(monkeypatch)
    without = [name for name, kind in made.items() if not shown & series({name: kind}).keys()]
    assert without == [], "add a panel to cluster/grafana/dashboard.jq and run `make dashboard`"


def test_panels_lie_beside_each_other_and_know_their_data_source() -> None:
    board = json.loads(DASHBOARD.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not taken & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
        letters = [target["refId"] for target in panel.get("targets", ())]
        assert len(letters) == len(set(letters))
        assert panel["type"] == "row" or letters
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel.get("targets", ()))
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    assert "datasource" in {each["name"] for each in board["templating"]["list"]}


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_the_dashboard_is_what_its_program_writes() -> None:
    done = subprocess.run(["jq", "-n", "-f", PROGRAM], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == DASHBOARD.read_text()


def test_the_rules_are_what_prometheus_documents() -> None:
    jsonschema.validate(only(RULES_FILE), RULES)
    broken = only(RULES_FILE)
    broken["groups"][0]["rules"][0]["annotation"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, RULES)


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_every_rule_reads_what_is_exported(rule: dict[str, Any], exported: dict[str, tuple[str, ...]]) -> None:
    assert misnamed(rule["expr"], exported) == []
    assert rule["labels"]["severity"] in ("warning", "critical")
    # A label that the series have not would be an empty word in the message.
    query = parse(rule["expr"])
    known = {label for metric in query.metrics for label in exported[metric]}
    told = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
    assert told
    assert told <= known
    functions = set(re.findall(r"\| (\w+)", " ".join(rule["annotations"].values())))
    assert functions <= {"humanize", "humanizeDuration", "humanizePercentage", "humanizeTimestamp"}


def test_the_rules_cover_what_should_wake_somebody() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names))
    assert {"SaeRayJudgesDown", "SaeRayTrainerWaits", "SaeRayBacklogGrows", "SaeRayGammaStopped"} <= set(names)


def test_prometheus_finds_the_nodes_with_the_token_and_reads_the_rules() -> None:
    config = only(CLUSTER / "prometheus/prometheus.yaml")
    assert all((CLUSTER / "prometheus" / name).is_file() for name in config["rule_files"])
    (job,) = config["scrape_configs"]
    (discovery,) = job["http_sd_configs"]
    assert job["job_name"] == "ray"  # as the rules call it
    assert discovery["authorization"]["credentials_file"] == "/run/secrets/ray_token"
    assert discovery["url"].endswith(":8265/api/prometheus/sd")
    source = only(CLUSTER / "grafana/provisioning/datasources/prometheus.yaml")["datasources"][0]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    compose = only(ROOT / "docker/compose.yaml")["services"]
    assert {"prometheus", "grafana"} <= compose.keys()
    provider = only(CLUSTER / "grafana/provisioning/dashboards/sae-ray.yaml")["providers"][0]
    assert f"../cluster/grafana/dashboards:{provider['options']['path']}:ro" in compose["grafana"]["volumes"]
