"""`bench peers --variants`: what is made of the text, what is refused, and that ratios are to the first variant."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from fake_peers import Json, command, run
from test_bench_peers_report import kit, sample

from vdusefast.api import Device
from vdusefast.bench.common import rounds
from vdusefast.bench.peers import kinds as peer_kinds
from vdusefast.bench.peers import variants as peers_variants
from vdusefast.bench.peers.peer import PeerSetup
from vdusefast.bench.peers.report import print_peers
from vdusefast.errors import ConfigError

MIB = 1 << 20
TEXT = "base:;deep: indirect=false, queue_size=1024, poll_us=10;big:bounce_size_bytes=128M;mem:uri=memory:"


def test_variants_are_kinds_of_peer_with_settings_of_their_types() -> None:
    base, deep, big, mem = peers_variants.parse_variants(TEXT)
    assert [kind.name for kind in (base, deep, big, mem)] == ["base", "deep", "big", "mem"]
    assert base.overrides == {}
    assert deep.overrides == {"indirect": False, "queue_size": 1024, "poll_us": 10}
    assert big.overrides == {"bounce_size_bytes": 128 * MIB}
    assert (mem.overrides, mem.keeps_data, deep.keeps_data) == ({"uri": "memory:"}, False, True)
    assert issubclass(deep, peer_kinds.Vdusefast)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (";", "there is none"),
        ("a:;a:poll_us=1", "a name of its own"),
        ("qsd:", "a name of its own"),
        ("poll_us=1", "a name of its own"),
        ("a:polls=1", "keys are serial, "),
        ("a:name=x", "keys are serial, "),
        ("a:poll_us=1,poll_us=2", "write KEY=VALUE once"),
        ("a:poll_us", "write KEY=VALUE once"),
        ("a:poll_us=soon", "poll_us: Expected `int`"),
        ("a:queue_size=100", "no power of two"),
        ("a:uri=file:/x", "uri=file:/x: write one of file:, memory:, null:"),
    ],
)
def test_variants_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^--variants[^\n]*$") as raised:
        command(variants=text)
    assert message in str(raised.value)


def test_variants_run_alone_unless_peers_are_named() -> None:
    assert [kind.name for kind in peers_variants.kinds(None, TEXT)] == ["base", "deep", "big", "mem"]
    assert [kind.name for kind in peers_variants.kinds(("qsd", "loop"), "a:;b:")] == ["a", "b", "qsd", "loop"]
    assert [kind.name for kind in peers_variants.kinds(("loop",), "")] == ["loop"]
    assert peers_variants.kinds(None, "") == list(peer_kinds.ALL)
    assert peers_variants.one_of("deep", TEXT) == "deep: indirect=false, queue_size=1024, poll_us=10"
    assert peers_variants.one_of("qsd", TEXT) == ""


def test_settings_reach_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Json] = []

    def device(config: object) -> object:
        made.append({"config": config})
        return SimpleNamespace(start=lambda: None, stop=lambda: None, node=str(tmp_path / "f"), queues=list)

    monkeypatch.setattr("vdusefast.api.Device", device)
    monkeypatch.setattr("vdusefast.bench.common.block_node.wait_for", lambda node, size_bytes, timeout_s: None)
    for kind in peers_variants.parse_variants("deep:queue_size=1024,queues=1,poll_us=7;mem:uri=memory:"):
        peer = kind(PeerSetup(tmp_path / "f", 4 * MIB, 2, (), tmp_path, "tag"))
        peer.start()
        peer.stop()
    deep, mem = (one["config"] for one in made)
    assert (deep.device.queue_size, deep.device.queues, deep.queue[0].poll_us) == (1024, 1, 7)
    assert deep.backend.uri == f"file:{tmp_path / 'f'}"
    assert (mem.backend.uri, mem.device.queues) == (f"memory:{4 * MIB}", 2)


def test_workers_rest_while_others_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    peer = peer_kinds.Vdusefast(PeerSetup(tmp_path / "f", 4 * MIB, 2, (), tmp_path, "tag"))
    # A queue without a worker has no process: -1 would be every process there is.
    peer._device = cast(Device, SimpleNamespace(queues=lambda: [SimpleNamespace(pid=pid) for pid in (71, -1)]))
    peer.rest()
    peer.wake()
    assert sent == [(71, signal.SIGSTOP), (71, signal.SIGCONT)]


def variant_report() -> Json:
    runs = [run("base", 0, 100.0), run("base", 1, 200.0), run("deep", 0, 150.0), run("deep", 1, 300.0)]
    for one in runs:
        one["counted"] = {"requests": 100, "batches": 25, "kicks": 10, "irqs": 50, "sleeps": 0}
    report = sample()
    report["method"] |= {"variants": "base:;deep:queue_size=1024", "base": "base"}
    report["peers"] = [{"name": name, "title": "T", "version": "", "cache": "C"} for name in ("base", "deep")]
    return report | {"runs": runs, "table": rounds.table(runs, ["j"], ["base", "deep"], "base", over_base=True)}


def test_ratios_are_to_the_first_variant_and_counters_are_a_request(capsys: pytest.CaptureFixture[str]) -> None:
    print_peers(variant_report(), sys.stdout, markdown=True)
    out = capsys.readouterr().out
    assert "| / base | deep |\n|---|---:|\n| j | 1.50 ±0 % |" in out
    assert "| j | 0.100, 0.500, 0.000; 4.0 | 0.100, 0.500, 0.000; 4.0 |" in out


def test_counters_of_nobody() -> None:
    assert rounds.per_request([run("qsd", 0, 1.0)]) == {}
    idle = run("base", 0, 1.0) | {"counted": {"requests": 0, "kicks": 3}}
    assert rounds.per_request([idle]) == {}


def test_guest_gets_the_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report").write_text(json.dumps(variant_report() | {"failed": [], "not_run": []}))
    kit(tmp_path, monkeypatch, f"cp {tmp_path}/report $results/peers.json")
    assert command(vm="6.12", variants="base:;deep:queue_size=1024") == 0
    assert command(vm="6.12", variants="base:;deep:queue_size=1024", icount=True, jobs=("rw=read",)) == 0
    together, base, deep = (tmp_path / "boots").read_text().splitlines()
    assert "'--variants=base:;deep:queue_size=1024'" in together
    assert "--peers" not in together
    assert "--variants=base: " in base
    assert "--variants=deep:queue_size=1024 " in deep
