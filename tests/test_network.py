"""Rays on other machines are not talked to without a token, and an own Ray is nobody else's to talk to."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sae_ray.config import JudgeConfig, RayConfig
from sae_ray.errors import UserError
from sae_ray.network import check_token, interface_of, is_loopback
from sae_ray.session import IN_A_JOB, _on_loopback, check_address, ray_session


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", IN_A_JOB):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sae_ray.session.socket.create_connection", lambda *_, **__: pytest.fail("it was talked to"))


def test_loopback_is_this_machine_and_nothing_else():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("10.0.0.1", "0.0.0.0", "localhost.evil.org", "head", "", "192.0.2.2", "::")))


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "ray://head:10001", "[2001:db8::1]:6379"])
def test_a_cluster_elsewhere_is_not_talked_to_without_a_token(address, monkeypatch):
    with pytest.raises(UserError, match=r"ray\.address = .*: whoever reaches .* ray\.trust_network: true"):
        check_address(RayConfig(address=address))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(UserError, match="RAY_AUTH_MODE is token and there is none"):
        check_address(RayConfig(address=address))


def test_with_a_token_or_when_told_to_trust_the_network_it_is(monkeypatch):
    asked: list[tuple[str, int]] = []

    class Connection:
        def close(self) -> None:
            pass

    def connect(place: tuple[str, int], **_: float) -> Connection:
        asked.append(place)
        return Connection()

    monkeypatch.setattr("sae_ray.session.socket.create_connection", connect)
    check_address(RayConfig(address="10.0.0.1:6379", trust_network=True))
    check_address(RayConfig(address="127.0.0.1:6379"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    token = Path(os.environ["HOME"], ".ray", "auth_token")
    token.parent.mkdir()
    token.write_text("f" * 64)
    check_address(RayConfig(address="ray://10.0.0.1:10001"))
    assert asked == [("10.0.0.1", 6379), ("127.0.0.1", 6379), ("10.0.0.1", 10001)]


@pytest.mark.parametrize("address", ["a..b:6379", "127.0.0.1:99999"])
def test_an_address_that_cannot_be_one_is_one_line(address, monkeypatch):
    monkeypatch.undo()  # really asked for: it fails before anything is sent
    with pytest.raises(UserError, match=rf"ray\.address = '{address}': cannot be reached: \w"):
        check_address(RayConfig(address=address, trust_network=True))


def test_a_cluster_of_another_version_is_one_line(monkeypatch):
    import ray

    def init(**_: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.11.1\n")

    monkeypatch.setattr(ray, "init", init)
    said = r"ray\.address = 'auto': .*: Version mismatch: The cluster was started with: Ray: 2\.9\.0 Python: 3\.11\.1$"
    with pytest.raises(UserError, match=said), ray_session(RayConfig(address="auto")):
        pass


def test_auto_is_this_machine_unless_the_environment_says_otherwise(monkeypatch):
    check_address(RayConfig(address="auto"))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UserError, match=r"RAY_ADDRESS=10\.0\.0\.1:6379: whoever reaches"):
        check_address(RayConfig(address="auto"))
    check_address(RayConfig(address="auto", trust_network=True))
    monkeypatch.setenv(IN_A_JOB, "{}")  # the driver of a job is on its cluster already
    check_address(RayConfig(address="auto"))


def test_a_key_is_not_sent_unencrypted_to_another_machine():
    keyed = {"api_key_env": "KEY"}
    with pytest.raises(ValueError, match=r"judge\.endpoint http://host/v1: would send the key .* unencrypted"):
        JudgeConfig(endpoint="http://host/v1", **keyed)
    for fine in ("https://host/v1", "http://127.0.0.1:8000/v1", "http://localhost/v1"):
        assert JudgeConfig(endpoint=fine, **keyed)
    assert JudgeConfig(endpoint="http://host/v1")
    assert JudgeConfig(endpoint="http://host/v1", trust_network=True, **keyed)


def test_the_token_of_an_own_ray_is_nobody_elses_to_read(monkeypatch, tmp_path):
    from ray._private import ray_constants

    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("f" * 64)
    token.chmod(0o644)
    before, environment = ray_constants.ENABLE_RAY_CLUSTER, dict(os.environ)
    with _on_loopback():
        assert not ray_constants.ENABLE_RAY_CLUSTER
        assert token.stat().st_mode & 0o077 == 0
    assert ray_constants.ENABLE_RAY_CLUSTER is before
    assert dict(os.environ) == environment
    assert sys.modules["ray._private.services"].ray_constants is ray_constants  # which is what it reads


def test_an_interface_is_found_by_its_address_and_none_by_anothers():
    assert interface_of("127.0.0.1") in ("lo", "lo0")
    assert interface_of("203.0.113.9") is None


def test_whoever_trusts_a_network_is_warned_once(capsys):
    for _ in range(2):
        check_token("10.1.2.3", "ray.address = '10.1.2.3:6379'", True, "ray.trust_network: true")
    said = capsys.readouterr().err
    assert said.count("warning: ray.address = '10.1.2.3:6379': without a token") == 1
    check_token("127.0.0.1", "ray.address = '127.0.0.1:6379'", True, "ray.trust_network: true")
    assert capsys.readouterr().err == ""
