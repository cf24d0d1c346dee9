"""Pools, images, keys and configurations that are not there: a line that names URI and remedy, and no device."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from background import Background
from ceph_rig import Cluster

from vdusefast import Device, make_config
from vdusefast.backends import absolute_uri, probe, rbd
from vdusefast.backends.plugin import StoreSpec
from vdusefast.errors import BackendError, ConfigError, VdusefastError

pytestmark = pytest.mark.slow


def refusal(uri: str) -> str:
    """Return why a device over `uri` is refused."""
    with pytest.raises(VdusefastError) as caught, Device(make_config(name="refused", uri=uri, queues=1)):
        pass
    text = str(caught.value)
    assert "\n" not in text
    assert uri in text
    return text


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("rbd:image", "does not name an image"),
        ("rbd:/image", "does not name an image"),
        ("rbd:pool/", "does not name an image"),
        ("rbd:pool//image", "does not name an image"),
        ("rbd:a/b/c/d", "does not name an image"),
        ("rbd:pool/image@", "does not name an image"),
        ("rbd:pool/im%00age", "does not name an image"),
        ("rbd:pool/image?cluster=ceph", "there is no 'cluster'; there are conf, id, keyring"),
        ("rbd:pool/image?conf=", "conf is empty"),
        ("rbd:pool/image?id=client.admin", "write id=admin"),
    ],
)
def test_uri_that_cannot_be_is_refused(uri: str, told: str) -> None:
    with pytest.raises(ConfigError, match=r"backend\.uri") as caught:
        rbd.parse(uri)
    assert told in str(caught.value)
    assert uri in str(caught.value)


def test_uri_names_all_parts() -> None:
    parsed = rbd.parse("rbd:po%2Fol/name%20space/image@snap%40shot?conf=/etc/a%26b.conf&id=me&keyring=/k")
    assert parsed == rbd.Image("po/ol", "name space", "image", "snap@shot", "/etc/a&b.conf", "me", "/k")
    assert rbd.parse("rbd:p/i") == rbd.Image("p", "", "i", "", "/etc/ceph/ceph.conf", "admin", "")


def test_relative_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    made = absolute_uri("rbd:p/i@s?conf=my%20ceph.conf&id=conf&keyring=k/r")
    assert rbd.parse(made) == rbd.Image("p", "", "i", "s", f"{tmp_path}/my ceph.conf", "conf", f"{tmp_path}/k/r")
    assert absolute_uri("rbd:p/i") == "rbd:p/i"


def test_absent_configuration_is_named(tmp_path: Path) -> None:
    assert "is not there; name another by ?conf=PATH" in refusal(f"rbd:rbd/image?conf={tmp_path}/none")


def test_file_that_is_no_configuration_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ceph.conf"
    path.write_text("root:x:0:0\n[half\n")
    assert "is no configuration of Ceph" in refusal(f"rbd:rbd/image?conf={path}")


def test_keyring_that_others_may_read_is_refused(tmp_path: Path) -> None:
    for name, mode in (("ceph.conf", 0o644), ("keyring", 0o644)):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    said = refusal(f"rbd:rbd/image?conf={tmp_path}/ceph.conf&keyring={tmp_path}/keyring")
    assert f"keyring has mode 0644: others may read or change it; chmod 0600 {tmp_path}/keyring" in said


def test_absent_pool_is_told_with_those_there_are(ceph: Cluster) -> None:
    assert "there is no pool nowhere; there are rbd" in refusal(ceph.uri("nowhere/image"))


def test_absent_namespace_is_told_with_the_way_to_make_one(ceph: Cluster) -> None:
    assert "there is no namespace nowhere in pool rbd" in refusal(ceph.uri("rbd/nowhere/image"))


def test_absent_image_is_told_with_those_there_are(ceph: Cluster, image: str) -> None:
    text = refusal(ceph.uri("rbd/nothing"))
    assert "there is no image nothing in rbd; there are " in text
    assert "image" in text.partition("there are ")[2]


def test_absent_snapshot_is_told_with_those_there_are(ceph: Cluster, image: str) -> None:
    ceph.rbd("snap", "create", f"rbd/{image}@there")
    assert "there is no snapshot nothing of rbd/" in (text := refusal(ceph.uri(f"rbd/{image}@nothing")))
    assert "there are there" in text


def test_absent_keyring_is_named(ceph: Cluster, image: str, tmp_path: Path) -> None:
    text = refusal(ceph.uri(f"rbd/{image}", keyring=f"{tmp_path}/none"))
    assert f"no keyring for client.test: {tmp_path}/none cannot be read" in text


def test_keyring_without_the_client_is_named(ceph: Cluster, image: str) -> None:
    assert "has no key for client.nobody" in refusal(ceph.uri(f"rbd/{image}", id="nobody"))


def test_wrong_key_is_told(ceph: Cluster, image: str, tmp_path: Path) -> None:
    keyring = tmp_path / "keyring"
    keyring.write_text("[client.test]\n\tkey = AQB5iJlf+xqnKBAAFtpxZMLR6HQn8zBnGCuqMQ==\n")
    keyring.chmod(0o600)
    assert "the monitors refuse client.test: its key in" in refusal(ceph.uri(f"rbd/{image}", keyring=str(keyring)))


def test_client_without_rights_is_told_which(ceph: Cluster, image: str) -> None:
    assert "client.weak lacks the right: ceph auth caps client.weak" in refusal(ceph.uri(f"rbd/{image}", id="weak"))


def test_servers_that_do_not_answer_are_given_up_within_bounds(ceph: Cluster, image: str, tmp_path: Path) -> None:
    with socket.socket() as silent, ceph.osd_halted():
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)  # nobody will answer
        keyring = tmp_path / "keyring"
        keyring.write_text("[client.admin]\n\tkey = AQB5iJlf+xqnKBAAFtpxZMLR6HQn8zBnGCuqMQ==\n")
        conf = tmp_path / "ceph.conf"
        conf.write_text(f"[global]\nmon host = [v2:127.0.0.1:{silent.getsockname()[1]}/0]\nkeyring = {keyring}\n")
        began = time.monotonic()
        monitor = Background(lambda: refusal(f"rbd:rbd/image?conf={conf}"))
        with pytest.raises(BackendError, match=r"no OSD has answered within 10 s; see ceph -s"):
            probe.describe(StoreSpec(ceph.uri(f"rbd/{image}")))
        assert "no monitor has answered within 10 s" in monitor.result()
        assert time.monotonic() - began < 20


def test_backend_says_whether_it_is_usable() -> None:
    assert rbd.usability().ok
