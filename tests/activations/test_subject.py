"""The truncated model gives what the whole model gives, and builds nothing more."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPTNeoXConfig, LlamaConfig

from sae_ray.activations.hooks import layers_of
from sae_ray.activations.subject import SubjectLM, check_hooks, load_full_model
from sae_ray.config import HookConfig, ModelConfig
from sae_ray.embedded import resolve_model
from sae_ray.errors import UserError

N_LAYERS, D = 4, 32


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_neox"])
def folder(request, tmp_path_factory):
    """A tiny random model of each family, saved as a Hugging Face folder."""
    torch.manual_seed(0)
    size = {"vocab_size": 97, "hidden_size": D, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4}
    config = {
        "llama": lambda: LlamaConfig(**size, intermediate_size=48),
        "gpt2": lambda: GPT2Config(vocab_size=97, n_embd=D, n_layer=N_LAYERS, n_head=4),
        "gpt_neox": lambda: GPTNeoXConfig(**size, intermediate_size=48),
    }[request.param]()
    path = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.fixture
def model(folder) -> ModelConfig:
    return ModelConfig(name=str(folder), dtype="float32")


TOKENS_SL = torch.arange(24).reshape(2, 12)


def hidden_states(model: ModelConfig) -> tuple:
    full = load_full_model(model, torch.float32, "cpu")
    with torch.inference_mode():
        return full(input_ids=TOKENS_SL, output_hidden_states=True).hidden_states


def acts(model: ModelConfig, layer: int, site: str) -> torch.Tensor:
    return several(model, HookConfig(layer=layer, site=site))[0]


def several(model: ModelConfig, *hooks: HookConfig) -> list[torch.Tensor]:
    """What one forward pass gives at each of `hooks`."""
    found = SubjectLM(model, hooks, "cpu").forward(TOKENS_SL)
    assert list(found) == [hook.name for hook in hooks]
    return list(found.values())


@pytest.mark.parametrize("layer", [0, 2])
def test_residuals_equal_the_whole_models_hidden_states(model, layer):
    expected = hidden_states(model)
    torch.testing.assert_close(acts(model, layer, "resid_post"), expected[layer + 1])
    torch.testing.assert_close(acts(model, layer, "resid_pre"), expected[layer])


def test_the_last_layer_comes_without_the_final_norm(model):
    last = acts(model, N_LAYERS - 1, "resid_post")
    assert not torch.allclose(last, hidden_states(model)[-1], atol=1e-3)  # transformers' last one is normed


def test_attention_and_mlp_outputs_add_up_to_the_layers_output(model):
    before, after = acts(model, 2, "resid_pre"), acts(model, 2, "resid_post")
    parts = acts(model, 2, "attn_out") + acts(model, 2, "mlp_out")
    torch.testing.assert_close(before + parts, after, atol=1e-5, rtol=1e-4)


def test_the_mlp_reads_the_normed_stream_between_attention_and_mlp(model):
    point = HookConfig(layer=2, site="mlp_in")
    (mlp_in,) = several(model, point)
    full = load_full_model(model, torch.float32, "cpu")
    layer = layers_of(full)[2]
    with torch.inference_mode():
        torch.testing.assert_close(layer.mlp(mlp_in), acts(model, 2, "mlp_out"))
    middle = HookConfig(layer=2, site="resid_mid")
    if getattr(layer, "use_parallel_residual", False):
        with pytest.raises(
            UserError, match=r"^hook\.site = resid_mid: GPTNeoXLayer runs attention and MLP side by side"
        ):
            several(model, middle)
        return
    norm = getattr(layer, "post_attention_layernorm", None) or layer.ln_2
    (resid_mid,) = several(model, middle)
    with torch.inference_mode():
        torch.testing.assert_close(norm(resid_mid), mlp_in)
    torch.testing.assert_close(acts(model, 2, "resid_pre") + acts(model, 2, "attn_out"), resid_mid)
    torch.testing.assert_close(resid_mid + acts(model, 2, "mlp_out"), acts(model, 2, "resid_post"))


def test_several_points_come_from_one_pass_with_the_bits_of_passes_of_their_own(model):
    hooks = [
        HookConfig(layer=2, site="mlp_out"),
        HookConfig(layer=0),
        HookConfig(layer=1, site="resid_pre"),  # the same module's output as the one before
        HookConfig(layer=2, site="mlp_in"),
        HookConfig(layer=0, site="resid_pre"),
        HookConfig(layer=1, site="attn_out"),
    ]
    together = several(model, *hooks)
    for hook, found in zip(hooks, together, strict=True):
        assert torch.equal(found, several(model, hook)[0]), hook.name


def test_a_pass_is_cut_behind_the_last_of_several_points(model):
    subject = SubjectLM(model, [HookConfig(layer=2), HookConfig(layer=0)], "cpu")
    assert subject.layers_built == 3
    calls = []
    layers_of(subject._model)[2].register_forward_hook(lambda *_: calls.append("layer"))
    norm = next(m for n, m in subject._model.named_children() if "norm" in n or n == "ln_f")
    norm.register_forward_hook(lambda *_: calls.append("norm"))
    subject.forward(TOKENS_SL)
    assert "norm" not in calls


def test_later_layers_and_the_head_do_not_exist(model):
    subject = SubjectLM(model, [HookConfig(layer=1)], "cpu")
    assert len(layers_of(subject._model)) == subject.layers_built == 2
    assert subject.n_layers == N_LAYERS
    assert subject.widths == {"blocks.1.hook_resid_post": D}
    assert subject._model.get_output_embeddings() is None


def test_padding_on_the_right_changes_no_real_position(model):
    subject = SubjectLM(model, [HookConfig(layer=2)], "cpu")
    padded = TOKENS_SL.clone()
    padded[0, 7:] = -1
    name = "blocks.2.hook_resid_post"
    torch.testing.assert_close(subject.forward(padded)[name][0, :7], subject.forward(TOKENS_SL)[name][0, :7])


def test_a_layer_that_does_not_exist_says_how_many_there_are(model):
    with pytest.raises(UserError, match=r"^hook\.layer = 4: .* has 4 layers \(0 to 3\)$"):
        check_hooks(model, [HookConfig(layer=1), HookConfig(layer=4)])
    with pytest.raises(UserError, match=r"^hook\.layer = 40: smollm2-135m-instruct has 30 layers \(0 to 29\)$"):
        SubjectLM(ModelConfig(), [HookConfig(layer=40)])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/model", "no such folder"),
        ("./nowhere", "no such folder"),
        ("somebody/absent-model", "not in the Hugging Face cache"),
    ],
)
def test_a_missing_model_is_named(name, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    with pytest.raises(UserError, match=rf"^model\.name = {name}: .*{message}"):
        check_hooks(ModelConfig(name=name), [HookConfig(layer=0)])


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"model\.name = .*: the folder has no config\.json"):
        check_hooks(ModelConfig(name=str(tmp_path)), [HookConfig(layer=0)])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"model\.name = .*: cannot be loaded"):
        check_hooks(ModelConfig(name=str(tmp_path)), [HookConfig(layer=0)])


def test_loading_a_truncated_model_prints_nothing():
    code = (
        "from sae_ray.activations.subject import SubjectLM; from sae_ray.config import *;"
        "SubjectLM(ModelConfig(), [HookConfig(layer=0)], 'cpu')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_the_embedded_model_reads_and_writes_english():
    folder = resolve_model("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert tokenizer.tokenize("x  2024") == ["x", "ĠĠ", "2", "0", "2", "4"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**chat, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(ids[0, chat["input_ids"].shape[1] :])
