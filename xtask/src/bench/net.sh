# In the emulated host: SECONDS KRUN BUNDLE ROOT VMLINUX INITRD. The same guest on passt, by each VMM in turn; what the guest
# prints comes after a line with the VMM's name. The guest finds an iperf3 server under the router's address.
seconds=$1 krun=$2 bundle=$3 root=$4 vmlinux=$5 initrd=$6
run=$(mktemp -d /tmp/bench.XXXXXX) && chmod 777 "$run" || exit 1
ip link set lo up
ip link add up0 type veth peer name up1
ip addr add 192.168.77.2/24 dev up0
ip link set up0 up
ip link set up1 up
ip route add default via 192.168.77.1 dev up0
cd "$run" || exit 1
iperf3 -s >/dev/null 2>&1 &

# A passt for the next guest; it ends with it.
peer() {
    rm -f socket
    passt --foreground --quiet --one-off -t none -u none --socket "$run/socket" >/dev/null 2>&1 &
    until grep -q "00010000 .*$run/socket" /proc/net/unix; do sleep 0.1; done
}
with_krun() {
    "$krun" run --accel kvm --cpus 1 --memory 512M --kernel "$bundle" --root "$root" --net "$1" \
        -- /bin/sh /bench "$seconds" </dev/null
}

echo "== krun"
peer
with_krun "unix-stream:$run/socket"
echo "== krun --net passt"
with_krun passt
echo "== QEMU"
peer
qemu-system-x86_64 -M microvm,acpi=off,rtc=on -accel kvm -cpu host -smp 1 -m 512 -nodefaults -no-user-config \
    -display none -no-reboot -global virtio-mmio.force-legacy=false -chardev stdio,id=out -device virtio-serial-device \
    -device virtconsole,chardev=out -netdev "stream,id=net,server=off,addr.type=unix,addr.path=$run/socket" \
    -device virtio-net-device,netdev=net -kernel "$vmlinux" -initrd "$initrd" \
    -append "reboot=t panic=-1 quiet seconds=$seconds" </dev/null
