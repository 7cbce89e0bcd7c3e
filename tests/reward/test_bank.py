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
