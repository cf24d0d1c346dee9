# Runs the command and tells the host how it ended: as process 1, or as a service of systemd, which is process 1 then.
# The ports: 1 and 2 are the command's output and complaints, each ended by $token; 3 carries "booted" and the exit status.
. /run/guest/settings
export PATH=/usr/sbin:/usr/bin:/sbin:/bin

# Lists the processes that the command may have left: all that run, but below systemd only those of its service.
processes() {
    if [ -n "$systemd" ]; then
        cat "/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/$$/cgroup)/cgroup.procs"
    else
        cd /proc && echo [0-9]*
    fi
}

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

# A process that it left may hold its output open. One that hangs in the kernel cannot be killed, and still does then.
for process in $(processes); do
    case $process in
        1 | $$ | $pump_out | $pump_err) ;;
        *) kill -9 $process 2>/dev/null ;;
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
