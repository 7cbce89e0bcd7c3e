"""`sae-ray judge` for real: an SAE in SAELens's format, real evidence, the real judge, stopped and continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import runs

from sae_ray.judging import results
from sae_ray.sae.formats import export_sae
from sae_ray.sae.formats.notes import Provenance
from sae_ray.storage import LocalStorage

D_SAE = 128
pytestmark = pytest.mark.timeout(1800)
PATIENCE_S = 600  # a machine may be busy with something else
SETTINGS = {
    "seed": 3,
    "ray.address": "local",
    "ray.local_cpus": 8,
    "ray.object_store_mb": 300,
    "model.dtype": "float32",
    "activations.block_sequences": 8,
    "judging.blocks": 10,
    "judging.positives": 6,
    "judging.negatives": 6,
    "judging.min_contexts": 16,
    "judging.random_directions": 2,
    "judging.baselines": "[residual relu]",
    "judging.baseline_neurons": 2,
    "judging.batch_latents": 3,
    "judge.kv_cache_gb": 0.5,
    "judge.mode": "likelihood",
    "judge.calibration.concepts": 8,
    "judge.start_timeout_s": 600,
}


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SAE of SmolLM2's layer 2, trained for a moment, as SAELens would write it."""
    folder = tmp_path_factory.mktemp("sae") / "layer2"
    where = Provenance("smollm2-135m-instruct", "blocks.2.hook_resid_post", 64)
    return export_sae(runs.tiny_sae(D_SAE), folder, "saelens", where)


def judge(sae: Path, folder: Path, *options: str, **settings: object) -> subprocess.Popen[str]:
    chosen = {**SETTINGS, "runs_dir": str(folder), **settings}
    sets = [part for key, value in chosen.items() for part in ("--set", f"{key}={value}")]
    return subprocess.Popen(
        [sys.executable, "-m", "sae_ray.cli", "judge", str(sae), "--latents", "0:9", *sets, *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160"},
    )  # fmt: skip


def test_a_judging_is_stopped_goes_on_and_ends_with_scores_nulls_and_a_report(sae, tmp_path):
    folder = tmp_path / "judge-layer2"
    storage = LocalStorage(folder)
    process = judge(sae, tmp_path)
    runs.wait_for(lambda: bool(results.parts(storage)), process, 600)
    os.kill(process.pid, signal.SIGINT)
    code, out, err = runs.finish(process, PATIENCE_S)
    assert code == 130, (out, err)
    assert "the same command goes on" in err
    before = results.latest(results.read(storage, "scores"))
    assert before

    code, out, err = runs.finish(judge(sae, tmp_path), PATIENCE_S)
    assert code == 0, (out, err)
    rows = results.latest(results.read(storage, "scores"))
    assert before.items() <= rows.items(), "what was committed before the stop is what counts after it"
    kinds = {kind for kind, _, _ in rows}
    assert kinds == {"latent", "random_direction", "residual relu"}
    assert {name for _, _, name in rows} == {"detection", "fuzzing"}
    for row in rows.values():
        if row["value"] is not None:
            assert row["low"] <= row["value"] <= row["high"]
            assert row["shuffled"] is not None
    summary = json.loads(storage.read("summary.json"))
    assert summary["cost"]["prompt_tokens"] > summary["cost"]["cached_tokens"] > 0
    assert pq.read_table(folder / "scores.parquet").num_rows == len(rows)
    page = (folder / "report.html").read_text()
    latent = next(latent for kind, latent, _ in rows if kind == "latent")
    assert f"row-{latent}" in page
    assert "detection" in out

    shown = subprocess.run(
        [sys.executable, "-m", "sae_ray.cli", "explain", str(folder), str(latent)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True,
    ).stdout  # fmt: skip
    assert rows["latent", latent, "detection"]["explanation"] in " ".join(shown.split())
    assert "[[" in shown

    code, _, err = runs.finish(judge(sae, tmp_path, **{"judging.positives": 7}))
    assert code == 2
    assert "holds a judging of another judging.positives; use --fresh, or another --name" in err


@pytest.mark.parametrize(
    ("options", "settings", "said"),
    [
        (("--latents", "0:999"), {}, "--latents 0:999: 0:999 is not within 0:128, the latents of this SAE"),
        (("--budget", "soon"), {}, "--budget soon: expected e.g. 30minutes"),
        ((), {"judging.scorers": "[detektion]"}, "judging.scorers"),
        ((), {"judging.explainers": "[lexikal]"}, "judging.explainers"),
        ((), {"hook.layer": 99}, "hook.layer"),
    ],
)
def test_what_is_wrong_is_one_line_before_a_cluster(sae, tmp_path, options, settings, said):
    code, _, err = runs.finish(judge(sae, tmp_path, *options, **settings), 120)
    assert code == 2, err
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
