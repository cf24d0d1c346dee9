# Makes systemd process 1, with udev, D-Bus, logind and the journal of this machine, and none of its other services.
# Sourced by session.sh, before systemd starts. The service guest-command runs the command.

# Removes what packages of the distribution enable, and rules for directories that hold the host's files here.
rm -rf /etc/systemd/system /etc/systemd/user /etc/rc?.d /etc/fstab
mkdir -p /etc/systemd/system /etc/tmpfiles.d /etc/systemd/system-generators
: >/etc/fstab
for file in tmp x11 systemd-tmp; do
    ln -s /dev/null /etc/tmpfiles.d/$file.conf
done
for name in postgresql cryptsetup getty gpt-auto hibernate-resume integritysetup rc-local sysv veritysetup; do
    case $name in
        postgresql) ln -s /dev/null /etc/systemd/system-generators/$name-generator ;;
        *) ln -s /dev/null /etc/systemd/system-generators/systemd-$name-generator ;;
    esac
done
for unit in systemd-firstboot.service systemd-machine-id-commit.service systemd-sysusers.service systemd-binfmt.service \
    systemd-repart.service systemd-tmpfiles-clean.timer getty.target systemd-timesyncd.service systemd-udev-settle.service \
    systemd-update-utmp.service systemd-update-utmp-runlevel.service systemd-random-seed.service proc-sys-fs-binfmt_misc.automount systemd-pcrphase.service systemd-pcrphase-sysinit.service; do
    ln -s /dev/null /etc/systemd/system/$unit
done
rm -f /.dockerenv # of a machine that is a container: the guest is none

cat >/etc/systemd/system/guest-command.service <<UNIT
[Unit]
Description=command of the guest
After=multi-user.target

[Service]
ExecStart=/run/guest/busybox sh /run/guest/run_command.sh
KillMode=mixed
TimeoutStopSec=3
OOMScoreAdjust=-500

[Install]
WantedBy=default.target
UNIT
mkdir /etc/systemd/system/multi-user.target.wants /etc/systemd/system/default.target.wants
ln -s ../guest-command.service /etc/systemd/system/default.target.wants/
ln -s /lib/systemd/system/multi-user.target /etc/systemd/system/default.target
ln -s /lib/systemd/system/remote-fs.target /etc/systemd/system/multi-user.target.wants/
chmod 755 /run
/bin/sh /run/guest/before </dev/null || die "the command that runs before systemd has failed"
exec /lib/systemd/systemd
