"""The rules of `faulty:` URIs: what they mean, and what is refused with the words that are wrong."""

from __future__ import annotations

import errno
import os

import pytest

from vdusefast.backends import absolute_uri, faulty, open_store
from vdusefast.config import BackendConfig
from vdusefast.errors import ConfigError


def test_rule_is_read_key_by_key() -> None:
    text = "op=read/flush,error=ENOSPC,delay=1.5ms,range=4K-1M,skip=3,every=2,count=9,chance=2.5%,file=/tmp/x,seed=5"
    faults, seed = faulty.parse(f"{text}+delay=3s")
    assert seed == 5
    assert faults[0] == faulty.Fault(5, errno.ENOSPC, 1_500_000, 4096, (1 << 20) - 1, 3, 2, 9, 25_000, "/tmp/x")
    assert faults[1] == faulty.Fault(delay_ns=3_000_000_000)
    assert faulty.from_json(faulty.to_json(faults, seed)) == (faults, seed)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ("op=read", "does nothing: it needs an error= or a delay="),
        ("op=reed,error=EIO", "op=reed is not one of read, write, flush, discard, write-zeroes"),
        ("error=EWHAT", "error=EWHAT is not the name of an errno"),
        ("error=5", "error=5 is not the name of an errno"),
        ("delay=5", "delay=5 is not a time"),
        ("delay=2h", "delay=2h is not a time"),
        ("delay=9999s", "delay=9999s is not a time up to 3600 s"),
        ("error=EIO,range=8K-4K", "range=8K-4K is not a range"),
        ("error=EIO,range=8K", "range=8K is not a range"),
        ("error=EIO,every=0", "every=0 is not 1 or more"),
        ("error=EIO,count=-1", "count=-1 is not a number"),
        ("error=EIO,chance=1.5", "chance=1.5 is not a share"),
        ("error=EIO,chance=101%", "chance=101% is not a share"),
        ("error=EIO,colour=red", "'colour=red' is no KEY=VALUE, or twice"),
        ("error=EIO,error=EIO", "'error=EIO' is no KEY=VALUE, or twice"),
        ("error=EIO,every", "'every' is no KEY=VALUE, or twice"),
        ("+".join(["error=EIO"] * 17), "17 rules for faults, at most 16 are possible"),
        (f"error=EIO,file={'x' * 256}", "is not a path of up to 255 bytes"),
    ],
)
def test_bad_rule_is_refused_by_name(rules: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"^backend\.uri: ") as raised:
        open_store(BackendConfig(uri=f"faulty:{rules}:memory:1M"))
    assert said in str(raised.value)


@pytest.mark.parametrize("uri", ["faulty:memory:1M", "faulty:error=EIO", "faulty:error=EIO:"])
def test_uri_without_rules_or_store_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="is not faulty:RULES:URI; write for example faulty:op=read"):
        open_store(BackendConfig(uri=uri))


def test_unknown_store_behind_the_rules_is_refused() -> None:
    with pytest.raises(ConfigError, match="'tape:1' names no known kind of store"):
        open_store(BackendConfig(uri="faulty:error=EIO:tape:1"))


def test_store_behind_the_rules_keeps_its_kind_and_shows_the_whole_uri() -> None:
    with open_store(BackendConfig(uri="faulty:error=EIO:memory:1M")) as store:
        assert (store.kind, store.size_bytes, store.uri) == ("memory", 1 << 20, "faulty:error=EIO:memory:1M")
        assert store.faults


def test_paths_of_rules_and_store_become_absolute() -> None:
    here = os.getcwd()
    assert (
        absolute_uri("faulty:error=EIO,file=flag,every=2:file:disk.img")
        == f"faulty:error=EIO,file={here}/flag,every=2:file:{here}/disk.img"
    )


def test_faults_in_front_of_faults_are_not_lost() -> None:
    """The inner rules would be forgotten otherwise."""
    with pytest.raises(ConfigError, match="faulty: twice"):
        open_store(BackendConfig(uri="faulty:error=EIO:faulty:delay=1ms:memory:1M"))
