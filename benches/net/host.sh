# The host half of `cargo xtask bench net`: sh host.sh krun|qemu passt|gvproxy|tap SECONDS. Runs a guest on that network
# and prints its figures, with the exits of its vCPUs to the host's kernel for each.
# KRUN, BUNDLE, KERNEL, ROOT, INITRD, TRAFFIC, GVPROXY: the command, the library with the kernel, the same kernel as a
# file, the guest's root, the same as an initial RAM disk, the traffic program, gvproxy.
set -eu
# A network of its own, which goes away with everything in it.
[ "${ALONE:-}" ] || ALONE=1 exec unshare -n sh "$0" "$@"
vmm=$1 peer=$2 seconds=$3
. "$(dirname "$0")/../processes.sh"

start() {
    "$@" < /dev/null > "$work/${1##*/}.log" 2>&1 &
    running="$running $!"
}
listens() { grep -q "00010000 .*$1" /proc/net/unix; }

ip link set lo up
# What the guest has, and where it finds the servers of this host.
case $peer in
passt)
    ip link add up0 type veth peer name up1
    ip addr add 192.168.77.2/24 dev up0
    ip link set up0 up
    ip link set up1 up
    ip route add default via 192.168.77.1 dev up0
    network=192.168.77.2/192.168.77.1/192.168.77.1/65520
    start passt --foreground --quiet --runas 0 -t none -u none --socket "$work/socket"
    ;;
gvproxy)
    network=192.168.127.9/192.168.127.1/192.168.127.254/1500
    start "$GVPROXY" -ssh-port -1 -listen "unix://$work/services" -listen-qemu "unix://$work/socket"
    ;;
tap)
    ip tuntap add tap0 mode tap
    ip addr add 192.168.77.1/24 dev tap0
    ip link set tap0 up
    network=192.168.77.2/192.168.77.1/192.168.77.1/1500
    ;;
esac
[ "$peer" = tap ] || await listens "$work/socket"
start iperf3 -s
start "$TRAFFIC" serve 0.0.0.0 5300

krun() {
    net=unix-stream:$work/socket
    [ "$peer" != tap ] || net=tap:tap0
    "$KRUN" run --accel kvm --cpus 1 --memory 512M --kernel "$BUNDLE" --root "$ROOT" --net "$net,dhcp=off" \
        -- /bin/sh /guest "$network" "$seconds"
}

qemu() {
    net=stream,id=net,server=off,addr.type=unix,addr.path=$work/socket
    [ "$peer" != tap ] || net=tap,id=net,ifname=tap0,script=no,downscript=no
    qemu-system-x86_64 -M microvm,acpi=off,rtc=on -accel kvm -cpu host -smp 1 -m 512 -nodefaults -no-user-config \
        -display none -no-reboot -global virtio-mmio.force-legacy=false -chardev stdio,id=out \
        -device virtio-serial-device -device virtconsole,chardev=out -netdev "$net" \
        -device virtio-net-device,netdev=net -kernel "$KERNEL" -initrd "$INITRD" \
        -append "reboot=t panic=-1 quiet bench=$network,$seconds"
}

exits() { cat /sys/kernel/debug/kvm/exits 2> /dev/null || echo 0; }
grep -q debugfs /proc/mounts || mount -t debugfs debug /sys/kernel/debug 2> /dev/null || true

# Passes figures on, each with the exits since its begin.
figures() {
    cr=$(printf '\r')
    while read -r word rest; do
        rest=${rest%"$cr"}
        case ${word%"$cr"} in
        begin) before=$(exits) ;;
        end) now=$(($(exits) - before)) ;;
        figure)
            printf '%s\n' "$rest"
            # NAME<tab>VALUE<tab>UNIT; what was moved in the time, in the unit without its "/s"
            printf '%s' "$rest" | awk -F '\t' -v exits="$now" -v seconds="$seconds" \
                '$2 > 0 { sub("bit/s", "bit", $3); sub("1/s", "1", $3);
                    printf "exits: %s\t%.3f\texits/%s\n", $1, exits / ($2 * seconds), $3 }'
            ;;
        bad) echo "$vmm $peer: $rest" >&2 ;;
        esac
    done
}

{ "$vmm" < /dev/null 2> "$work/err" || echo "bad status $?"; } | tee "$work/out" | figures > "$work/figures"
if [ ! -s "$work/figures" ] || grep -q '^bad' "$work/out"; then
    tail -n 20 "$work/out" "$work/err" "$work"/*.log >&2 2> /dev/null || true
    exit 1
fi
cat "$work/figures"
