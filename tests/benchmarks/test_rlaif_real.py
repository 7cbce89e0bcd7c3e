"""What the real-LM benchmark makes of its scores, and the L0 that it compares SAEs at. No model is needed."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmark_scripts import load

from sae_ray.activations.store import stream_settings
from sae_ray.config_file import parse_config
from sae_ray.judge.scores import mean_estimate

configs = load("rlaif_real_configs")
report = load("rlaif_real_report")
match = load("rlaif_real_match")
bench = load("rlaif_real")


def of(values: list[float | None], first: int = 0) -> dict[int, float | None]:
    return dict(enumerate(values, first))


def test_pairs_are_the_latents_that_both_have_and_the_others_are_counted():
    a = {1: 0.9, 2: 0.7, 3: None, 5: 0.6, 7: 0.5}
    b = {1: 0.6, 2: 0.5, 3: 0.4, 6: 0.8, 7: float("nan")}
    found = report.paired("embedding", "rlaif", "continued", a, b)
    assert found.mean == pytest.approx((0.3 + 0.2) / 2)
    assert (found.n, found.missing) == (2, 4)  # 3, 5, 6 and 7: one side has it
    assert report.paired("embedding", "a", "b", {1: 0.5}, {2: 0.5}) is None
    assert report.paired("embedding", "a", "b", {1: None}, {1: 0.5}) is None


def test_pairing_takes_out_what_latents_differ_in_and_not_pairing_does_not():
    rng = np.random.default_rng(0)
    level = rng.normal(0.6, 0.2, 40)
    gain = rng.normal(0.05, 0.01, 40)
    a, b = of((level + gain).tolist()), of(level.tolist())
    close, wide = report.paired("x", "a", "b", a, b), report.unpaired("x", "a", "b", a, b)
    assert close.mean == pytest.approx(float(gain.mean())) == wide.mean
    reference = mean_estimate((level + gain - level).tolist(), resamples=report.RESAMPLES)
    assert (close.low, close.high) == (pytest.approx(reference.low), pytest.approx(reference.high))
    assert close.above_zero
    assert not wide.above_zero
    # Of two independent means the standard error is the root of the summed squares.
    expected = 1.96 * np.sqrt(sum(side.var(ddof=1) / 40 for side in (level + gain, level)))
    assert wide.high - wide.mean == pytest.approx(expected, rel=0.15)


def test_every_sae_is_held_against_continued_training_and_rlaif_against_shuffled_verdicts():
    scores = {
        "embedding": {
            "continued": of([0.5, 0.6]), "rlaif": of([0.7, 0.7]), "shuffled": of([0.6, 0.6]),
            "matryoshka": of([0.9], first=50), "own_cuts": of([0.8, 0.9]), "own_shuffled": of([0.8, 0.8]),
        },
        "detection": {"rlaif": of([0.7])},  # nothing to compare with yet
    }  # fmt: skip
    found = report.differences(scores, others=["matryoshka"])
    told = {(d.one, d.other): (round(d.mean, 6), d.paired) for d in found}
    assert told == {
        ("rlaif", "continued"): (0.15, True),
        ("shuffled", "continued"): (0.05, True),
        ("matryoshka", "continued"): (0.35, False),
        ("own_cuts", "continued"): (0.3, True),
        ("own_shuffled", "continued"): (0.25, True),
        ("rlaif", "shuffled"): (0.1, True),
        ("own_cuts", "own_shuffled"): (0.05, True),
    }


def core(**fvu: float) -> dict[str, dict[str, float]]:
    return {name: {"fvu": value, "l0": 32.0, "dead_fraction": 0.01} for name, value in fvu.items()}


def gain(mean: float, low: float) -> list:
    return [report.Difference("embedding", "rlaif", "continued", True, mean, low, 2 * mean - low, 40, 0)]


def test_scores_of_some_latents_leave_out_the_others_and_saes_with_other_latents():
    scores = {"embedding": {"continued": {1: 0.5, 2: 0.7}, "rlaif": {1: 0.6, 2: 0.7, 3: 0.9}, "matryoshka": {2: 0.1}}}
    assert report.only(scores, [1, 3], ["matryoshka"]) == {
        "embedding": {"continued": {1: 0.5}, "rlaif": {1: 0.6, 3: 0.9}}
    }


@pytest.mark.parametrize(
    ("found", "fvu", "met"),
    [
        (gain(0.06, 0.01), 0.203, True),
        (gain(0.04, 0.01), 0.203, False),  # too little
        (gain(0.06, -0.01), 0.203, False),  # may be none
        (gain(0.06, 0.01), 0.206, False),  # paid for with reconstruction
        (gain(0.06, 0.01), 0.194, False),  # not the same trade either
        ([], 0.203, None),
    ],
)
def test_the_target_asks_for_gain_certainty_and_equal_reconstruction(found, fvu, met):
    row, of_all = report.targets(found, core(continued=0.2, rlaif=fvu), ["rlaif"])
    assert of_all["met"] is None  # nobody asked about all texts
    assert row["met"] is met
    lines = report.target_lines([row])
    assert len(lines) == 2
    assert lines[1].endswith({True: "met", False: "missed", None: "not measured yet"}[met])


def test_another_l0_misses_the_target():
    about = core(continued=0.2, rlaif=0.2)
    about["rlaif"]["l0"] = 33.0
    assert report.targets(gain(0.06, 0.01), about, ["rlaif"])[0]["met"] is False


def test_the_table_has_a_cell_for_every_heading_and_leaves_empty_what_is_missing():
    scores = {"embedding": {"continued": of([0.5, 0.6]), "rlaif": of([0.7, None])}, "simulation": {"rlaif": of([None])}}
    found = report.differences(scores)
    head, rows = report.grid(scores, core(continued=0.2), found)
    assert {len(row) for row in rows} == {len(head)}
    assert rows[0][:4] == ["continued", "0.2000", "32.00", ""]
    assert rows[1][:3] == ["rlaif", "", ""]
    assert rows[1][5] == "0.700 (+0.200, -inf to +inf, n 1)"
    assert rows[1][6] == ""
    counts = {line.count("|") for line in report.markdown(head, rows).splitlines()}
    assert counts == {len(head) + 1}


def test_the_plot_is_an_image_with_every_difference_and_infinite_intervals_stay_inside():
    scores = {"embedding": {"continued": of([0.5, 0.6]), "a<b": of([0.7, None]), "rlaif": of([0.6, 0.9])}}
    root = ET.fromstring(report.svg(report.differences(scores)))
    texts = [node.text for node in root.iter() if node.tag.endswith("text")]
    assert "a<b - continued" in texts
    assert "rlaif - continued" in texts
    width = float(root.attrib["width"])
    edges = [float(node.attrib[key]) for node in root.iter() if node.tag.endswith("line") for key in ("x1", "x2")]
    assert all(0 <= edge <= width for edge in edges)
    assert ET.fromstring(report.svg([])) is not None


# ---------------------------------------------------------------------- what the SAEs are compared at


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_threshold_gives_the_wanted_l0(k):
    pre_TM = torch.randn(300, 40, generator=torch.Generator().manual_seed(k)) + 0.3
    pre_TM[0] += 5  # one token with nearly all of its latents above everything else
    cut = match.threshold_at(list(pre_TM.split(100)), k)
    assert int((pre_TM >= cut).sum()) == k * 300


def test_a_threshold_is_never_below_zero():
    assert match.threshold_at([torch.randn(50, 4, generator=torch.Generator().manual_seed(0))], 4) == 0.0


def test_contexts_are_counted_once_for_each_latent():
    active_TM = torch.tensor([[1, 0], [1, 1], [0, 0], [1, 0]], dtype=torch.bool)
    counts = match.counted(active_TM, torch.tensor([0, 0, 1, 2]))
    assert counts.tolist() == [2, 1]


def test_the_share_of_tokens_on_which_latents_are_active_is_over_all_blocks():
    acts_TD = torch.tensor([[0.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
    blocks = [SimpleNamespace(acts_TD=lambda dtype, hook, x_TD=x_TD: x_TD) for x_TD in (acts_TD, acts_TD[:1])]
    found = match.active_shares(SimpleNamespace(encode=lambda x_TD: x_TD), [0, 1], blocks, "h")
    assert found == {0: pytest.approx(1 / 3), 1: 1.0}


def test_what_became_narrower_is_said_as_a_median_over_taught_latents():
    # Read from a file, keys are strings.
    core = {
        "continued": {"active_share": {"1": 0.2, "2": 0.1, "3": 0.4, "4": 0.0}},
        "rlaif": {"active_share": {1: 0.1, 2: 0.04, 3: 0.36, 4: 0.1}},
        "shuffled": {},  # measured before there was such a thing
        "matryoshka": {"active_share": {"1": 0.5}},
    }
    lines = report.narrowed(core, [1, 2, 3, 4], ["matryoshka"])
    assert lines == ["rlaif: active on 0.50 of continued's tokens, n 3"]


def test_arms_differ_from_the_first_in_nothing_but_their_own_keys():
    place, texts = configs.Place(), ("positives", "near_misses", "siblings", "randoms")
    first = configs.arm_config("rlaif", configs.SMOKE, place)
    for name, keys in configs.arms(configs.SMOKE).items():
        config = configs.arm_config(name, configs.SMOKE, place)
        changed = {key for key, value in config["rlaif"].items() if value != first["rlaif"].get(key)}
        assert changed - {"control"} == set(keys)
        assert {key for key in config if config[key] != first[key]} <= {"name", "rlaif", "saes"}
        assert sum(config["rlaif"][key] for key in texts) == sum(first["rlaif"][key] for key in texts)


@pytest.mark.parametrize("sizes", [configs.FULL, configs.SMOKE])
def test_every_config_of_the_benchmark_is_one_that_a_run_accepts(sizes):
    place = configs.Place(store="there")
    base = parse_config(configs.base_config(sizes, configs.Place()), "base")
    assert list(base.specs()) == ["main", "matryoshka"]
    made = [configs.store_config(sizes, place), configs.scoring_config("scores", sizes, place, ["detection"])]
    made += [configs.arm_config(name, sizes, place) for name in sizes.arms]
    store, scoring, *arms = (parse_config(config, "made") for config in made)
    assert (store.activations.store, scoring.activations.store) == (None, "there")
    assert scoring.judging.split == "heldout"
    for arm in arms:
        assert stream_settings(arm) == stream_settings(store) == stream_settings(scoring)
        assert arm.total_steps <= store.total_steps
        assert (arm.trainer.steps, arm.rlaif.max_staleness_steps) == (0, 0)
    assert scoring.total_steps <= store.total_steps
    assert scoring.judging.blocks <= store.evaluation.blocks


def test_stages_are_skipped_where_their_results_are(tmp_path):
    made = bench.Bench(tmp_path, configs.SMOKE, ["shuffled"], print)
    names = [stage.name for stage in made.left()]
    assert names[:6] == ["base", "store", "rlaif", "shuffled", "same L0", "core metrics"]
    saes = ("continued", "rlaif", "shuffled", "matryoshka")
    assert names[6:] == [*(f"scores of {name}" for name in saes), "all texts"]
    for stage in made.left()[:3]:
        stage.done.parent.mkdir(parents=True, exist_ok=True)
        stage.done.touch()
    assert [stage.name for stage in made.left()] == names[3:]
    assert made.scores() == {}
    assert len(bench.Bench(tmp_path / "full", configs.FULL, configs.FULL.arms, print).judgings) == 2


def test_an_arm_that_is_added_later_begins_anew_what_is_about_all_of_them(tmp_path):
    made = bench.Bench(tmp_path, configs.SMOKE, ["shuffled"], print)
    for stage in made.left():
        stage.done.parent.mkdir(parents=True, exist_ok=True)
        stage.done.write_text(json.dumps(dict.fromkeys(made.saes)))
    assert made.left() == []
    more = bench.Bench(tmp_path, configs.SMOKE, ["shuffled", "own_cuts"], print)
    left = [stage.name for stage in more.left()]
    assert left == ["own_cuts", "same L0", "core metrics", "scores of own_cuts", "all texts"]


def test_a_folder_of_another_size_is_refused(tmp_path):
    bench.Bench(tmp_path, configs.SMOKE, ["shuffled"], print)
    with pytest.raises(SystemExit, match=r"sizes.json: layer was 2 and is 9 now; use another --out"):
        bench.Bench(tmp_path, configs.FULL, ["shuffled"], print)
    bench.Bench(tmp_path, configs.SMOKE, ["own_cuts"], print)


def test_all_texts_are_asked_about_but_those_that_made_the_explanation():
    texts = load("rlaif_real_texts")
    rng = np.random.default_rng(0)
    tokens_SL = rng.integers(0, 50, size=(40, 8)).astype(np.int32)
    seq_T, pos_T = (each.ravel() for each in np.indices(tokens_SL.shape))
    acts_TD = torch.randn(320, 3, generator=torch.Generator().manual_seed(0))
    block = SimpleNamespace(tokens_SL=tokens_SL, seq_T=seq_T, pos_T=pos_T, acts_TD=lambda dtype, hook: acts_TD)
    config = SimpleNamespace(judge=SimpleNamespace(context_tokens=4), hook=SimpleNamespace(name="h"))
    sae = SimpleNamespace(encode=lambda x_TD: torch.relu(x_TD - 1.5))
    active_C = (acts_TD[:, 1].reshape(80, 4) > 1.5).any(1).numpy()
    kept = np.arange(0, 80, 2)
    vector_CE = np.stack([active_C[kept] * 1.0 + rng.normal(size=40), np.zeros(40)], axis=1)
    model = SimpleNamespace(embed_now=lambda phrases: np.array([[1.0, 0.0]] * len(phrases)))
    found = texts.detections(sae, {1: "x"}, [block], texts.Texts(kept, vector_CE), config, model)
    pairs = [(a, b) for a in vector_CE[active_C[kept], 0] for b in vector_CE[~active_C[kept], 0]]
    assert found[1] == pytest.approx(np.mean([a > b for a, b in pairs]))
    assert texts.detections(sae, {1: "x"}, [block], texts.Texts(kept[:6], vector_CE[:6]), config, model)[1] is None


def test_with_labels_the_embedding_tells_what_it_holds_and_no_more():
    texts = load("rlaif_real_texts")
    rng = np.random.default_rng(0)
    tokens_SL = rng.integers(0, 50, size=(400, 8)).astype(np.int32)
    seq_T, pos_T = (each.ravel() for each in np.indices(tokens_SL.shape))
    config = SimpleNamespace(judge=SimpleNamespace(context_tokens=4), hook=SimpleNamespace(name="h"))
    sae = SimpleNamespace(encode=lambda x_TD: torch.relu(x_TD - 1.5))

    def half(seed: int) -> tuple[list, object]:
        acts_TD = torch.randn(3200, 3, generator=torch.Generator().manual_seed(seed))
        block = SimpleNamespace(tokens_SL=tokens_SL, seq_T=seq_T, pos_T=pos_T, acts_TD=lambda dtype, hook: acts_TD)
        active_C = (acts_TD[:, 1].reshape(800, 4) > 1.5).any(1).numpy()
        # Latent 1 is written along an axis of small variance, beside a large one that says nothing.
        vector_CE = np.stack([active_C + 0.3 * rng.normal(size=800), 10 * rng.normal(size=800)], axis=1)
        return [block], texts.Texts(np.arange(800), vector_CE)

    found = texts.ceilings(sae, [1, 2], half(1), half(2), config)
    assert found[1] > 0.95
    assert found[2] == pytest.approx(0.5, abs=0.07)
    rare = SimpleNamespace(encode=lambda x_TD: torch.relu(x_TD - 4))
    assert texts.ceilings(rare, [1], half(1), half(2), config) == {1: None}
