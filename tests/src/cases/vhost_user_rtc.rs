//! A clock of another process (vhost-user, virtio 1.4, section 5.23). The Rust registry has no back end for it, so it is
//! a small one of our own here, on rust-vmm's side of the protocol; Linux 6.12 has no driver, so it is
//! [`Driver`]'s instructions.

use std::io;
use std::path::Path;
use std::sync::{Arc, RwLock};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use krun::{DeviceKind, VhostUser};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use super::driver::{Driver, Found};
use super::vhost_user::with;
use crate::harness::{Case, Env, Failure, TempDir, no_guest, same, start};

pub const CASE: Case = Case { name: "vhost_user_rtc", host, guest: no_guest };

type Memory = GuestMemoryMmap<()>;

/// Requests, and answers to them.
const READ: u16 = 1;
const CONFIG: u16 = 0x1000;
const CLOCK: u16 = 0x1001;
const OK: u8 = 0;
const NOT_SUPPORTED: u8 = 2;
const NO_DEVICE: u8 = 3;
const REQUESTS: u16 = 0;

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

/// The back end: one clock, that of this host, in nanoseconds of UTC.
struct Clock(GuestMemoryAtomic<Memory>);

/// The answer to a request: a status and seven zeroes, then eight bytes.
fn answer(request: [u8; 16]) -> [u8; 16] {
    let (kind, clock) = (u16::from_le_bytes([request[0], request[1]]), [request[8], request[9]]);
    let (status, value) = match kind {
        CONFIG => (OK, 1),
        CLOCK | READ if clock != [0, 0] => (NO_DEVICE, 0),
        // UTC, without a smear.
        CLOCK => (OK, 0),
        READ => (OK, now()),
        _ => (NOT_SUPPORTED, 0),
    };
    let mut answer = [0; 16];
    answer[0] = status;
    answer[8..].copy_from_slice(&value.to_le_bytes());
    answer
}

fn other(e: impl std::fmt::Display) -> io::Error {
    io::Error::other(e.to_string())
}

impl Clock {
    /// Answers one request; gives back how many bytes that is.
    fn serve(memory: &Memory, chain: DescriptorChain<GuestMemoryLoadGuard<Memory>>) -> io::Result<u32> {
        let descriptors: Vec<_> = chain.collect();
        let [request, room] = descriptors[..] else { return Err(other("not two descriptors")) };
        let mut bytes = [0; 16];
        let len = bytes.len().min(request.len() as usize);
        memory.read_slice(&mut bytes[..len], request.addr()).map_err(other)?;
        let answer = answer(bytes);
        let len = answer.len().min(room.len() as usize);
        memory.write_slice(&answer[..len], room.addr()).map_err(other)?;
        Ok(len as u32)
    }
}

impl VhostUserBackendMut for Clock {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        1 << 32 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, _: bool) {}

    fn update_memory(&mut self, memory: GuestMemoryAtomic<Memory>) -> io::Result<()> {
        self.0 = memory;
        Ok(())
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(&mut self, queue: u16, _: EventSet, vrings: &[VringRwLock], _: usize) -> io::Result<()> {
        let Some(ring) = vrings.get(usize::from(queue)).filter(|_| queue == REQUESTS) else { return Ok(()) };
        let memory = self.0.memory();
        let chains: Vec<_> = ring.get_mut().get_queue_mut().iter(memory.clone()).map_err(other)?.collect();
        for chain in chains {
            let head = chain.head_index();
            let len = Self::serve(&memory, chain)?;
            ring.add_used(head, len).map_err(other)?;
        }
        ring.signal_used_queue()
    }
}

/// Serves so many machines, one after the other.
fn serve(socket: &Path, machines: usize) -> Result<thread::JoinHandle<Result<(), String>>, Failure> {
    let mut listener = Listener::new(socket, true).map_err(|e| Failure::Wrong(e.to_string()))?;
    Ok(thread::spawn(move || {
        for _ in 0..machines {
            let memory = Memory::from_ranges(&[(GuestAddress(0), 0x1000)]).map_err(|e| e.to_string())?;
            let memory = GuestMemoryAtomic::new(memory);
            let clock = Arc::new(RwLock::new(Clock(memory.clone())));
            let mut daemon =
                VhostUserDaemon::new("clock".into(), clock, memory).map_err(|e| e.to_string())?;
            daemon.start(&mut listener).map_err(|e| e.to_string())?;
            // A machine that ends closes its connection, which is told as an error.
            let _ = daemon.wait();
        }
        Ok(())
    }))
}

/// A request of 16 bytes.
fn request(kind: u16, clock: u16) -> Vec<u8> {
    [kind, 0, 0, 0, clock, 0, 0, 0].map(u16::to_le_bytes).concat()
}

fn host(env: &Env) -> Result<(), Failure> {
    let dir = TempDir::new("vhost-rtc")?;
    let socket = dir.path().join("clock");
    let server = serve(&socket, 3)?;
    let device = || VhostUser::new(DeviceKind::RTC, &socket);

    let found = Found::new(dir.path(), device())?;
    let mut driver = Driver::new(&found, 0, 2);
    let from = now();
    for (used, (kind, clock)) in (1..).zip([(CONFIG, 0), (CLOCK, 0), (READ, 0), (READ, 7)]) {
        driver.send(0, &request(kind, clock), 16)?;
        driver.wait(0, used);
    }
    let done = driver.run(dir.path(), device())?;
    let to = now();
    // Eight bytes with the status, the lowest, then the value.
    let words = |n| -> Result<(u64, u64), Failure> {
        let number = u128::from_le_bytes(done.answer(0, n)?);
        Ok((number as u64, (number >> 64) as u64))
    };
    same("the number of clocks", words(0)?, (OK.into(), 1))?;
    same("what the first one is", words(1)?, (OK.into(), 0))?;
    same("the clock that is not there", words(3)?, (NO_DEVICE.into(), 0))?;
    let (status, time) = words(2)?;
    if status != u64::from(OK) || !(from..=to).contains(&time) {
        return Err(Failure::Wrong(format!("the clock said {status}, {time}; it was from {from} to {to}")));
    }

    let script = "cat /sys/bus/virtio/devices/*/device | grep -c 0x0011; exit 5";
    let output = start(with(env.shell(script), device()))?.finish()?;
    same("devices that Linux sees, and the end", (output.out().as_str(), output.code), ("1\n", 5))?;
    let server = server.join().map_err(|_| Failure::Wrong("the back end panicked".into()))?;
    server.map_err(Failure::Wrong)
}
