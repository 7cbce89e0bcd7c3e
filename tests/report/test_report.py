"""The report page: what it says, what it leaves out, and that corpus text cannot take it over."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sae_ray.config_file import parse_config
from sae_ray.errors import UserError
from sae_ray.report import render_report
from sae_ray.report.curves import Series, Timeline, chart, nice_ticks, run_charts, thin
from sae_ray.report.features import best_and_worst, read_latents, visible
from sae_ray.report.findings import conclude
from sae_ray.report.run_files import applied_rewards, read_run

HOSTILE = "<script>alert('token')</script>"
TOPICS = [
    ("weather", "storms and rain", " the storm brought rain and wind over the coast before dawn"),
    (
        "arrays",
        "functions that reshape arrays",
        "Return a new array\n    of the given shape, without copying\tdata",
    ),
    ("dates", "dates and years", "In 1848, and again in 1905, the calendar of events was revised"),
    ("cooking", "baking bread", " knead the dough until smooth, then let it rise for an hour"),
    (
        "errors",
        "exceptions that are raised",
        "Raises:\n    ValueError: if the key is missing or not a string",
    ),
    ("music", "musical keys", " in the key of D minor, the second movement opens quietly"),
]


def write_run(folder: Path, *, n_latents: int = 18, gain: float = 0.05, leave_out: tuple[str, ...] = ()) -> Path:
    """A finished run's folder with made-up but plausible numbers."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    config = parse_config(
        {
            "name": folder.name,
            "hook": {"layer": 15},
            "sae": {"d_sae": 4608, "k": 32},
            "trainer": {"steps": 400},
            "rlaif": {"steps": 200, "control": True},
        },
        source="test",
    )
    files = {
        "config.yaml": config.to_yaml(),
        "metrics.jsonl": _lines(_metric_rows(rng)),
        "events.jsonl": _lines(_event_rows()),
        "calibration.json": json.dumps(_calibration()),
        "evaluation.json": json.dumps(_evaluation(rng, n_latents, gain)),
    }
    for name, text in files.items():
        if name not in leave_out:
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _metric_rows(rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, 601, 5):
        noise = rng.normal(0, 0.012)
        fvu = 0.24 + 0.9 * math.exp(-step / 60) + noise
        row = {
            "step": step, "loss": fvu, "fvu": fvu, "aux": 0.6 * math.exp(-step / 200),
            "l0": 32 + rng.normal(0, 0.3), "dead_fraction": min(0.06, max(0, step - 100) / 4000),
            "lr": 4e-4 * min(1, step / 20) if step < 320 else max(1e-4, 4e-4 - (step - 320) * 4e-6),
            "threshold": 0.9 * (1 - math.exp(-step / 80)), "credit_loss": 0.0,
            "grad_norm": 0.5 + rng.exponential(0.1), 
            "step_seconds": 4.1 if step == 1 else 0.33 + rng.exponential(0.03),
            "tokens_per_s": 2900 + rng.normal(0, 90),
        }  # fmt: skip
        if step > 400:
            row["control/fvu"] = fvu - 0.004 * (1 - math.exp(-(step - 400) / 60)) + rng.normal(0, 0.0006)
            row["control/l0"] = row["l0"] + rng.normal(0, 0.05)
            row["control/dead_fraction"] = row["dead_fraction"] + 0.002
            if step > 440:
                row["credit_loss"] = 0.52 - 0.1 * (1 - math.exp(-(step - 440) / 60)) + rng.normal(0, 0.01)
                row["step_seconds"] += 0.05
        rows.append(row)
    return rows


def _event_rows() -> list[dict[str, Any]]:
    start = 1_780_000_000.0
    return [
        {"time": start, "event": "phase", "name": "starting", "seconds": 21.4},
        {"time": start + 190, "event": "phase", "name": "reconstruction", "seconds": 168.0},
        {"time": start + 100, "event": "commit", "step": 100},
        {"time": start + 200, "event": "calibration", "mode": "likelihood", "auroc": 0.91},
        {"time": start + 230, "event": "phase", "name": "calibration", "seconds": 38.7},
        {"time": start + 290, "event": "rewards_applied", "round": 0, "at_step": 440, "verdicts": 912,
         "mean_auroc": 0.66, "mean_shuffled": 0.51, "rewards": 28},
        {"time": start + 380, "event": "rewards_applied", "round": 1, "at_step": 538, "verdicts": 1804,
         "mean_auroc": 0.69, "mean_shuffled": 0.5, "rewards": 31},
        {"time": start + 420, "event": "phase", "name": "RLAIF", "seconds": 190.2},
        {"time": start + 520, "event": "phase", "name": "evaluation", "seconds": 96.0},
    ]  # fmt: skip


def _calibration() -> dict[str, Any]:
    likelihood = {
        "auroc": 0.91,
        "low": 0.86,
        "high": 0.95,
        "false_positive_rate": 0.17,
        "false_negative_rate": 0.14,
    }
    yes_no = {
        "auroc": 0.47,
        "low": 0.38,
        "high": 0.56,
        "false_positive_rate": 0.51,
        "false_negative_rate": 0.49,
    }
    return {
        "judge": "smollm2-135m-instruct",
        "mode": "likelihood",
        "summary": "likelihood tells planted topics apart; yes_no is at chance.",
        "modes": {"likelihood": {**likelihood, "n": 96}, "yes_no": {**yes_no, "n": 96}},
    }


def _evaluation(rng: np.random.Generator, n_latents: int, gain: float) -> dict[str, Any]:
    core = {
        "fvu": 0.2417, "l0": 32.1, "dead_fraction": 0.061, "ce_clean": 3.214, "ce_sae": 3.377,
        "ce_mean_ablation": 6.9, "ce_zero_ablation": 9.83,
        "ce_recovered_mean": 0.956, "ce_recovered_zero": 0.975,
    }  # fmt: skip
    null = {"shuffled": 0.507, "shuffled_low": 0.468, "shuffled_high": 0.546, "n_latents": n_latents}
    return {
        "core": {
            "before": core,
            "rlaif": {**core, "fvu": 0.2391, "ce_recovered_mean": 0.957},
            "control": {**core, "fvu": 0.2352, "ce_recovered_mean": 0.959},
        },
        "detection": {
            "before": {"auroc": 0.642, "low": 0.601, "high": 0.683, **null},
            "rlaif": {"auroc": 0.668 + gain, "low": 0.628 + gain, "high": 0.708 + gain, **null},
            "control": {"auroc": 0.668, "low": 0.629, "high": 0.707, **null},
            "random_directions": {"auroc": 0.561, "low": 0.503, "high": 0.619, **null, "n_latents": 16},
        },
        "paired": [
            {"name": name, "difference": at, "low": at - half, "high": at + half, "n": n_latents}
            for name, at, half in (
                ("rlaif - control", gain, 0.028),
                ("rlaif - before", gain + 0.026, 0.036),
                ("control - before", 0.026, 0.034),
            )
        ],
        "latents": [_latent(rng, 137 * index + 12, index, gain) for index in range(n_latents)],
        "judge": {"requests": 2210, "tokens": {"prompt": 401223, "cached": 291001}, "ratio": 0.725},
        "verdicts": 5120,
        "seconds": {"core": 31.2, "detection": 64.8},
    }  # fmt: skip


def _latent(rng: np.random.Generator, latent: int, index: int, gain: float) -> dict[str, Any]:
    name, better, text = TOPICS[index % len(TOPICS)]
    base = float(np.clip(rng.normal(0.64, 0.13), 0.35, 0.97))
    versions, examples = {}, {}
    for version, shift in (("before", 0.0), ("rlaif", 0.03 + gain), ("control", 0.02)):
        auroc = float(np.clip(base + shift + rng.normal(0, 0.04), 0.2, 0.99))
        versions[version] = {
            "auroc": auroc, "low": max(0.0, auroc - 0.13), "high": min(1.0, auroc + 0.11),
            "standard_error": 0.06,
            "shuffled": float(rng.normal(0.5, 0.05)), "explanation": name if version == "before" else better,
            "explainer": "lexical" if version == "before" else "llm",
            "density": float(rng.uniform(0.0004, 0.03)),
            "n_verdicts": 20,
        }  # fmt: skip
        examples[version] = [_example(rng, text, kind) for kind in ("positive",) * 5 + ("near_miss", "random")]
    return {"latent": latent, "versions": versions, "examples": examples}


def _example(rng: np.random.Generator, text: str, kind: str) -> dict[str, Any]:
    tokens = [piece for word in text.split(" ") for piece in ([" " + word] if word else ["   "])] * 2 + [
        "\n",
        "\n",
        " Then",
    ]
    activations = np.where(rng.random(len(tokens)) < 0.22, rng.gamma(3, 1.2, len(tokens)), 0.0)
    if kind == "random":
        activations[:] = 0
    probability = None if rng.random() < 0.1 else float(rng.beta(5, 3) if kind == "positive" else rng.beta(3, 5))
    return {
        "tokens": tokens,
        "activations": activations.tolist(),
        "verdict_probability": probability,
        "kind": kind,
    }


class Page(HTMLParser):
    """Visible text, elements, ids and links of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self._hidden = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.elements if name in attrs]


def edit(run: Path, name: str, change: Any) -> None:
    value = json.loads((run / name).read_text())
    change(value)
    (run / name).write_text(json.dumps(value))


def test_page_shows_every_section_and_needs_no_network(tmp_path: Path) -> None:
    run = write_run(tmp_path / "quickstart")
    path = render_report(run)
    assert path == run / "report.html"
    page = Page(path)
    for expected in (
        "0.239", "95.7%", "0.718", "0.63 to 0.71", "0.91", "Dead latents", "Credit loss", "Step time",
        "R0", "R1", "yes no", "random directions", "Best 6", "Worst 6", "3 min 10 s", "storms and rain",
        "0.507", "4608",
        "sae-ray train",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert len([1 for tag, _ in page.elements if tag == "path"]) >= 9
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    assert not page.attributes("src")
    assert all(link.startswith("#") for link in page.attributes("href"))
    source = path.read_text()
    assert "http://" not in source
    assert "https://" not in source
    assert "url(" not in source
    assert "nan" not in page.text.lower().split()
    assert path.stat().st_size < 1_000_000


def test_a_sweeps_other_saes_stand_in_the_table_and_curves_and_not_on_the_cards(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sweep")
    plain = Page(render_report(run)).text
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["saes"] = [{"name": "early", "hook": {"layer": 4}}, {"name": "late", "sae": {"k": 16}}]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    row = {"fvu": 0.5123, "l0": 15.9, "hook": "blocks.4.hook_resid_post", "architecture": "batchtopk", "d_sae": 4608}
    edit(run, "evaluation.json", lambda value: value["core"].update(early=row))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [one | {"early/fvu": 0.6, "late/fvu": 0.7, "early/l0": 15.0} for one in rows]
    (run / "metrics.jsonl").write_text(_lines(rows))
    page = Page(render_report(run))
    assert "FVU of every SAE" in page.text
    assert "0.5123" in page.text
    assert "blocks.4.hook_resid_post" in page.text
    for card in ("FVU 0.239 before 0.242 control 0.235", "L0 32.1 before"):
        assert card in page.text
    classes = page.attributes("class")
    assert {"v-sae-0", "v-sae-1"} <= set(classes)
    for word in ("FVU of every SAE", "Hook point"):
        assert word not in plain


def test_every_link_inside_the_page_has_a_target(tmp_path: Path) -> None:
    page = Page(render_report(write_run(tmp_path / "links")))
    ids = page.attributes("id")
    assert {link[1:] for link in page.attributes("href")} <= set(ids)
    assert len(ids) == len(set(ids))


def test_text_of_corpus_model_and_config_cannot_become_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "hostile")

    def poison(value: dict[str, Any]) -> None:
        for row in value["latents"]:
            for version in row["versions"].values():
                version["explanation"] = version["explainer"] = HOSTILE
            for shown in row["examples"].values():
                shown[0]["tokens"][0] = HOSTILE
                shown[0]["tokens"][1] = '" onmouseover="alert(1)'
                shown[0]["kind"] = HOSTILE
        value["judge"] = {HOSTILE: HOSTILE}
        value["paired"][0]["name"] = HOSTILE
        value["core"][HOSTILE] = value["core"]["rlaif"]
        value["detection"]['"><b onclick=x>'] = value["detection"]["rlaif"]

    edit(run, "evaluation.json", poison)
    edit(run, "calibration.json", lambda value: value.update(judge=HOSTILE, summary=HOSTILE))
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 1.0, "event": HOSTILE}) + "\n")
        file.write(json.dumps({"event": "phase", "name": HOSTILE, "seconds": 1.0}) + "\n")
    path = render_report(run)
    page = Page(path)
    assert HOSTILE in page.text
    assert HOSTILE not in path.read_text()
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]


def test_page_lets_only_its_own_script_run(tmp_path: Path) -> None:
    import base64
    import hashlib

    source = render_report(write_run(tmp_path / "policy")).read_text()
    script = source.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in source
    assert "default-src 'none'" in source


@pytest.mark.parametrize(
    "missing",
    ["metrics.jsonl", "events.jsonl", "calibration.json", "evaluation.json"],
    ids=lambda name: name.split(".")[0],
)
def test_a_missing_file_is_named_where_its_section_would_be(tmp_path: Path, missing: str) -> None:
    page = Page(render_report(write_run(tmp_path / "partial", leave_out=(missing,))))
    assert f"{missing} has not been written." in page.text


def test_a_run_that_has_only_a_config_still_has_a_page(tmp_path: Path) -> None:
    files = ("metrics.jsonl", "events.jsonl", "calibration.json", "evaluation.json")
    page = Page(render_report(write_run(tmp_path / "young", leave_out=files)))
    assert "has not been evaluated" in page.text
    assert "no step logged" in page.text


def test_a_torn_file_is_reported_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "torn")
    (run / "evaluation.json").write_text('{"core": {"before"')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 601, "fv')
    events = (run / "events.jsonl").read_text().splitlines()
    (run / "events.jsonl").write_text("\n".join([events[0], events[1][:20], *events[2:]]) + "\n")
    page = Page(render_report(run))
    assert "evaluation.json cannot be read" in page.text
    assert "R1 538" in page.text, "what a resumed run wrote after a torn line is still there"
    assert "596 of 600 steps" in page.text


def test_values_that_were_not_measured_are_dashes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "gaps", n_latents=3)

    def blank(value: dict[str, Any]) -> None:
        for row in value["latents"]:
            row["versions"]["rlaif"].update(
                auroc=math.nan, low=math.nan, high=math.nan, shuffled=None, explanation=None
            )
            row["examples"] = {}
        value["core"]["rlaif"]["ce_sae"] = math.inf
        value["core"]["control"] = None
        value["detection"]["rlaif"].update(low=None, high=None)
        value["paired"] = [{"name": "rlaif - control", "difference": None, "low": None, "high": None, "n": 0}]

    edit(run, "evaluation.json", blank)
    page = Page(render_report(run))
    assert "No latent's detection was measured." in page.text
    assert "Whether RLAIF beat continued training is unknown" in page.text
    assert "nan" not in page.text.lower().split()
    assert "None" not in page.text.replace("None,", "")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.yaml"):
        render_report(tmp_path)


@pytest.mark.parametrize(
    ("gain", "status", "words"),
    [
        (0.05, "better", "RLAIF beat continued training"),
        (0.01, "undecided", "includes 0"),
        (-0.05, "worse", "did worse than continued training"),
    ],
)
def test_conclusion_follows_the_interval_of_the_paired_difference(
    tmp_path: Path, gain: float, status: str, words: str
) -> None:
    conclusion = conclude(read_run(write_run(tmp_path / "run", gain=gain)))
    assert conclusion.status == status
    assert words in conclusion.sentence


def test_an_interval_that_touches_zero_is_not_a_win(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    edit(run, "evaluation.json", lambda value: value["paired"][0].update(low=0.0))
    assert conclude(read_run(run)).status == "undecided"


def test_gain_over_before_alone_is_not_called_a_win(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", gain=0.2)
    edit(run, "evaluation.json", lambda value: value["paired"].pop(0))
    conclusion = conclude(read_run(run))
    assert conclusion.status == "unknown"
    assert "mixes the rewards with the extra steps" in conclusion.support[0]


def test_detection_within_its_null_is_said_to_be_chance(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    edit(run, "evaluation.json", lambda value: value["detection"]["rlaif"].update(low=0.53))
    assert any("not clear of chance" in line for line in conclude(read_run(run)).support)


@pytest.mark.parametrize("n_latents", [0, 1, 2, 5, 12, 30])
def test_best_and_worst_features_never_overlap(n_latents: int) -> None:
    evaluation = _evaluation(np.random.default_rng(1), n_latents, 0.05)
    best, worst = best_and_worst(read_latents(evaluation), 6)
    ids = [latent.latent for latent in best + worst]
    assert len(ids) == len(set(ids)) == min(n_latents, 12)
    margins = [latent.score("rlaif").margin for latent in best + worst[::-1]]  # type: ignore[union-attr]
    assert margins == sorted(margins, reverse=True)


def test_rewards_undone_by_a_resume_are_not_listed() -> None:
    def applied(round_: int, step: int) -> dict[str, Any]:
        return {"event": "rewards_applied", "round": round_, "at_step": step}

    events = [applied(0, 440), applied(1, 538), {"event": "resume", "step": 500}, applied(1, 545)]
    assert [(row["round"], row["at_step"]) for row in applied_rewards(events)] == [(0, 440), (1, 545)]
    assert [row["round"] for row in applied_rewards(events[:3])] == [0]


@pytest.mark.parametrize(
    ("token", "lit", "shown"),
    [
        (" the", True, " the"),
        ("\n\n", True, "↵↵"),
        ("\tx", False, "⇥x"),
        ("  ", True, "··"),
        ("  ", False, "  "),
        ("a\u202eb", False, "a⟨202e⟩b"),
        ("\x07", True, "⟨0007⟩"),
        ("\ud800", False, "⟨d800⟩"),
        ("é日", True, "é日"),
    ],
)
def test_characters_that_cannot_be_seen_are_spelt_out(token: str, lit: bool, shown: str) -> None:
    assert visible(token, lit) == shown


def test_strongest_token_is_shaded_fully_and_silent_tokens_not_at_all(tmp_path: Path) -> None:
    evaluation = _evaluation(np.random.default_rng(1), 1, 0.05)
    shown = evaluation["latents"][0]["examples"]["rlaif"]
    peak = max(max(example["activations"]) for example in shown)
    score = read_latents(evaluation)[0].score("rlaif")
    assert score is not None
    tokens = [token for example in score.examples for token in example.tokens]
    assert max(token.strength for token in tokens) == 1.0
    assert next(token.title for token in tokens if token.strength == 1.0) == f"activation {peak:.3g}"
    assert all((token.strength > 0) == bool(token.title) for token in tokens)


def test_long_runs_are_averaged_down_without_moving_their_mean() -> None:
    points = [(float(step), float(step % 7)) for step in range(10_000)]
    few = thin(points)
    assert len(few) == 500
    assert sum(y for _, y in few) / 500 == pytest.approx(sum(y for _, y in points) / 10_000)


def test_curve_rises_where_the_values_rise() -> None:
    drawn = chart("x", "", [Series("SAE", "rlaif", [(0, 1.0), (10, 3.0)])], Timeline(0, 10, None))
    assert drawn is not None
    (x0, y0), (x1, y1) = [tuple(map(float, spot.split())) for spot in drawn.lines[0].path[1:].split("L")]
    assert (x0, x1) == (0, 1000)
    assert y0 > y1, "SVG counts down from the top"


def test_flat_and_single_point_curves_can_be_drawn() -> None:
    for points in ([(5.0, 0.0)], [(0.0, 2.5), (10.0, 2.5)]):
        for log in (False, True):
            drawn = chart(
                "x",
                "",
                [Series("SAE", "rlaif", points)],
                Timeline(0, 10, None),
                log=log,
                floor=0.0 if not log else None,
            )
            assert (drawn is None) == (log and points[0][1] == 0)


def test_ticks_are_round_and_inside_the_axis() -> None:
    assert nice_ticks(0, 600) == [0, 200, 400, 600]
    assert nice_ticks(0.231, 0.262) == pytest.approx([0.24, 0.25, 0.26])
    assert nice_ticks(3, 3) == [3]


def test_labels_of_neighbouring_ticks_differ_however_close_they_are() -> None:
    for low, high in ((0.0, 0.0031), (31.9, 32.1), (-2e-5, 4e-5), (0.0, 900.0)):
        series = [Series("SAE", "rlaif", [(0, low), (10, high)])]
        drawn = chart("x", "", series, Timeline(0, 10, None))
        assert drawn is not None
        labels = [tick.label for tick in drawn.y_ticks]
        assert len(labels) == len(set(labels)) >= 3


def test_credit_curve_begins_with_the_first_rewards() -> None:
    rows = [{"step": step, "credit_loss": 0.0 if step < 30 else 0.5} for step in range(0, 60, 10)]
    charts, _ = run_charts(rows, Timeline(0, 50, 20))
    credit = next(one for one in charts if one.title == "Credit loss")
    assert [step for step, _ in json.loads(credit.hover)["series"][0]["points"]] == [30, 40, 50]
    assert not run_charts(rows[:3], Timeline(0, 50, 20))[0]
