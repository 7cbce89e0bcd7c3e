import pytest

from sae_ray.config_file import load_config
from sae_ray.errors import UserError

MINIMAL = "name: a\nhook: {layer: 3}\n"


@pytest.fixture
def write(tmp_path):
    def _write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return _write


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MINIMAL + "sae: {d_saee: 64}", ["sae.d_saee", "unknown key", "did you mean 'd_sae'", "aux_coef"]),
        (MINIMAL + "sae: {k: -1}", ["sae.k = -1", "greater than 0"]),
        (MINIMAL + "sae: {d_sae: 8, k: 9}", ["sae.k 9 is larger than sae.d_sae 8"]),
        (MINIMAL + "sae: {d_sae: 4609}", ["sae.d_sae 4609 is not divisible by trainer.tp 2", "4608 or 4610"]),
        (MINIMAL + "ray: {address: here}", ["ray.address = 'here'", "ray://HOST:PORT"]),
        (MINIMAL + "model: {dtype: int4}", ["model.dtype = 'int4'", "bfloat16"]),
        (MINIMAL + "corpus: {kind: jsonl}", ["corpus.kind jsonl needs corpus.paths"]),
        (MINIMAL + "corpus: {context_length: 100}", ["context_length 100 is not a multiple"]),
        (MINIMAL + "activations: {window_blocks: 4}", ["window_blocks 4 must be at least twice mix_blocks"]),
        (
            MINIMAL + "sae: {architecture: jumprelu}\nrlaif: {gate_threshold: fitted}",
            ["gate_threshold fitted", "not for sae.architecture jumprelu", "moving would be right"],
        ),
        (MINIMAL + "judge: {autoscaling: {min_replicas: 3}}", ["min_replicas 3 <= initial_replicas"]),
        (MINIMAL + "activations: {producers: 0}", ["activations.producers = 0: expected a number above 0"]),
        (MINIMAL + "activations: {producers: {min: 3, max: 2}}", ["activations.producers: expected", "min <= max"]),
        (MINIMAL + "activations: {producers: {most: 2}}", ["activations.producers: expected"]),
        (MINIMAL + "trainer: {resources: {GPU: 1}}", ["trainer.resources.GPU", "set gpus beside it"]),
        (MINIMAL + "trainer: {label_selector: {role: a b}}", ["trainer.label_selector.role = 'a b'", "!in(a, b)"]),
        ("hook: {layer: 3}", ["name: is required"]),
        ("name: ../x\nhook: {layer: 3}", ["name = '../x'", "letters, digits"]),
        (
            MINIMAL + "rlaif: {rewards: {weights: {clarity: 1}}}",
            ["rlaif.rewards.weights.clarity: unknown key", "causality"],
        ),
        (MINIMAL + "rlaif: {rewards: {weights: {splitting: -1}}}", ["rlaif.rewards.weights.splitting = -1"]),
        (MINIMAL + "rlaif: {rewards: {weights: {interpretability: 0}}}", ["rlaif.rewards.weights: every weight is 0"]),
        (
            MINIMAL + "rlaif: {rewards: {weights: {causality: 1}}}",
            ["rlaif.rewards.weights.causality", "teacher_gate follows verdicts", "that use it: selection_bonus"],
        ),
        (
            MINIMAL + "rlaif: {estimator: policy_gradient}",
            ["rlaif.estimator policy_gradient", "give rlaif.rewards.weights.causality a weight"],
        ),
        (
            MINIMAL
            + "rlaif: {estimator: teacher_gate+policy_gradient, rewards: {weights: {causality: 1, splitting: 1}}}",
            ["rlaif.rewards.weights.splitting", "measured for nothing"],
        ),
        (
            MINIMAL + "rlaif: {rollout_gamma: .1}",
            ["rlaif.rollout_gamma 0.1", "teacher_gate uses no rollouts", "that do: policy_gradient"],
        ),
        (
            MINIMAL + "rlaif: {estimator: selection_bonus, rewards: {weights: {atomicity: 1}, atomicity: {atoms: 3}}}",
            ["rlaif.rewards.atomicity: per_code 4 <= atoms 3 <= sae.d_sae 4608"],
        ),
        (MINIMAL + "rlaif: {rewards: {memory: 1}}", ["rlaif.rewards.memory = 1", "less than 1"]),
        (
            MINIMAL + "rlaif: {alarms: {limits: {boredom: {cool: 1, stop: 2}}}}",
            ["rlaif.alarms.limits.boredom: no such alarm; known: held_out_gap"],
        ),
        (
            MINIMAL + "rlaif: {alarms: {limits: {rarity: {cool: 2, stop: 1}}}}",
            ["rlaif.alarms.limits.rarity: cool 2.0 must be below stop 1.0"],
        ),
        (
            MINIMAL + "rlaif: {alarms: {limits: {rarity: {coool: 1, stop: 2}}}}",
            ["rlaif.alarms.limits.rarity.coool: unknown key", "did you mean 'cool'"],
        ),
        ("runs_dir: s3://bucket/runs\n" + MINIMAL, ["runs_dir = 's3://bucket/runs'", "trainer.checkpoint_dir"]),
        ("runs_dir: file:///runs\n" + MINIMAL, ["runs_dir = 'file:///runs': expected a folder"]),
        (MINIMAL + "trainer: {checkpoint_dir: gs://bucket/ck}", ["checkpoint_dir = 'gs://bucket/ck'", "s3://bucket"]),
        (MINIMAL + "trainer: {checkpoint_dir: 's3:/bucket/ck'}", ["checkpoint_dir = 's3:/bucket/ck'", "s3://bucket"]),
        (MINIMAL + "activations: {store: 'S3://bucket/acts'}", ["activations.store = 'S3://bucket/acts'"]),
        (MINIMAL + "sae: {init_from: 's3://bucket/sae'}", ["sae.init_from = 's3://bucket/sae'", "not an address"]),
        (MINIMAL + "rlaif: {replay_rewards: hf://x/run}", ["rlaif.replay_rewards = 'hf://x/run'"]),
        (MINIMAL + "saes: [{name: b, sae: {init_from: gs://b/c}}]", ["saes[0].sae.init_from = 'gs://b/c'"]),
        ("runs_dir: ~no.such.user/runs\n" + MINIMAL, ["runs_dir = '~no.such.user/runs': there is no home folder"]),
        (MINIMAL + "rlaif: {alarms: {held_out: true}}", ["rlaif.alarms.held_out", "configure judges.heldout"]),
        ("name: [", ["is not YAML"]),
        ("- 1", ["expected a mapping"]),
    ],
)
def test_a_bad_config_is_one_line_that_names_file_key_value_and_what_is_allowed(write, text, said):
    path = write(text)
    with pytest.raises(UserError) as error:
        load_config(path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    for part in said:
        assert part in message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml: cannot be read"):
        load_config(tmp_path / "absent.yaml")


def test_overrides_are_parsed_as_yaml_and_checked_like_the_file(write):
    path = write(MINIMAL)
    run = load_config(path, ["sae.k=16", "rlaif.enabled=false", "ray.address=auto"])
    assert (run.sae.k, run.rlaif.enabled, run.ray.address) == (16, False, "auto")
    with pytest.raises(UserError, match="unknown key"):
        load_config(path, ["sae.kk=16"])
    with pytest.raises(UserError, match=r"expected section\.key=value"):
        load_config(path, ["sae.k"])


def test_the_resolved_config_reads_back_as_the_same_run(write, tmp_path):
    run = load_config(write(MINIMAL + "sae: {k: 7}"))
    again = tmp_path / "resolved.yaml"
    again.write_text(run.to_yaml())
    assert load_config(again) == run


def test_producers_are_a_number_or_a_range_and_come_back_as_they_were(write):
    for text, least, most in (("3", 3, 3), ("{max: 8}", 1, 8), ("{min: 2, max: 4}", 2, 4)):
        config = load_config(write(MINIMAL + f"activations: {{producers: {text}}}"))
        assert (config.activations.least_producers, config.activations.most_producers) == (least, most)
        again = load_config(write(config.to_yaml()))
        assert again.activations == config.activations


def test_the_home_folder_is_meant_by_a_tilde_and_stands_in_the_resolved_config(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = "runs_dir: ~/runs\n" + MINIMAL + "sae: {init_from: ~/sae}\nactivations: {store: ~/acts}\n"
    text += "trainer: {checkpoint_dir: ~/ck}\nrlaif: {replay_rewards: ~/taught}\n"
    config = load_config(write(text + "saes: [{name: b, sae: {init_from: ~/other}}]"))
    assert str(config.run_dir) == "/home/me/runs/a"
    found = (config.trainer.checkpoint_dir, config.activations.store, config.rlaif.replay_rewards)
    assert found == ("/home/me/ck", "/home/me/acts", "/home/me/taught")
    assert [spec.sae.init_from for spec in config.specs().values()] == ["/home/me/sae", "/home/me/other"]
    monkeypatch.setenv("HOME", "/home/somebody")
    again = load_config(write(config.to_yaml()))
    assert (again.runs_dir, again.sae.init_from) == ("/home/me/runs", "/home/me/sae")


def test_places_that_are_paths_or_on_s3_stay_as_they_are_written(write):
    text = "runs_dir: ./x:/runs\n" + MINIMAL + "trainer: {checkpoint_dir: s3://bucket/ck@home}"
    config = load_config(write(text))
    assert (config.runs_dir, config.trainer.checkpoint_dir) == ("./x:/runs", "s3://bucket/ck@home")
