# The guest's process 1 once its root is there: finishes the set-up, and has the command run, or systemd, which runs it.
. /run/guest/settings
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
cd /

die() {
    echo "guest: $*"
    exec /run/guest/busybox reboot -f
}

mkdir -p /dev/pts "/lib/modules/$release"
mount -t devpts devpts /dev/pts
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr
mount --bind "$modules" "/lib/modules/$release"
ip link set lo up
if [ -n "$results" ]; then
    mkdir -p "$results"
    mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none results "$results" || die "no results directory"
fi
echo 60 >/proc/sys/kernel/hung_task_timeout_secs
while read -r module; do
    [ -z "$module" ] || modprobe $module || die "modprobe $module failed"
done <<MODULES
$preload
MODULES
if [ -n "$address" ]; then
    ip link set eth0 up && ip addr add "$address" dev eth0 || die "no network"
fi

if [ -n "$systemd" ]; then
    . /run/guest/systemd.sh
else
    exec /run/guest/busybox sh /run/guest/run_command.sh
fi
