# Read by init where a folder of the host is the root file system: mounts it on /newroot.
read -r tag type access < /ringside/root
mkdir -p /newroot /lower /writes
target=/newroot
case $access in rw*) ;; *) target=/lower ;; esac
if ! share "$tag" "$type" "$access" "$target"; then
    echo "ringside: the root folder cannot be mounted" > /dev/console
    exec poweroff -f
fi
if [ $target = /lower ]; then
    # The folder stays as it is: what is written goes to memory, and with the machine.
    modprobe -q overlay
    mount -t tmpfs -o mode=0755 writes /writes
    mkdir /writes/upper /writes/work
    mount -t overlay -o lowerdir=/lower,upperdir=/writes/upper,workdir=/writes/work root /newroot || exec poweroff -f
fi
for folder in proc sys dev run tmp mnt; do
    [ -d "/newroot/$folder" ] || mkdir "/newroot/$folder" 2> /dev/null
done
for folder in proc sys dev run tmp mnt/*; do
    [ -d "/$folder" ] || continue
    case $folder in mnt/*) mkdir -p "/newroot/$folder" ;; esac
    mount -o rbind "/$folder" "/newroot/$folder" 2> /dev/null
done
