"""Ceph RBD: our device and fio's own engine on the same image, of a cluster that is made for it.

The cluster and librbd's threads share the CPUs with the processes that are measured. So the driver does not spin, as it
does on a CPU of its own: it and the worker have one CPU, and the rest goes wherever there is room.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys

from rows.contestants import IODEPTH, RAMP, ROOT, RowError, Setup, parse_json, vdusefast

IMAGE = "rbd/speed"
IMAGE_SIZE = "256M"


@functools.cache
def _image() -> str:
    """Return the URI of an image that is filled and checked; the cluster ends with this process. Raises RowError."""
    sys.path.append(str(ROOT / "tests"))
    import ceph_rig

    if missing := ceph_rig.missing():
        raise RowError(f"{', '.join(missing)} missing; ./bootstrap.sh test installs them")
    running = contextlib.ExitStack()
    atexit.register(running.close)
    try:
        cluster = running.enter_context(ceph_rig.cluster())
        uri = cluster.make_image(IMAGE, IMAGE_SIZE)
    except ceph_rig.CephError as error:
        raise RowError(str(error)) from None
    os.environ["CEPH_CONF"] = str(cluster.conf)  # where fio looks
    arguments = [sys.executable, "-m", "vdusefast.bench", "raw", "--name=fill", "--rw=write", "--bs=1m", "--iodepth=4"]
    arguments += ["--queues=1", "--verify=crc32c", "--output-format=json", f"--backend={uri}"]
    checks = parse_json(arguments)["vdusefast"]["verify"]
    if any(check["verify_errors"] or check["request_errors"] or not check["blocks_verified"] for check in checks):
        raise RowError(f"{uri} does not hold what was written: {checks}")
    return uri


def ours(setup: Setup) -> float:
    """Return IOPS of our device."""
    return vdusefast(setup, _image(), driver_cpus=[setup.worker_cpu])


def fio(setup: Setup) -> float:
    """Return IOPS of fio's engine rbd."""
    _image()
    pool, _, image = IMAGE.partition("/")
    arguments = ["fio", "--name=speed", "--rw=randread", "--bs=4k", f"--iodepth={IODEPTH}", "--time_based"]
    arguments += [f"--runtime={setup.seconds * 1000:g}ms", f"--ramp_time={RAMP}", "--output-format=json"]
    report = parse_json([*arguments, "--ioengine=rbd", "--clientname=test", f"--pool={pool}", f"--rbdname={image}"])
    return float(report["jobs"][0]["read"]["iops"])
