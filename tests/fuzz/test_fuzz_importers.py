"""Whatever an SAE's files hold, importing them gives an SAE of finite numbers or one UserError, and runs no code."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import JSON, tries
from hypothesis import given
from hypothesis import strategies as st
from small_saes import D, K, M, raw_activations, small_sae

from sae_ray.errors import UserError, printable
from sae_ray.judging.target import digest_of
from sae_ray.sae.formats import Provenance, export_sae, read_sae

FORMATS = {
    "saelens": ("cfg.json", "sae_weights.safetensors"),
    "sparsify": ("cfg.json", "sae.safetensors"),
    "dictionary_learning": ("config.json", "ae.pt"),
    "gemma_scope": ("sae_ray.json", "params.npz"),
}
ARCHITECTURES = {
    "saelens": ("topk", "jumprelu", "gated", "batchtopk", "relu_l1"),
    "sparsify": ("topk",),
    "dictionary_learning": ("topk", "batchtopk", "matryoshka", "jumprelu", "gated"),
    "gemma_scope": ("jumprelu",),
}
KINDS = [(format, architecture) for format, known in ARCHITECTURES.items() for architecture in known]
# What SAELens's own files say beside what ours do.
THEIRS = [
    *("k", "activation_fn", "activation_fn_str", "activation_fn_kwargs", "normalize_activations", "hook_name"),
    *("rescale_acts_by_decoder_norm", "architecture", "metadata", "apply_b_dec_to_input", "d_out", "d_in", "d_sae"),
    *("training_architecture", "training_architecture_details", "sae_ray", "trainer", "dict_class", "buffer", "layer"),
]
VALUES = st.one_of(
    JSON,
    st.sampled_from(["topk", "batchtopk", "jumprelu", "standard", "matryoshka_batchtopk", "MatryoshkaBatchTopKSAE"]),
    st.fixed_dictionaries({"k": JSON}),
)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[tuple[str, str], dict[str, bytes]]:
    home = tmp_path_factory.mktemp("good")
    made = {}
    for format, architecture in KINDS:
        folder = home / f"{format}-{architecture}"
        export_sae(small_sae(architecture), folder, format, Provenance("m", "blocks.1.x"))
        made[format, architecture] = {file.name: file.read_bytes() for file in folder.iterdir()}
    return made


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("room")


def outcome(good: dict, room: Path, kind: tuple[str, str], change: Any) -> bool:
    """Whether an SAE came of a copy of a good folder after `change(folder)`."""
    folder = room / kind[0]
    folder.mkdir(exist_ok=True)
    for name, data in good[kind].items():
        (folder / name).write_bytes(data)
    change(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = read_sae(folder, kind[0])
    except UserError as error:
        said = str(error)
    else:
        sae = found.sae
        for tensor in (sae.W_enc_MD, sae.W_dec_MD, sae.b_enc_M, sae.b_dec_D, sae.threshold, *sae.own.values()):
            assert tensor.dtype == torch.float32
        assert sae.k >= 0
        assert len(digest_of(sae)) == 64
        assert printable(str(found)).isprintable()
        return True
    assert str(folder) in said
    assert len(said) < 100_000
    return False


@tries(0.12)
@given(
    kind=st.sampled_from(KINDS),
    which=st.integers(0, 1),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), st.binary(max_size=12)), min_size=1, max_size=4),
    near_start=st.booleans(),
)
def test_any_bytes_of_a_file_are_an_sae_or_one_error(good, room, kind, which, edits, near_start):
    def change(folder: Path) -> None:
        file = folder / FORMATS[kind[0]][which]
        data = bytearray(file.read_bytes())
        for place, removed, added in edits:
            # Headers and directories stand at the ends; the middle is numbers.
            at = int(place**3 * len(data)) if near_start else len(data) - int(place**3 * len(data))
            data[at : at + removed] = added
        file.write_bytes(bytes(data))

    outcome(good, room, kind, change)


def _with(config: Any, path: list[int], key: str | None, value: Any) -> None:
    """Sets an entry of a nested dict, found by numbers, or a new `key` of it."""
    while True:
        inner = [each for each in config.values() if isinstance(each, dict) and each]
        if not path or not inner:
            break
        config = inner[path.pop(0) % len(inner)]
    keys = sorted(config)
    config[key if key is not None or not keys else keys[len(path) % len(keys)]] = value


@tries(0.10)
@given(
    kind=st.sampled_from(KINDS),
    changes=st.lists(
        st.tuples(st.lists(st.integers(0, 9), max_size=4), st.one_of(st.none(), st.sampled_from(THEIRS)), VALUES),
        min_size=1,
        max_size=4,
    ),
)
def test_any_value_of_a_config_is_an_sae_or_one_error(good, room, kind, changes):
    def change(folder: Path) -> None:
        file = folder / FORMATS[kind[0]][0]
        config = json.loads(file.read_text())
        for path, key, value in changes:
            if config:
                _with(config, list(path), key, value)
        file.write_text(json.dumps(config))

    outcome(good, room, kind, change)


DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "U64",
    "C64",
    "",
    "X",
]


@tries(0.07)
@given(
    kind=st.sampled_from([kind for kind in KINDS if kind[0] in ("saelens", "sparsify")]),
    changes=st.lists(
        st.tuples(
            st.integers(0, 9),
            st.sampled_from(["dtype", "shape", "data_offsets", "name", "gone", "metadata"]),
            st.one_of(
                st.sampled_from(DTYPES),
                st.lists(st.integers(-1, 2**40), max_size=3),
                st.sampled_from([[D, M], [M, D]]),
                JSON,
            ),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_any_header_of_a_safetensors_file_is_an_sae_or_one_error(good, room, kind, changes):
    def change(folder: Path) -> None:
        file = folder / FORMATS[kind[0]][1]
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        for number, what, value in changes:
            names = sorted(header)
            if not names:
                continue
            name = names[number % len(names)]
            if what == "gone":
                del header[name]
            elif what == "name":
                header[str(value)] = header.pop(name)
            elif what == "metadata":
                header["__metadata__"] = value
            elif isinstance(header[name], dict):
                header[name][what] = value
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    outcome(good, room, kind, change)


SHAPES = st.one_of(
    st.lists(st.integers(0, 50), max_size=3), st.sampled_from([[D, M], [M, D], [M], [D], [2**30, 2**30]])
)


@tries(0.06)
@given(
    entries=st.lists(
        st.tuples(
            st.sampled_from(["W_enc", "w_enc", "W_dec", "b_enc", "b_dec", "threshold", "x", "../../x", ""]),
            st.sampled_from(
                ["<f4", "<f8", "<f2", ">f4", "<i8", "|O", "|b1", "<U3", "<c8", "|V4", "nonsense", "<f4, <i4"]
            ),
            SHAPES,
            st.integers(0, 5000),
        ),
        max_size=5,
    ),
    fortran=st.booleans(),
)
def test_any_array_of_an_npz_file_is_an_sae_or_one_error(good, room, entries, fortran):
    def change(folder: Path) -> None:
        kept = dict(np.load(folder / "params.npz"))
        with warnings.catch_warnings(), zipfile.ZipFile(folder / "params.npz", "w") as archive:
            warnings.simplefilter("ignore")  # names that stand twice
            for name, array in kept.items():
                if name not in [entry[0] for entry in entries]:
                    buffer = io.BytesIO()
                    np.save(buffer, array)
                    archive.writestr(f"{name}.npy", buffer.getvalue())
            for name, descr, shape, size in entries:
                text = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {tuple(shape)}, }}"
                head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
                archive.writestr(f"{name}.npy", head + bytes(size))

    outcome(good, room, ("gemma_scope", "jumprelu"), change)


@tries(0.05)
@given(
    changes=st.dictionaries(
        st.sampled_from(["encoder.weight", "decoder.weight", "encoder.bias", "b_dec", "k", "threshold", "new"]),
        st.one_of(
            st.builds(
                lambda shape, dtype, fill: torch.full(shape, 1).to(dtype) * fill,
                st.lists(st.integers(0, 6), max_size=3),
                st.sampled_from([torch.float16, torch.float64, torch.int32, torch.bool, torch.complex64, torch.uint8]),
                st.sampled_from([0, 1, -1, 1000, 1e30, float("nan")]),
            ),
            st.sampled_from([torch.zeros(()).expand(M, D), torch.eye(4).to_sparse(), torch.empty(0), torch.tensor(K)]),
            JSON,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_state_dict_is_an_sae_or_one_error(good, room, changes):
    def change(folder: Path) -> None:
        torch.save({**torch.load(folder / "ae.pt", weights_only=True), **changes}, folder / "ae.pt")

    outcome(good, room, ("dictionary_learning", "topk"), change)


def test_the_folders_that_are_varied_here_hold_saes(good, room):
    """The tests above would pass if every folder were refused."""
    for kind in KINDS:
        assert outcome(good, room, kind, lambda folder: None)
        assert read_sae(room / kind[0]).sae.encode(raw_activations(4)).shape == (4, M)
