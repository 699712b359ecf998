//! A tap interface with several pairs of queues: as many as the guest has processors, fewer when the guest asks for fewer,
//! and one where the interface was made for one.

use krun::{Net, NetPeer};

use super::peers::{SERVER_TEXT, serve_dhcp};
use super::{echo_servers, in_namespace, ip};
use crate::harness::{Case, Env, Failure, no_guest, run, same};

pub const QUEUES: Case = Case { name: "net_queues", host, guest: no_guest };

/// What the guest does: looks at its interface as `ethtool` does, sends from each processor, sets the number of queues.
/// The numbers are of Linux' include/uapi/linux/ethtool.h.
const SCRIPT: &str = r#"
import array, fcntl, os, re, socket, struct, sys, threading
wanted, server, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

def ethtool(request):
    data = array.array('B', request)
    fcntl.ioctl(control, 0x8946, struct.pack('16sP', b'eth0', data.buffer_info()[0]))
    return data.tobytes()

def channels():
    answer = struct.unpack('9I', ethtool(struct.pack('9I', 0x3c, *[0] * 8)))
    return answer[4], answer[8]

def set_channels(n):
    ethtool(struct.pack('9I', 0x3d, 0, 0, 0, 0, 0, 0, 0, n))

def kicks():
    count = struct.unpack('I', ethtool(struct.pack('I', 0x3) + bytes(192))[180:184])[0]
    names = ethtool(struct.pack('3I', 0x1b, 1, count) + bytes(32 * count))[12:]
    values = struct.unpack(f'{count}Q', ethtool(struct.pack('2I', 0x1d, count) + bytes(8 * count))[8:])
    names = [names[32 * n:32 * n + 32].split(b'\0')[0].decode() for n in range(count)]
    found = {}
    for name, value in zip(names, values):
        match = re.fullmatch(r'(tx)(?:_queue_)?(\d+)_kicks', name)
        if match:
            found[match[1] + match[2]] = value
    return found

def talk(processor):
    os.sched_setaffinity(0, {processor})
    for _ in range(20):
        with socket.create_connection((server, port), 30) as s:
            noise = os.urandom(20000)
            s.settimeout(30)
            s.sendall(noise)
            seen = b''
            while len(seen) < len(noise):
                more = s.recv(65536)
                if not more:
                    break
                seen += more
            if seen != noise:
                failed.append(processor)

failed = []
def everybody():
    before = kicks()
    threads = [threading.Thread(target=talk, args=(n,)) for n in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    return {name: value - before[name] for name, value in kicks().items()}

print('queues', *sorted(os.listdir('/sys/class/net/eth0/queues')))
print('channels', *channels())
moved = everybody()
print(moved, file=sys.stderr)
print('sent by', *sorted(name for name, value in moved.items() if value > 10))
if wanted > 1:
    set_channels(1)
    moved = everybody()
    print('one', channels()[1], moved['tx0'] > 10, moved.get('tx1', 0))
    set_channels(wanted)
    moved = everybody()
    print('again', channels()[1], moved['tx1'] > 10)
    try:
        set_channels(wanted + 1)
        print('too many are taken')
    except OSError:
        pass
sys.exit(1 if failed else 0)
"#;

fn host(env: &Env) -> Result<(), Failure> {
    for (kind, lines) in [
        (
            " multi_queue",
            "queues rx-0 rx-1 tx-0 tx-1\nchannels 2 2\nsent by tx0 tx1\none 1 True 0\nagain 2 True\n",
        ),
        ("", "queues rx-0 tx-0\nchannels 1 1\nsent by tx0\n"),
    ] {
        in_namespace(|| {
            ip(&format!("tuntap add tap0 mode tap{kind}"))?;
            ip(&format!("addr add {SERVER_TEXT}/24 dev tap0"))?;
            ip("link set tap0 up")?;
            serve_dhcp()?;
            let port = echo_servers(SERVER_TEXT)?;
            let wanted = if kind.is_empty() { "1" } else { "2" };
            let words = ["-c", SCRIPT, wanted, SERVER_TEXT, &port.to_string()].map(str::to_owned);
            let mut config = env.program("python3", words);
            config.vcpus = 2;
            config.nets.push(Net::new(NetPeer::Tap("tap0".into()), 1));
            let output = run(config)?.success()?;
            same("what the guest sees", output.out(), lines.to_owned())
        })?;
    }
    Ok(())
}
