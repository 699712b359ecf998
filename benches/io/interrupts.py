"""What requests cost in exits: the host's counts of KVM before and after some thousand of them, by a sign of the guest.

interrupts.py guest DISK | interrupts.py host vsock|FOLDER
"""
import mmap
import os
import pathlib
import socket
import sys

PORT = 5001
TURNS = 1000
BULK = 64 << 20
# Of all vCPUs of all machines: one machine runs. Stays in the kernel, where not said otherwise.
COUNTS = {
    "exits": "exits",
    "mmio_exits": "of these to the program, for MMIO",
    "io_exits": "of these to the program, for ports",
    "insn_emulation": "instructions emulated",
    "irq_injections": "interrupts",
    "halt_exits": "halts",
}


def counts():
    return {name: int(pathlib.Path("/sys/kernel/debug/kvm", name).read_text()) for name in COUNTS}


def host(where):
    if not os.path.isdir("/sys/kernel/debug/kvm"):
        os.system("mount -t debugfs debug /sys/kernel/debug")
    counts()
    if where == "vsock":
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        listener.bind((socket.VMADDR_CID_ANY, PORT))
    else:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(f"{where}/{PORT}")
    listener.listen()
    print("ready", flush=True)
    while True:
        s, _ = listener.accept()
        before = counts()
        s.sendall(b"!")
        while (data := s.recv(64)) != b"":
            if data == b"?":
                after = counts()
                lines = [f"{what}\t{after[name] - before[name]}" for name, what in COUNTS.items()]
                s.sendall("\n".join(lines).encode())
                break
            s.sendall(bytes(BULK) if data == b"b" else data)
        s.close()


def measured(name, unit, work):
    """Does the work, and prints what it cost in all, for so much as `unit` says."""
    s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    s.connect((socket.VMADDR_CID_HOST, PORT))
    assert s.recv(1) == b"!"
    work(s)
    s.sendall(b"?")
    text = b""
    while part := s.recv(4096):
        text += part
    for line in text.decode().splitlines():
        print(f"figure {name}: {line}\t{unit}", flush=True)


def talk(s):
    for _ in range(TURNS):
        s.sendall(b"x")
        assert s.recv(1) == b"x"


def take(s):
    s.sendall(b"b")
    buffer, left = bytearray(1 << 20), BULK
    while left:
        left -= s.recv_into(buffer, min(left, len(buffer)))


def read(disk):
    fd = os.open(disk, os.O_RDONLY | os.O_DIRECT)
    page = mmap.mmap(-1, 4096)
    for n in range(TURNS):
        os.preadv(fd, [page], n * 4096)
    os.close(fd)


if sys.argv[1] == "host":
    host(sys.argv[2])
else:
    measured("vsock, there and back", "per 1000", talk)
    measured("vsock, host to guest", "per 64 MiB", take)
    measured("disk, read of 4 KiB", "per 1000", lambda _: read(sys.argv[2]))
