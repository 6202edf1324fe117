#!/bin/busybox sh
# Process 1 of Ringside's default guests. Every process that is started here costs time before the shell, so this
# uses what is built into the shell wherever it can.
# Packages may bring programs of the same names with other ways: init's own are busybox's.
export PATH=/ringside/bin HOME=/root
programs=/usr/local/bin:/usr/bin:/bin
export TERM="${TERM:-linux}"
mount -t devtmpfs dev /dev
cp -a /ringside/dev/. /dev/
mount -a
echo ringside > /proc/sys/kernel/hostname

# Loads the drivers of the devices on one bus, where this initramfs has them.
. /ringside/drivers
found=
coldplug() {
    set -- "$1"
    for file in "/sys/bus/$1/devices"/*/modalias; do
        read -r alias < "$file" && has_driver "$1 $alias" && set -- "$@" "$alias"
    done 2> /dev/null
    shift
    if [ $# != 0 ]; then
        found=1
        modprobe -a -q "$@" 2> /dev/null
    fi
}
coldplug pci
coldplug acpi
# Persistent memory is found in the background, before its driver is loaded and after.
settle() {
    for file in /sys/bus/nd/devices/*/wait_probe; do read -r alias < "$file"; done 2> /dev/null
}
[ -z "$found" ] || { coldplug virtio; settle; coldplug nd; settle; }
# The driver of the virtio console hears in the background what its ports are.
read -r arguments < /proc/cmdline
case " $arguments " in
*" console=hvc0 "*)
    tries=100
    until read -r console < /sys/class/tty/console/active && case "$console" in *hvc0*) ;; *) false ;; esac; do
        [ $((tries -= 1)) != 0 ] || break
        sleep 0.02
    done
    ;;
esac
unset arguments tries console
ip link set lo up

# Mounts a folder of the host: its tag, its type, ro or rw, where to.
share() {
    case $2 in
    virtiofs) modprobe -q virtiofs; mount -t virtiofs -o "$3" "$1" "$4" ;;
    9p)
        modprobe -a -q 9pnet_virtio 9p
        mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$3" "$1" "$4"
        ;;
    esac
}
# Mounts those that the machine names below mnt in a folder.
shares() {
    [ -f /ringside/shares ] || return 0
    while read -r tag type access; do
        mkdir -p "$1/mnt/$tag"
        if share "$tag" "$type" "$access" "$1/mnt/$tag"; then
            echo "ringside: the host's folder $tag is at /mnt/$tag"
        else
            echo "ringside: the host's folder $tag cannot be mounted at /mnt/$tag"
        fi
    done < /ringside/shares
    unset tag type access
}

# A disk that has a system of its own: the machine says which.
if [ -n "$RINGSIDE_ROOT" ]; then
    give_up() {
        echo "ringside: $*" > /dev/console
        sleep 1
        poweroff -f
    }
    modprobe -q ext4
    mount -t ext4 -o "${RINGSIDE_ROOT_MODE:-rw}" "$RINGSIDE_ROOT" /mnt || give_up "cannot mount $RINGSIDE_ROOT"
    # A link that leads somewhere within the disk, mostly.
    [ -x /mnt/sbin/init ] || [ -L /mnt/sbin/init ] || give_up "$RINGSIDE_ROOT has no /sbin/init"
    # Another kernel than the last time brings its modules along.
    release=$(uname -r)
    modules=/mnt/usr/lib/modules/$release
    if [ ! -d "$modules" ] && [ -z "$RINGSIDE_ROOT_MODE" ]; then
        if cp -a "/lib/modules/$release" "$modules.new" && mv "$modules.new" "$modules"; then
            chroot /mnt /sbin/depmod -a "$release"
        else
            rm -rf "$modules.new"
        fi
    fi
    shares /mnt
    if [ ! -f /ringside/exec ]; then
        umount /tmp
        for folder in dev proc sys run; do mount -o move "/$folder" "/mnt/$folder"; done
        unset RINGSIDE_ROOT RINGSIDE_ROOT_MODE LINES COLUMNS found programs release modules folder alias file
        exec switch_root /mnt /sbin/init
    fi
    # A command runs in the system without its services.
    for folder in dev dev/pts dev/shm proc sys run tmp; do mount -o bind "/$folder" "/mnt/$folder"; done
    cp /ringside/exec /run/ringside-exec
    cat /mnt/etc/hostname > /proc/sys/kernel/hostname
else
    shares ""
fi
newroot=
if [ -f /ringside/root ]; then
    newroot=/newroot
    . /ringside/root.sh
fi

if [ -f /ringside/exec ]; then
    # Output goes out on the second serial line, errors on the third where there is one, the status to the machine.
    exec 3> /dev/ttyS1
    stty raw -echo 115200 <&3
    read -r uart 2> /dev/null < /sys/class/tty/ttyS2/type || uart=0
    if [ "$uart" != 0 ]; then
        exec 4> /dev/ttyS2
        stty raw -echo 115200 <&4
    else
        exec 4>&3
    fi
    # busybox's shell takes its own commands before those of packages; Debian's comes with them.
    shell=/ringside/bin/sh
    [ ! -x /bin/dash ] || shell=/bin/dash
    if [ -n "$RINGSIDE_ROOT" ]; then
        unset RINGSIDE_ROOT RINGSIDE_ROOT_MODE LINES COLUMNS found release modules folder alias file
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
            chroot /mnt /bin/sh -c 'cd /root; exec /bin/sh /run/ringside-exec' < /dev/null >&3 2>&4 3>&- 4>&-
        status=$?
        # What the command left running may keep the disk busy; then what is written at least is on it.
        sync
        [ ! -f /ringside/shares ] || umount /mnt/mnt/*
        umount -l /mnt/tmp /mnt/run /mnt/sys /mnt/proc /mnt/dev/shm /mnt/dev/pts /mnt/dev
        umount /mnt || umount -r /mnt
    elif [ -n "$newroot" ]; then
        command=$(cat /ringside/exec)
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
            /ringside/bin/chroot "$newroot" /bin/sh -c "$command" < /dev/null >&3 2>&4 3>&- 4>&-
        status=$?
    else
        PATH=$programs "$shell" /ringside/exec < /dev/null >&3 2>&4 3>&- 4>&-
        status=$?
    fi 2> /dev/null
    # The host is to have what was written to its folders.
    [ ! -f /ringside/shares ] || sync
    /ringside/report $status <&3 >&4
    # The machine has no debug-exit port.
    exec poweroff -f
fi

if [ -n "$newroot" ]; then
    for init in /sbin/init /etc/init /bin/init; do
        if [ -x "$newroot$init" ] || [ -L "$newroot$init" ]; then
            unset echo alias file
            PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
            exec /ringside/bin/switch_root "$newroot" "$init"
        fi
    done
    echo "ringside: the root folder has no /sbin/init; this is its shell"
fi

# The shell's terminal is the last console, under its own name.
read -r console < /sys/class/tty/console/active
console=/dev/${console##* }
# The machine gives the size of the terminal that it is used from. Where it is used from none, the shell gets no line
# editor, which would ask it for the cursor's place, and its input is not echoed.
[ -n "$COLUMNS" ] || echo=-echo
# Held open: a console that nobody has open forgets its settings.
exec 5<> "$console"
stty rows "${LINES:-24}" cols "${COLUMNS:-80}" $echo <&5
unset LINES COLUMNS echo alias file
cd /root
export PS1='root@\h:\w# '
if [ -n "$newroot" ]; then
    export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    /ringside/bin/setsid -c /ringside/bin/chroot "$newroot" /bin/sh < "$console" > "$console" 2>&1 5>&-
else
    PATH=$programs /ringside/bin/setsid -c /ringside/bin/sh < "$console" > "$console" 2>&1 5>&-
fi
[ ! -f /ringside/shares ] || /ringside/bin/sync
exec /ringside/bin/poweroff -f
