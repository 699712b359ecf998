//! A virtio driver of a few instructions, run in place of a kernel, for devices that Linux 6.12 has no driver for. What
//! it does is known before it starts: a list of 32-bit writes, to registers and to its rings, and of rings to wait for
//! (virtio 1.3, sections 2.7 and 4.2).

use std::path::Path;

use krun::{VhostUser, VmConfig};

use super::bare;
use crate::harness::{Failure, same};

/// Shows the registers, from 0xd0000000 on, at the end of the first GiB, which is all that is mapped: `mov rax, cr3;
/// mov dword [rax + 0x2ff8], 0xd0000083`, the last entry of the third page of the tables.
const MAP: [u8; 13] = [0x0f, 0x20, 0xd8, 0xc7, 0x80, 0xf8, 0x2f, 0, 0, 0x83, 0, 0, 0xd0];
const REGISTERS: u32 = 0x3fe0_0000;
/// Of each device, and how many are looked at.
const PAGE: u32 = 0x1000;
const PAGES: u32 = 4;

/// Where the queues lie, a page each: descriptors, the driver's ring, the device's ring, buffers.
const QUEUES: u32 = 0x200_0000;
const DRIVER_RING: u32 = 0x80;
const DEVICE_RING: u32 = 0xc0;
/// Of each chain: what the device reads, then what it writes.
const BUFFERS: u32 = 0x200;
const BUFFER: u32 = 0x80;
/// Descriptors of a queue; a chain takes two of them.
const QUEUE_SIZE: u32 = 8;
/// How often rings are looked at, all waits together.
const PATIENCE: u32 = u32::MAX;

mod register {
    pub const DEVICE_ID: u32 = 8;
    pub const DRIVER_FEATURES: u32 = 0x20;
    pub const DRIVER_FEATURES_SELECT: u32 = 0x24;
    pub const QUEUE_SELECT: u32 = 0x30;
    pub const QUEUE_SIZE: u32 = 0x38;
    pub const QUEUE_READY: u32 = 0x44;
    pub const QUEUE_NOTIFY: u32 = 0x50;
    pub const STATUS: u32 = 0x70;
    pub const QUEUE_DESCRIPTORS: u32 = 0x80;
    pub const QUEUE_DRIVER: u32 = 0x90;
    pub const QUEUE_DEVICE: u32 = 0xa0;
}

fn number(bytes: &[u8], at: u32) -> Option<u32> {
    bytes.get(at as usize..)?.first_chunk().copied().map(u32::from_le_bytes)
}

/// Runs a program in a machine with `device` and little else.
fn run(dir: &Path, device: VhostUser, code: &[u8]) -> Result<Vec<u8>, Failure> {
    bare::run(dir, &[&MAP[..], code].concat(), |config: &mut VmConfig| {
        config.vhost_user.push(device);
        (config.rng, config.balloon) = (false, false);
    })
}

/// The registers of a device, as a guest finds them.
pub struct Found {
    registers: Vec<u8>,
    /// Where they are.
    at: u32,
}

impl Found {
    /// Looks for the device in a machine that has it.
    pub fn new(dir: &Path, device: VhostUser) -> Result<Self, Failure> {
        let id = device.kind.id();
        let pages = run(dir, device, &bare::write_out(REGISTERS, PAGES * PAGE))?;
        for (registers, at) in pages.chunks(PAGE as usize).zip((REGISTERS..).step_by(PAGE as usize)) {
            if registers.starts_with(b"virt") && number(registers, register::DEVICE_ID) == Some(id) {
                return Ok(Self { registers: registers.to_vec(), at });
            }
        }
        Err(Failure::Wrong(format!("the guest sees no device {id}")))
    }

    /// What a register says before a driver comes.
    pub fn register(&self, at: u32) -> Option<u32> {
        number(&self.registers, at)
    }
}

/// What is to be done, as code, and what is known of it.
pub struct Driver {
    code: Vec<u8>,
    registers: u32,
    /// The heads of the chains in each queue.
    chains: Vec<Vec<u32>>,
}

impl Driver {
    /// Takes the device into service, with these features below 32 and version 1.
    pub fn new(found: &Found, features: u32, queues: u32) -> Self {
        let chains = vec![Vec::new(); queues as usize];
        let mut driver = Self { code: Vec::new(), registers: found.at, chains };
        driver.code.push(0xb9); // mov ecx, PATIENCE
        driver.code.extend(PATIENCE.to_le_bytes());
        for status in [0, 1, 3] {
            driver.set(register::STATUS, status);
        }
        for (select, features) in [(0, features), (1, 1)] {
            driver.set(register::DRIVER_FEATURES_SELECT, select);
            driver.set(register::DRIVER_FEATURES, features);
        }
        driver.set(register::STATUS, 0xb);
        for queue in 0..queues {
            let at = Self::queue(queue);
            driver.set(register::QUEUE_SELECT, queue);
            driver.set(register::QUEUE_SIZE, QUEUE_SIZE);
            driver.set(register::QUEUE_DESCRIPTORS, at);
            driver.set(register::QUEUE_DRIVER, at + DRIVER_RING);
            driver.set(register::QUEUE_DEVICE, at + DEVICE_RING);
            driver.set(register::QUEUE_READY, 1);
        }
        driver.set(register::STATUS, 0xf);
        driver
    }

    fn queue(queue: u32) -> u32 {
        QUEUES + queue * PAGE
    }

    /// `mov dword [to], value`
    fn write(&mut self, to: u32, value: u32) {
        self.code.extend([0xc7, 0x04, 0x25]);
        self.code.extend(to.to_le_bytes());
        self.code.extend(value.to_le_bytes());
    }

    fn write_all(&mut self, to: u32, words: impl IntoIterator<Item = u32>) {
        for (word, to) in words.into_iter().zip((to..).step_by(4)) {
            self.write(to, word);
        }
    }

    fn set(&mut self, register: u32, value: u32) {
        self.write(self.registers + register, value);
    }

    /// Puts a chain into a queue: `bytes` for the device to read, and room for it to write `room` bytes. Either may be
    /// empty.
    pub fn send(&mut self, queue: u32, bytes: &[u8], room: u32) -> Result<(), Failure> {
        const NEXT: u32 = 1;
        const WRITE: u32 = 2;
        let at = Self::queue(queue);
        let chains =
            self.chains.get_mut(queue as usize).filter(|chains| 2 * chains.len() < QUEUE_SIZE as usize);
        let fits = bytes.len() <= BUFFER as usize && room <= BUFFER && (room > 0 || !bytes.is_empty());
        let Some(chains) = chains.filter(|_| fits) else {
            return Err(Failure::Wrong(format!("the test's driver has no place in queue {queue}")));
        };
        let chain = chains.len() as u32;
        chains.push(2 * chain + u32::from(bytes.is_empty()));
        // The ring is written two entries at a time.
        let pair = chains.chunks(2).next_back().unwrap_or_default();
        let pair = pair.iter().rev().fold(0, |word, head| word << 16 | head);
        let buffer = at + BUFFERS + 2 * chain * BUFFER;
        let padded = |word: &[u8]| word.iter().rev().fold(0, |all, byte| all << 8 | u32::from(*byte));
        self.write_all(buffer, bytes.chunks(4).map(padded));
        // What the device leaves alone is not what it should have written.
        self.write_all(buffer + BUFFER, (0..room.div_ceil(4)).map(|_| u32::MAX));
        let flags = if room > 0 { NEXT | (2 * chain + 1) << 16 } else { 0 };
        self.write_all(at + 32 * chain, [buffer, 0, bytes.len() as u32, flags]);
        self.write_all(at + 32 * chain + 16, [buffer + BUFFER, 0, room, WRITE]);
        self.write(at + DRIVER_RING + 4 + chain / 2 * 4, pair);
        // The number of chains, and that no interrupt is wanted.
        self.write(at + DRIVER_RING, (chain + 1) << 16 | 1);
        self.set(register::QUEUE_NOTIFY, queue);
        Ok(())
    }

    /// Waits until the device has used so many chains of a queue, as long as there is patience left.
    pub fn wait(&mut self, queue: u32, count: u16) {
        self.code.extend([0xe3, 0x0c]); // jrcxz over the loop
        self.code.extend([0x66, 0x81, 0x3c, 0x25]); // again: cmp word [the ring's index], count
        self.code.extend((Self::queue(queue) + DEVICE_RING + 2).to_le_bytes());
        self.code.extend(count.to_le_bytes());
        self.code.extend([0xe0, 0xf4]); // loopne again
    }

    /// Does it all in a machine with the device.
    pub fn run(mut self, dir: &Path, device: VhostUser) -> Result<Done, Failure> {
        // The status goes behind the queues: `mov eax, [status]; mov [to], eax`.
        let end = Self::queue(self.chains.len() as u32);
        for (code, address) in [(0x8b, self.registers + register::STATUS), (0x89, end)] {
            self.code.extend([code, 0x04, 0x25]);
            self.code.extend(address.to_le_bytes());
        }
        self.code.extend(bare::write_out(QUEUES, end + 4 - QUEUES));
        let memory = run(dir, device, &self.code)?;
        same("the device's status", number(&memory, end - QUEUES), Some(0xf))?;
        Ok(Done { memory, chains: self.chains })
    }
}

/// The queues as they were at the end.
pub struct Done {
    memory: Vec<u8>,
    chains: Vec<Vec<u32>>,
}

impl Done {
    /// The first `N` bytes that the device has written into the `n`th chain of a queue, the one it has used as the
    /// `n`th.
    pub fn answer<const N: usize>(&self, queue: u32, n: u32) -> Result<[u8; N], Failure> {
        let at = queue * PAGE;
        let word = |at| number(&self.memory, at).unwrap_or_default();
        let used = word(at + DEVICE_RING) >> 16;
        if used <= n {
            return Err(Failure::Wrong(format!("queue {queue}: {used} chains were used, not {}", n + 1)));
        }
        let entry = at + DEVICE_RING + 4 + 8 * n;
        let head = self.chains.get(queue as usize).and_then(|heads| heads.get(n as usize));
        same("the chain that was used", Some(word(entry)), head.copied())?;
        let written = word(entry + 4) as usize;
        let buffer = (at + BUFFERS + (2 * n + 1) * BUFFER) as usize;
        let answer = self.memory.get(buffer..).and_then(|bytes| bytes.first_chunk());
        answer
            .filter(|_| (N..=BUFFER as usize).contains(&written))
            .copied()
            .ok_or_else(|| Failure::Wrong(format!("queue {queue}: {written} bytes in chain {n}, not {N}")))
    }
}
