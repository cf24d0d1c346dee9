"""The NBD engine over TLS."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from nbd_rig import MIB, nbdkit, nbdkit_tcp, served, unix_uri, verified_fio
from verified_load import Load

from vdusefast.errors import VdusefastError


def make_psk(directory: Path) -> Path:
    path = directory / "keys.psk"
    path.write_text("alice:" + os.urandom(32).hex() + "\n")
    path.chmod(0o600)
    return path


def make_certificates(directory: Path) -> Path:
    """Make a CA and a server's certificate for localhost, as both sides look for them. Returns the directory."""

    def certtool(*words: str) -> None:
        subprocess.run(["certtool", *words], check=True, capture_output=True, cwd=directory)

    (directory / "ca.info").write_text("cn = test\nca\ncert_signing_key\n")
    (directory / "server.info").write_text(
        "organization = test\ncn = localhost\ndns_name = localhost\ntls_www_server\n"
    )
    for name in ("ca", "server"):
        certtool("--generate-privkey", "--ecc", f"--outfile={name}-key.pem")
    certtool("--generate-self-signed", "--load-privkey=ca-key.pem", "--template=ca.info", "--outfile=ca-cert.pem")
    signer = ("--load-ca-certificate=ca-cert.pem", "--load-ca-privkey=ca-key.pem", "--template=server.info")
    certtool("--generate-certificate", "--load-privkey=server-key.pem", *signer, "--outfile=server-cert.pem")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("queues", ["1", "2"])
def test_tls_with_a_shared_key(tmp_path: Path, queues: str) -> None:
    keys, sock = make_psk(tmp_path), tmp_path / "s"
    with nbdkit(sock, "memory", "8M", options=("--tls=require", f"--tls-psk={keys}")):
        uri = f"nbds+unix://alice@/?socket={sock}&tls-psk-file={keys}"
        verified_fio(uri, f"--queues={queues}")
        with pytest.raises(VdusefastError, match=r"TLS.*; write nbds://"), served(unix_uri(sock)):
            pass


@pytest.mark.parametrize("mode", [0o644, 0o660])
def test_tls_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    keys, sock = make_psk(tmp_path), tmp_path / "s"
    with nbdkit(sock, "memory", "8M", options=("--tls=require", f"--tls-psk={keys}")):
        keys.chmod(mode)
        uri = f"nbds+unix://alice@/?socket={sock}&tls-psk-file={keys}"
        with pytest.raises(VdusefastError, match=rf"keys.psk has mode {mode:04o}: .*; chmod 0600"), served(uri):
            pass


@pytest.mark.slow
def test_tls_connection_that_dies_is_replaced(tmp_path: Path) -> None:
    keys, sock, image = make_psk(tmp_path), tmp_path / "s", tmp_path / "disk.img"
    image.write_bytes(bytes(8 * MIB))
    server = nbdkit(sock, "file", f"file={image}", options=("--tls=require", f"--tls-psk={keys}"))
    with server, served(f"nbds+unix://alice@/?socket={sock}&tls-psk-file={keys}") as (device, driver):
        load = Load(driver, seconds=1.5)
        for _ in range(2):
            time.sleep(0.3)
            server.stop()
            server.start()
        load.check()
        assert device.failure is None


@pytest.mark.slow
def test_tls_with_certificates_over_tcp(tmp_path: Path) -> None:
    pki = make_certificates(tmp_path)
    with nbdkit_tcp("memory", "8M", options=("--tls=require", f"--tls-certificates={pki}")) as server:
        verified_fio(f"nbds://localhost:{server.port}/?tls-certificates={pki}")
