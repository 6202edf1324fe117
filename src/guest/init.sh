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
[ -z "$found" ] || { coldplug virtio; coldplug nd; }
ip link set lo up

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
    PATH=$programs "$shell" /ringside/exec < /dev/null >&3 2>&4 3>&- 4>&-
    /ringside/report $? <&3 >&4
    # The machine has no debug-exit port.
    exec poweroff -f
fi

# The shell's terminal is the last console, under its own name.
read -r console < /sys/class/tty/console/active
console=/dev/${console##* }
# The machine gives the size of the terminal that it is used from. Where it is used from none, the shell gets no line
# editor, which would ask it for the cursor's place, and its input is not echoed.
[ -n "$COLUMNS" ] || echo=-echo
stty rows "${LINES:-24}" cols "${COLUMNS:-80}" $echo
unset LINES COLUMNS echo alias file
cd /root
export PS1='root@\h:\w# '
PATH=$programs /ringside/bin/setsid -c /ringside/bin/sh < "$console" > "$console" 2>&1
exec poweroff -f
