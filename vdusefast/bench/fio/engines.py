"""Which ioengine of fio loads a device, and what to do with the others."""

from __future__ import annotations

from vdusefast.base.kinds import TransportKind
from vdusefast.bench.fio.arguments import names
from vdusefast.errors import ConfigError

# What the preload library serves: libaio's calls, and reads and writes of libc.
SERVED = names("libaio sync psync vsync pvsync pvsync2")
# Engines that load a node of the kernel as they are.
ON_NODE = SERVED | names("io_uring posixaio mmap splice")
# Engines whose target is one disk; another engine reads and writes the same way.
OF_ONE_DISK = names("io_uring io_uring_cmd posixaio sg rbd nbd libiscsi xnvme libblkio solarisaio windowsaio")
# Engines that do no I/O; they stay beside jobs that do.
WITHOUT_IO = names("cpuio exec")
FILES = "it works on the files of a file system, and a device has none"
REFUSED = {
    **dict.fromkeys(names("filecreate filestat filedelete filerename fallocate falloc ftruncate e4defrag"), FILES),
    **dict.fromkeys(names("dircreate dirstat dirdelete"), FILES),
    **dict.fromkeys(names("null cpp_null"), "it moves no data, so it measures no device; run fio itself"),
    **dict.fromkeys(names("net netsplice rdma"), "it loads a network"),
    **dict.fromkeys(names("librpma_apm_client librpma_apm_server librpma_gpspm_client"), "it loads a network"),
    **dict.fromkeys(names("gfapi gfapi_async nfs libhdfs dfs ime_psync ime_psyncv ime_aio"), FILES),
    **dict.fromkeys(names("rados http"), "it loads an object store"),
    **dict.fromkeys(names("dev-dax libpmem pmemblk"), "it loads persistent memory, which a block device is not"),
    **dict.fromkeys(names("mtd libzbc"), "it needs a device of another kind than a disk"),
    **dict.fromkeys(names("guasi binject"), "fio has removed it"),
    **dict.fromkeys(names("libcufile"), "it needs a graphics card"),
}
NOT_PRELOADED = {
    "mmap": "a loopback device cannot be mapped; use ioengine=psync, or --transport=kernel",
    "splice": "splice works on a kernel device only; use ioengine=psync, or --transport=kernel",
}
# Options of engines that this fio may have been built without.
OPTIONS = names(
    "rbdname pool clustername clientname busy_poll uri hipri hipri_percentage fixedbufs registerfiles "
    "sqthread_poll sqthread_poll_cpu nonvectored uncached force_async nowait cmd_type md_per_io_size "
    "readfua writefua sg_write_mode stream_id xnvme_async xnvme_sync xnvme_admin xnvme_dev_nsid "
    "xnvme_iovec libblkio_driver libblkio_path"
)
COMMON_OPTIONS = names("cmdprio_percentage cmdprio_class cmdprio cmdprio_bssplit")


def replacement(engine: str, transport: str, asynchronous: str) -> str:
    """Return the engine to use for `engine`, itself where it can load the device.

    asynchronous: what takes the place of another engine for disks. Raises ConfigError for one that makes no sense.
    """
    loopback = transport == TransportKind.LOOPBACK
    if engine in WITHOUT_IO or engine in (SERVED if loopback else ON_NODE):
        return engine
    if engine in OF_ONE_DISK:
        return asynchronous
    reason = REFUSED.get(engine)
    if reason is None and engine.startswith(("librpma", "ime_")):
        reason = "it loads no disk"
    if reason is None and loopback:
        reason = NOT_PRELOADED.get(engine, "the loopback transport serves " + ", ".join(sorted(SERVED)))
    if reason is not None:
        raise ConfigError(f"ioengine={engine}: {reason}")
    return engine  # fio knows it, or says that it does not
