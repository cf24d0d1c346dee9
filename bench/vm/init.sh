#!/busybox sh
# The guest's first program, in its initramfs: puts a writable root over the host's / and hands over to session.sh there.
# /settings (bench/vm/guest.py) sets release, modules, results, over, keep, preload and systemd.
. /settings

die() {
    echo "guest: $*"
    exec /busybox reboot -f
}

/busybox mkdir -p /proc /dev /host /rw /root
/busybox mount -t proc proc /proc # from here on the shell finds its own programs
mount -t devtmpfs dev /dev
exec >/dev/console 2>&1
for module in /boot/*.ko; do
    insmod "$module" || die "$module cannot be loaded"
done
# Nothing changes these files while the guest runs, so it may cache them without limit.
mount_9p() {
    mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose "$1" "/$1" || die "no file system $1"
}
mount_9p host
lower=/host
if [ -n "$over" ]; then
    mkdir /over
    mount_9p over
    lower=/over:/host
fi
mount -t tmpfs -o mode=755,size=90% rw /rw
mkdir /rw/upper /rw/work
mount -t overlay -o lowerdir=$lower,upperdir=/rw/upper,workdir=/rw/work,xino=off overlay /root || die "no root"

mkdir /rw/plain
mount --bind /root /rw/plain
mount -t proc proc /root/proc
mount -t devtmpfs dev /root/dev
mount -t sysfs sys /root/sys
for directory in /tmp /run /var/tmp /dev/shm; do
    mkdir -p /root$directory
    mount -t tmpfs -o mode=1777,size=90% tmpfs /root$directory
done
for path in $keep; do # the host has it below one of these directories
    mkdir -p "/root$path"
    mount --bind "/rw/plain$path" "/root$path"
done
mkdir -p /root/run/guest
cp /busybox /session.sh /systemd.sh /run_command.sh /settings /command /before /root/run/guest/
exec switch_root /root /run/guest/busybox sh /run/guest/session.sh
