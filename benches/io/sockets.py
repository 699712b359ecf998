"""Bulk data over vsock: one direction after the other, timed by the guest to the last byte's receipt.

sockets.py guest | sockets.py host vsock|FOLDER
"""
import socket
import sys
import threading
import time

SEND, RECEIVE, ECHO = 5001, 5002, 5003
TOTAL = 128 << 20
CHUNK = 1 << 20
TURNS = 2000


def take(s, total):
    buffer = bytearray(CHUNK)
    while total:
        n = s.recv_into(buffer, min(total, CHUNK))
        if n == 0:
            raise SystemExit(f"the stream ended {total} bytes too early")
        total -= n


def give(s, total):
    chunk = bytes(CHUNK)
    for _ in range(total // CHUNK):
        s.sendall(chunk)


def answer(listener, work):
    s, _ = listener.accept()
    work(s)
    s.close()


def echo(s):
    while data := s.recv(64):
        s.sendall(data)


def host(where):
    works = {
        SEND: lambda s: (take(s, TOTAL), s.sendall(b"!")),
        RECEIVE: lambda s: give(s, TOTAL),
        ECHO: echo,
    }
    threads = []
    for port, work in works.items():
        if where == "vsock":
            listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            listener.bind((socket.VMADDR_CID_ANY, port))
        else:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(f"{where}/{port}")
        listener.listen()
        threads.append(threading.Thread(target=answer, args=(listener, work), daemon=True))
    print("ready", flush=True)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def connect(port):
    s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    s.connect((socket.VMADDR_CID_HOST, port))
    return s


def figure(name, amount, unit, start):
    print(f"figure {name}\t{amount / (time.monotonic() - start):.2f}\t{unit}", flush=True)


def guest():
    s = connect(SEND)
    start = time.monotonic()
    give(s, TOTAL)
    take(s, 1)
    figure("vsock, guest to host", TOTAL >> 20, "MiB/s", start)
    s = connect(RECEIVE)
    start = time.monotonic()
    take(s, TOTAL)
    figure("vsock, host to guest", TOTAL >> 20, "MiB/s", start)
    s = connect(ECHO)
    start = time.monotonic()
    for _ in range(TURNS):
        s.sendall(b"x")
        take(s, 1)
    figure("vsock, there and back", TURNS, "1/s", start)


if sys.argv[1] == "host":
    host(sys.argv[2])
else:
    guest()
