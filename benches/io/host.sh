# The host half of `cargo xtask bench io`: sh host.sh krun|krun_dax|qemu PART. Runs a guest and prints its figures.
# KRUN, BUNDLE, KERNEL, ROOT, VIRTIOFSD: the command, the library with the kernel, the same kernel as a file,
# the guest's root, QEMU's server of shares; TREE: the files of the part "tree". All files lie in memory, so that devices
# are what is compared.
set -eu
vmm=$1 part=$2
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../processes.sh"
mkdir "$work/share"
cp "$here/guest.sh" "$work/share/guest"
cp "$here"/*.py "$work/share"
truncate -s 256M "$work/disk"
[ "$part" != tree ] || tar cf "$work/share/tree.tar" -C "$TREE" .

# Whether the part has an end here.
has_sockets() { [ -f "$here/$part.py" ]; }

# Starts that end: vsock or a folder.
sockets() {
    has_sockets || return 0
    python3 "$here/$part.py" host "$1" > "$work/sockets" &
    running="$running $!"
    await grep -q ready "$work/sockets"
}

krun() {
    sockets "$work"
    set --
    ! has_sockets || for port in 5001 5002 5003; do set -- "$@" --vsock "$port:$work/$port"; done
    "$KRUN" run --accel kvm --kernel "$BUNDLE" --memory 512M --root "$ROOT" --disk "$work/disk" \
        --volume "$work/share:/mnt${options:-}" "$@" -- sh /mnt/guest "$part" /mnt
}

# With a DAX window for the share.
krun_dax() {
    options=:dax=256M
    krun
}

qemu() {
    sockets vsock
    set --
    ! has_sockets || set -- -device vhost-vsock-device,guest-cid=7
    for tag in root share; do
        dir=$work/share
        [ "$tag" = share ] || dir=$ROOT
        "$VIRTIOFSD" --socket-path "$work/$tag.sock" --shared-dir "$dir" --sandbox none --seccomp none \
            --inode-file-handles=prefer 2> "$work/$tag.log" &
        running="$running $!"
    done
    await [ -S "$work/root.sock" -a -S "$work/share.sock" ]
    # A word of the kernel's command line with neither "=" nor "." is an argument for init; what follows "--" could
    # not be told from the words that QEMU adds.
    script="mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs tmp /tmp;
        mount -t virtiofs share /mnt; sh /mnt/guest $part /mnt; sync"
    script=$(printf '%s' "$script" | tr -s '\n ' '  ')
    qemu-system-x86_64 -M microvm,acpi=off,memory-backend=ram -accel kvm -cpu host -m 512 \
        -object memory-backend-memfd,id=ram,size=512M,share=on -nodefaults -no-user-config -display none \
        -no-reboot -global virtio-mmio.force-legacy=false -serial stdio \
        -object iothread,id=disk -drive "file=$work/disk,format=raw,if=none,id=d,cache=writeback,aio=io_uring" \
        -device virtio-blk-device,drive=d,iothread=disk \
        -chardev "socket,id=root,path=$work/root.sock" -device vhost-user-fs-device,chardev=root,tag=root \
        -chardev "socket,id=share,path=$work/share.sock" -device vhost-user-fs-device,chardev=share,tag=share \
        "$@" -kernel "$KERNEL" -append "console=ttyS0 8250.nr_uarts=1 quiet reboot=t panic=-1 rootfstype=virtiofs root=root rw \
init=/bin/sh -c \"$script\""
}

"$vmm" < /dev/null > "$work/out" 2> "$work/err" || status=$?
tr -d '\r' < "$work/out" | sed -n 's/^figure //p' > "$work/figures"
if [ ! -s "$work/figures" ] || [ "${status:-0}" != 0 ]; then
    echo "$vmm $part: status ${status:-0}" >&2
    tail -n 20 "$work/out" "$work/err" "$work"/*.log >&2 2> /dev/null || true
    exit 1
fi
cat "$work/figures"
