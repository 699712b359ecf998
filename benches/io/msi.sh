# What an interrupt costs with virtio-pci and MSI-X, beside virtio-mmio: KVM's counts of exits under QEMU's microvm machine,
# by hand, in the emulated host, for neither kernel of ours has PCI. KERNEL is a folder with Debian's kernel and modules:
#
#   apt-get download linux-image-6.1.0-57-cloud-amd64 && dpkg -x linux-image-6.1.0-57-cloud-amd64_*.deb KERNEL
#   krun lab -- sh benches/io/msi.sh KERNEL mmio|mmio_pcie|msix
#
# Wants busybox (static), cpio and qemu-system-x86_64 on this machine.
set -eu
kernel=$1 variant=$2
. "$(dirname "$0")/../processes.sh"

# The guest says "mark" and waits for a line, so that it does nothing while the counts are read. The disk is read from after a
# first time, when the program and the path are in memory; no reads at all show what the marks themselves cost.
mkdir -p "$work/root/bin" "$work/root/dev" "$work/root/proc" "$work/root/sys"
cp "$(command -v busybox)" "$work/root/bin/busybox"
for module in virtio_ring virtio virtio_mmio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk; do
    find "$kernel" -name "$module.ko" -exec cp {} "$work/root" \;
done
cat > "$work/root/init" << 'END'
#!/bin/busybox sh
export PATH=/bin
mark() { echo "mark $*"; read -r _; }
reads() { dd if=/dev/vda of=/dev/null bs=4k count="$1" iflag=direct 2> /dev/null; }
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
stty -echo
mark boot
for m in virtio_ring virtio virtio_mmio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci; do insmod /$m.ko; done
insmod /virtio_blk.ko
for _ in $(seq 50); do [ -b /dev/vda ] || sleep 0.1; done
mark drivers
reads 10
mark first
reads 0
mark none
reads 1000
mark reads
readlink /sys/block/vda
grep virtio /proc/interrupts
mark end
END
chmod +x "$work/root/init"
(cd "$work/root" && find . | cpio -o -H newc 2> /dev/null) > "$work/initrd"
truncate -s 64M "$work/disk"

case $variant in
    mmio) machine=pcie=off device=virtio-blk-device ;;
    mmio_pcie) machine=pcie=on device=virtio-blk-device ;;
    msix) machine=pcie=on device=virtio-blk-pci,disable-legacy=on ;;
esac
[ -d /sys/kernel/debug/kvm ] || mount -t debugfs debug /sys/kernel/debug
mkfifo "$work/serial.in" "$work/serial.out"
# ACPI names the devices here: Debian's kernel does not take them from its command line.
timeout 400 qemu-system-x86_64 -M "microvm,acpi=on,$machine" -accel kvm -cpu host -smp 1 -m 256 -nodefaults -no-user-config \
    -display none -no-reboot -global virtio-mmio.force-legacy=false -chardev "pipe,id=s,path=$work/serial" -serial chardev:s \
    -object iothread,id=disk -drive "file=$work/disk,format=raw,if=none,id=d,cache=writeback,aio=io_uring" \
    -device "$device,drive=d,iothread=disk" -kernel "$kernel"/boot/vmlinuz-* -initrd "$work/initrd" \
    -append "console=ttyS0 quiet panic=-1" &
running=$!
exec 3> "$work/serial.in" 4< "$work/serial.out"

# Of the only machine that runs, so from QEMU's start on. Each mark prints what came since the one before.
names="exits mmio_exits io_exits irq_injections insn_emulation halt_exits irq_window_exits"
for name in $names; do eval "$name=0"; done
while read -r line <&4; do
    case $line in
        mark*)
            for name in $names; do
                read -r now < "/sys/kernel/debug/kvm/$name"
                eval "last=\$$name $name=$now"
                echo "$variant ${line#mark }: $name $((now - last))" | tr -d '\r'
            done
            case $line in *end*) exit ;; esac
            echo >&3
            ;;
        *) echo "guest: $line" ;;
    esac
done
