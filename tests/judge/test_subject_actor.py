"""What the subject says in padded batches is what a plain forward pass says of each text alone."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sae_ray.activations.subject import load_full_model, load_tokenizer
from sae_ray.config import ModelConfig, RunConfig
from sae_ray.errors import UserError
from sae_ray.evidence.baselines import NeuronSource
from sae_ray.judge.subject_actor import RemoteSubject, SubjectModel
from sae_ray.sae.formats import Provenance, export_sae
from sae_ray.sae.inference import TrainedSAE

LAYER, D, M = 1, 576, 40
CONTEXT = 16
TEXTS = [
    "The cat slept.",
    "A list of files is opened, read line by line and closed again before the function returns what it found there.",
    "",
    "def main(): <|im_end|> return 3",
]
SEPARATOR = "<|endoftext|>"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(**changes) -> RunConfig:
    raw = {
        "name": "subject",
        "model": {"dtype": "float32"},
        "hook": {"layer": LAYER},
        "corpus": {"context_length": CONTEXT},
        "judge": {"context_tokens": 8},
    }
    return RunConfig.model_validate({**raw, **changes})


@pytest.fixture(scope="module")
def sae() -> TrainedSAE:
    generator = torch.Generator().manual_seed(0)
    W_MD = torch.randn(M, D, generator=generator) / D**0.5
    return TrainedSAE(
        W_MD, W_MD, torch.zeros(M), torch.randn(D, generator=generator), torch.full((M,), 0.2), "jumprelu", 0
    )


@pytest.fixture(scope="module")
def subject(sae) -> SubjectModel:
    return SubjectModel(config().model_dump_json(), sae, "cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelConfig())


@pytest.fixture(scope="module")
def model():
    return load_full_model(ModelConfig(), torch.float32, "cpu")


def raw_of(model, ids: list[int]) -> torch.Tensor:
    """Residual stream behind the layer, of one sequence alone."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER + 1][0]


def ids_of(tokenizer, text: str, room: int) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids[:room]


def test_activations_are_the_saes_on_each_text_alone(subject, sae, tokenizer, model):
    latents = [5, 0, 33]
    found = asyncio.run(subject.activations(TEXTS, latents))
    opening = tokenizer.convert_tokens_to_ids(SEPARATOR)
    for acts_TN, text in zip(found, TEXTS, strict=True):
        ids = ids_of(tokenizer, text, CONTEXT - 1)
        assert acts_TN.dtype == np.float32
        assert acts_TN.shape == (len(ids), 3)
        if ids:
            expected_TM = sae.encode(raw_of(model, [opening, *ids])[1:])
            np.testing.assert_allclose(acts_TN, expected_TM[:, latents].numpy(), atol=1e-4)
    assert (found[0] > 0).any()
    assert len(ids_of(tokenizer, TEXTS[1], 999)) > CONTEXT - 1 == len(found[1])


def test_a_control_token_that_a_text_quotes_is_only_text(subject, tokenizer):
    (acts_TN,) = asyncio.run(subject.activations(["<|im_end|>"], [0]))
    assert len(acts_TN) == len(ids_of(tokenizer, "<|im_end|>", 99)) > 1


def test_positions_that_training_masks_are_inactive(sae, model, tokenizer):
    """Unpacked documents open a sequence themselves; their first tokens are the masked ones."""
    masked = config(
        corpus={"context_length": CONTEXT, "pack": False}, activations={"mask_first_tokens": 2}
    ).model_dump_json()
    always = TrainedSAE(sae.W_enc_MD, sae.W_dec_MD, sae.b_enc_M + 100, sae.b_dec_D, sae.threshold, "jumprelu", 0)
    (acts_TN,) = asyncio.run(SubjectModel(masked, always, "cpu").activations(TEXTS[:1], [7]))
    raw_TD = raw_of(model, ids_of(tokenizer, TEXTS[0], CONTEXT))
    assert len(acts_TN) == len(raw_TD)
    assert (acts_TN[:2] == 0).all()
    np.testing.assert_allclose(acts_TN[2:, 0], always.encode(raw_TD)[2:, 7].numpy(), rtol=1e-4)
    assert (acts_TN[2:] > 0).all()


def test_an_sae_comes_from_a_folder_too(subject, sae, tmp_path):
    export_sae(sae, tmp_path / "sae", "saelens", Provenance("smollm2-135m-instruct", config().hook.name, CONTEXT))
    other = SubjectModel(config().model_dump_json(), tmp_path / "sae", "cpu")
    assert other.ready() == {"width": D, "dtype": "float32"}
    for ours, theirs in zip(*(asyncio.run(s.activations(TEXTS, [1, 2])) for s in (subject, other)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_neurons_can_be_judged_in_the_saes_place(model, tokenizer):
    source = NeuronSource([12, 400], "abs", [0.3, 0.3]).calibrate(torch.randn(999, D))
    (acts_TN,) = asyncio.run(SubjectModel(config().model_dump_json(), source, "cpu").activations(TEXTS[:1], [400]))
    raw_TD = raw_of(model, [tokenizer.convert_tokens_to_ids(SEPARATOR), *ids_of(tokenizer, TEXTS[0], 99)])[1:]
    value_T = raw_TD[:, 400].abs()
    expected_T = torch.where(value_T > source.threshold_N[1], value_T, 0)
    np.testing.assert_allclose(acts_TN[:, 0], expected_T.numpy(), atol=1e-4)


def test_an_sae_of_another_width_is_refused(sae):
    small = TrainedSAE(
        sae.W_enc_MD[:, :9], sae.W_dec_MD[:, :9], sae.b_enc_M, sae.b_dec_D[:9], sae.threshold, "jumprelu", 0
    )
    with pytest.raises(UserError, match=r"^the SAE reads 9 numbers, blocks\.1\.hook_resid_post .* gives 576;"):
        SubjectModel(config().model_dump_json(), small, "cpu").ready()


def test_losses_are_those_of_each_text_alone_behind_its_prefix(subject, tokenizer, model):
    prefixes = ["", "Topic: animals at rest\n", "A", ""]
    found = asyncio.run(subject.losses(prefixes, TEXTS))
    opening = tokenizer.convert_tokens_to_ids(SEPARATOR)
    assert math.isnan(found[2])  # no token to predict: missing, not 0
    for index in (0, 1, 3):
        ids = ids_of(tokenizer, TEXTS[index], CONTEXT)
        before = [opening, *ids_of(tokenizer, prefixes[index], 99)]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([before + ids])).logits[0].double().log_softmax(-1)
        terms = [-float(logits[len(before) + k - 1, token]) for k, token in enumerate(ids)]
        assert found[index] == pytest.approx(sum(terms) / len(terms), abs=1e-4)


def test_what_else_is_asked_and_how_it_is_batched_change_no_loss(subject, monkeypatch):
    texts = [TEXTS[1], "A cat.", TEXTS[0], "", TEXTS[3]]
    together = asyncio.run(subject.losses([""] * 5, texts))
    monkeypatch.setattr("sae_ray.judge.subject_actor._LOSS_TOKENS", 16)
    apart = asyncio.run(subject.losses([""] * 5, texts))
    np.testing.assert_allclose(apart, together, atol=1e-4)
    assert asyncio.run(subject.losses([], [])) == []


def test_a_prefix_that_tells_the_topic_lowers_the_loss(subject):
    text = "Simmer the onions in butter, then add the stock, the carrots and a pinch of salt."
    with_topic, without, wrong = asyncio.run(
        subject.losses(["Topic: cooking recipes\nText:\n", "Text:\n", "Topic: tax law\nText:\n"], [text] * 3)
    )
    assert with_topic < min(without, wrong) - 0.05


def test_a_remote_subject_passes_plain_values_on():
    class Method:
        async def remote(self, *args):
            return args

    class Handle:
        activations = losses = Method()

    remote = RemoteSubject(Handle())
    assert asyncio.run(remote.activations(("a",), np.array([3]))) == (["a"], [3])
    assert asyncio.run(remote.losses(("",), ("b",))) == ([""], ["b"])
