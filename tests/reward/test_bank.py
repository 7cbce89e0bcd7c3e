import io

import pyarrow as pa
import pyarrow.parquet as pq

from sae_ray.reward.bank import SCHEMA, VerdictBank
from sae_ray.storage import LocalStorage


def row(latent: int, score: float | None) -> dict:
    defaults = {"string": "t", "bool": True, "float": 1.0}
    out = {f.name: defaults.get(str(f.type), 1) for f in SCHEMA}
    return out | {"latent": latent, "score": score, "probability": None if score is None else 0.5}


def test_the_bank_only_grows_and_keeps_missing_verdicts_missing(tmp_path):
    bank = VerdictBank(LocalStorage(tmp_path))
    first = bank.append([row(1, 0.25), row(2, None)])
    second = VerdictBank(LocalStorage(tmp_path)).append([row(3, 0.5)])
    assert first < second
    rows = bank.read()
    assert [r["latent"] for r in rows] == [1, 2, 3]
    assert [r["score"] for r in rows] == [0.25, None, 0.5]
    assert bank.read([second])[0]["latent"] == 3


def test_a_segment_of_before_says_nothing_about_prompts_and_is_read_beside_one_that_does(tmp_path):
    storage = LocalStorage(tmp_path)
    bank = VerdictBank(storage)
    older = pa.schema([field for field in SCHEMA if field.name not in ("prompt_version", "judge_identity")])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row(1, 0.25)], schema=older), buffer)
    storage.write("bank/segment-000001.parquet", buffer.getvalue())
    bank.append([row(2, 0.5) | {"prompt_version": "7", "judge_identity": "abc"}])
    assert [(r["latent"], r["prompt_version"], r["judge_identity"]) for r in bank.read()] == [
        (1, None, None),
        (2, "7", "abc"),
    ]
