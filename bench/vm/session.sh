# The guest's process 1 once its root is there: finishes the set-up, runs the command, tells the host how it ended.
# The ports: 1 and 2 are the command's output and complaints, each ended by $token; 3 carries "booted" and the exit status.
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
while read -r words; do
    [ -z "$words" ] || modprobe $words || die "modprobe $words failed"
done <<MODULES
$preload
MODULES
if [ -n "$address" ]; then
    ip link set eth0 up && ip addr add "$address" dev eth0 || die "no network"
fi

until [ -c /dev/vport0p1 ] && [ -c /dev/vport0p2 ] && [ -c /dev/vport0p3 ]; do
    usleep 10000
done
exec 3>/dev/vport0p3
mkfifo /run/guest/stdout /run/guest/stderr
cat /run/guest/stdout >/dev/vport0p1 3>&- &
pump_out=$!
cat /run/guest/stderr >/dev/vport0p2 3>&- &
pump_err=$!

echo booted >&3
setsid /bin/sh /run/guest/command </dev/null >/run/guest/stdout 2>/run/guest/stderr 3>&-
status=$?

# What it left running may hold its output open. What cannot be killed, since it hangs in the kernel, still does then.
for process in /proc/[0-9]*; do
    case ${process#/proc/} in
        1 | $pump_out | $pump_err) ;;
        *) kill -9 ${process#/proc/} 2>/dev/null ;;
    esac
done
tries=0
while [ $tries -lt 1000 ] && { kill -0 $pump_out || kill -0 $pump_err; } 2>/dev/null; do
    usleep 10000
    tries=$((tries + 1))
done
kill -9 $pump_out $pump_err 2>/dev/null
wait $pump_out $pump_err
printf '%s' "$token" >/dev/vport0p1
printf '%s' "$token" >/dev/vport0p2
echo "$status" >&3
sleep 1000
