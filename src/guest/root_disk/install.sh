# Installs Debian on the first disk from the second, in Ringside's default guest. The machine's side is in install.rs.
# The host has set before this: segments (first block and number of blocks, 64 KiB each: the seed, then packages to
# unpack), host, user, password, autologin (a user's name, or nothing).
set -e
target=/mnt
# What the host reads: its own lines, and dpkg's of --status-fd.
say() { echo "ringside: $*"; }
# By absolute paths, or busybox would take its own programs. What they say goes to a file: some make what they write to
# non-blocking, and the next one to write would find the serial line busy and fail.
log=/tmp/log
inside() { chroot $target "$@" < /dev/null >> $log 2>&1; }
# The last of it, for the host to tell.
trap '[ $? = 0 ] || tail -n 30 $log >&2' EXIT
segment() { dd if=/dev/vdb bs=65536 skip="$1" count="$2" 2> /dev/null | tar x -C "$3"; }

say format
mkfs.ext4 -q -F -L "$label" -E lazy_itable_init=1,lazy_journal_init=1,nodiscard /dev/vda
# What is made here is thrown away unless all of it succeeds: nothing needs to be durable before the end.
mount -t ext4 -o noatime,barrier=0 /dev/vda $target

# A tree in which dpkg runs: the files of the essential packages.
say seed
set -- $segments
segment "$1" "$2" $target
shift 2
cd $target
mkdir -p proc sys dev run tmp etc/apt/sources.list.d etc/profile.d var/lib/dpkg/info var/lib/dpkg/updates
mkdir -p usr/lib/modules etc/systemd/network
# dpkg's records are in memory until the end: it has each change of them synced, several for each package.
cp -a var/lib/dpkg /tmp/dpkg
rm -r var/lib/dpkg
mkdir var/lib/dpkg
mount --bind /tmp/dpkg var/lib/dpkg
mount -t proc proc proc
mount -t sysfs sys sys
mount --bind /dev dev
mount --bind /dev/pts dev/pts
mount -t tmpfs -o mode=0755 run run
mount -t tmpfs -o mode=1777 tmp tmp
: > var/lib/dpkg/status
: > var/lib/dpkg/available
cp usr/share/base-passwd/passwd.master etc/passwd
cp usr/share/base-passwd/group.master etc/group
echo "$host" > etc/hostname
printf '127.0.0.1\tlocalhost\n127.0.1.1\t%s\n::1\tlocalhost ip6-localhost ip6-loopback\n' "$host" > etc/hosts
# No package may start its services in here.
printf '#!/bin/sh\nexit 101\n' > usr/sbin/policy-rc.d
chmod 755 usr/sbin/policy-rc.d

export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true LC_ALL=C HOME=/root
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
# Its status lines become the host's: which package is unpacked or installed now.
dpkg() {
    { inside /usr/bin/dpkg --status-fd 3 --force-unsafe-io --force-confold "$@" 3>&1 || : > /tmp/failed; } |
        while read -r kind name state rest; do
            case "$kind $state" in
            "status: unpacked" | "status: installed") say "$state ${name%:}" ;;
            esac
        done
    [ ! -e /tmp/failed ]
}
say unpack
while [ $# != 0 ]; do
    mkdir run/batch
    segment "$1" "$2" $target/run/batch
    dpkg --force-depends --unpack --recursive /run/batch
    rm -r run/batch
    shift 2
done
say configure
dpkg --configure -a

say finish
rm usr/sbin/policy-rc.d
echo "LABEL=$label / ext4 errors=remount-ro,x-systemd.growfs 0 0" > etc/fstab
echo 'LANG=C.UTF-8' > etc/default/locale
codename=$(. "$target/usr/lib/os-release" && echo "$VERSION_CODENAME")
cat > etc/apt/sources.list.d/debian.sources << END
Types: deb
URIs: http://deb.debian.org/debian
Suites: $codename $codename-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://deb.debian.org/debian-security
Suites: $codename-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
END
# A network card gets its addresses by itself, once there is one; nothing waits for it.
printf '[Match]\nName=en* eth*\n\n[Network]\nDHCP=yes\n' > etc/systemd/network/80-dhcp.network
inside /usr/bin/systemctl -q enable systemd-networkd.service
inside /usr/bin/systemctl -q disable systemd-networkd-wait-online.service
# Nothing here for them to do: no LVM, no display.
inside /usr/bin/systemctl -q disable e2scrub_reap.service e2scrub_all.timer getty@tty1.service
# The serial console does not know the terminal that it is used from: the machine tells by the kernel's command line.
cat > etc/profile.d/ringside-terminal.sh << 'END'
if [ "$(tty)" = /dev/ttyS0 ]; then
    for word in $(cat /proc/cmdline); do
        case $word in
        TERM=*) export TERM="${word#*=}" ;;
        COLUMNS=*) stty cols "${word#*=}" ;;
        LINES=*) stty rows "${word#*=}" ;;
        # Where nobody types, the end of the input is the end of the run, as that of the shell is.
        RINGSIDE_INPUT=pipe) trap 'sudo -n systemctl poweroff 2> /dev/null || systemctl poweroff' EXIT ;;
        esac
    done
    unset word
fi
END
if [ -n "$user" ]; then
    inside /usr/sbin/useradd -m -s /bin/bash -G adm,sudo,systemd-journal "$user"
    if [ -z "$password" ]; then
        echo "$user ALL=(ALL) NOPASSWD: ALL" > etc/sudoers.d/ringside
        chmod 440 etc/sudoers.d/ringside
    fi
fi
if [ -n "$password" ]; then
    printf '%s:%s\n' "${user:-root}" "$password" | chroot $target /usr/sbin/chpasswd
fi
if [ -n "$autologin" ]; then
    mkdir -p etc/systemd/system/serial-getty@ttyS0.service.d
    cat > etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf << END
[Service]
ExecStart=
ExecStart=-/sbin/agetty -o '-p -f -- \\\\u' --keep-baud --autologin $autologin 115200,57600,38400,9600 - \$TERM
END
fi
release=$(uname -r)
if [ ! -d "usr/lib/modules/$release" ]; then
    cp -a "/lib/modules/$release" usr/lib/modules/
    inside /sbin/depmod -a "$release"
fi
rm -rf var/lib/apt/lists/* var/cache/apt/*.bin var/cache/debconf/*-old var/lib/dpkg/*-old
umount var/lib/dpkg
cp -a /tmp/dpkg/. var/lib/dpkg
cd /
umount $target/tmp $target/run $target/dev/pts $target/dev $target/sys $target/proc
umount $target
# Without barriers nothing has told the host yet to keep what it caches of the image.
dd if=/dev/null of=/dev/vda conv=fsync,notrunc 2> /dev/null
say done
