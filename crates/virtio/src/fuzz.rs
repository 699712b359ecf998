//! Bodies of the fuzz targets, here so that plain tests run them too. They panic when a promise is broken.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};

use krun_memory::{Bytes, GuestAddress, GuestMemory, Mapping};

use crate::chain::Chain;
use crate::mmio::{MMIO_SIZE, MmioTransport, RegisterPages, reg, status};
use crate::mock::Echo;
use crate::queue::{Queue, QueueAddresses, QueueState};

/// Guest memory of the targets: two mappings side by side, so that rings and buffers cross the seam.
const AT: u64 = 0x4000;
const HALF: usize = 0x2000;

fn memory() -> GuestMemory {
    let part = |i: u64| (GuestAddress(AT + i * HALF as u64), Mapping::anonymous(HALF).unwrap());
    krun_memory::assemble(&[part(0), part(1)]).unwrap()
}

/// Takes values off the front of the input; zero when it is used up.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (head, tail) = self.0.split_at(len.min(self.0.len()));
        self.0 = tail;
        head
    }

    fn u8(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Stores some of the input somewhere in guest memory.
    fn poke(&mut self, memory: &GuestMemory) {
        let at = u64::from(self.u16()) % (2 * HALF as u64);
        let len = usize::from(self.u8() % 32);
        // What runs past the end is cut off.
        let _ = memory.write(self.bytes(len), GuestAddress(AT + at));
    }
}

/// A device at work on rings that are made of the input.
pub fn queue(data: &[u8]) {
    let mut input = Input(data);
    let memory = memory();
    let size = 1u32 << (input.u8() % 9);
    let features = u64::from(input.u8() & 3) << 28 | 1 << 32;
    let start = input.u16();
    let n = u64::from(size);
    // As a driver lays them out, but up to the input where.
    let desc = AT + u64::from(input.u8()) * 16;
    let at =
        QueueAddresses { desc, avail: desc + 16 * n, used: (desc + 16 * n + 6 + 2 * n).next_multiple_of(4) };
    let Ok(queue) = Queue::new(&memory, size, 256, at, features) else { return };
    let mut queue = queue.with_state(QueueState { next_avail: start, next_used: start });
    let avail_idx = GuestAddress(at.avail + 2);
    memory.write_obj(start, avail_idx).unwrap();
    let mut held: Vec<Chain> = Vec::new();
    while !input.is_empty() {
        match input.u8() % 9 {
            0 => input.poke(&memory),
            1 => {
                // A well-formed descriptor, and the head made available.
                let (index, len, flags) = (u64::from(input.u8()) % n, input.u16(), input.u8());
                let mut raw = [0; 16];
                raw[..8].copy_from_slice(&(AT + u64::from(input.u16()) % (2 * HALF as u64)).to_le_bytes());
                raw[8..10].copy_from_slice(&len.to_le_bytes());
                raw[12] = flags & 7;
                raw[14] = input.u8();
                memory.write_slice(&raw, GuestAddress(at.desc + 16 * index)).unwrap();
                let avail: u16 = memory.read_obj(avail_idx).unwrap();
                let slot = at.avail + 4 + 2 * (u64::from(avail) % n);
                memory.write_obj(index as u16, GuestAddress(slot)).unwrap();
                memory.write_obj(avail.wrapping_add(1), avail_idx).unwrap();
            }
            2 | 3 => {
                let before = queue.state();
                match queue.pop(&memory) {
                    Ok(Some(chain)) => {
                        use_chain(&memory, &chain);
                        held.push(chain);
                    }
                    Ok(None) => assert_eq!(queue.state(), before),
                    Err(e) => {
                        assert!(!e.to_string().is_empty());
                        assert_eq!(queue.state(), before, "an error moves nothing");
                    }
                }
            }
            4 | 5 => {
                if !held.is_empty() {
                    let chain = held.swap_remove(usize::from(input.u8()) % held.len());
                    let room = chain.writable_len();
                    queue.complete(&memory, chain, room).unwrap();
                }
            }
            6 => {
                if let Some(chain) = held.pop() {
                    queue.unpop(chain);
                }
            }
            7 => {
                queue.take_interrupt(&memory).unwrap();
            }
            _ => {
                queue.disable_notifications(&memory).unwrap();
                let _ = queue.enable_notifications(&memory);
            }
        }
        assert_eq!(usize::from(queue.in_use()), held.len());
        assert!(held.len() <= size as usize, "more chains than the queue has entries");
    }
}

/// Reads and writes all of a chain, up to a limit, and compares with what it says of itself.
fn use_chain(memory: &GuestMemory, chain: &Chain) {
    let mut reader = chain.reader(memory);
    let mut writer = chain.writer(memory);
    assert_eq!(reader.remaining(), chain.readable_len() as usize);
    assert_eq!(writer.remaining(), chain.writable_len() as usize);
    let mut buffer = vec![0; reader.remaining().min(4 * HALF)];
    reader.read_exact(&mut buffer).unwrap();
    assert_eq!(reader.consumed(), buffer.len());
    let rest = writer.split_at(writer.remaining() / 2);
    assert_eq!(writer.remaining() + rest.remaining(), chain.writable_len() as usize);
    // Not stored: it would overwrite the rings of the input with what the input is not.
    assert_eq!(writer.write(&[]).unwrap(), 0);
}

/// A guest's accesses to a device's registers, with rings made of the input as well.
pub fn mmio(data: &[u8]) {
    let mut input = Input(data);
    let memory = memory();
    let pages = RegisterPages::new(1).unwrap();
    let page = pages.page(0).unwrap();
    let transport = MmioTransport::new(Box::new(Echo::new(2)), memory.clone(), page, || (), |_| ()).unwrap();
    let mut steps = 0;
    while !input.is_empty() && steps < 256 {
        steps += 1;
        match input.u8() % 8 {
            0 => input.poke(&memory),
            1 => bring_up(&transport, &mut input),
            2 => transport.doorbells()[usize::from(input.u8() & 1)].wake(),
            3 | 4 => {
                let mut data = [0xaa; 9];
                let len = usize::from(input.u8()) % data.len();
                transport.read(u64::from(input.u16()) % (2 * MMIO_SIZE), &mut data[..len]);
            }
            5 => {
                let at = u64::from(input.u16()) % (2 * MMIO_SIZE);
                let len = usize::from(input.u8() % 9);
                transport.write(at, input.bytes(len));
            }
            _ => {
                // A register, as most accesses are.
                let at = u64::from(input.u8() & 0x3f) * 4;
                let value = if input.u8() & 1 == 0 { u32::from(input.u8()) } else { input.u32() };
                transport.write(at, &value.to_le_bytes());
            }
        }
        check(&transport);
    }
    // A panic of the device is no fault of the transport; anything else must end in good order.
    let _ = transport.shutdown(input.u8() & 1 == 0);
}

/// What a driver does to start the device, so that the input need not find it by chance.
fn bring_up(transport: &MmioTransport, input: &mut Input<'_>) {
    let set = |at: u64, value: u32| transport.write(at, &value.to_le_bytes());
    set(reg::STATUS, 0);
    set(reg::STATUS, status::ACKNOWLEDGE | status::DRIVER);
    set(reg::DRIVER_FEATURES_SEL, 1);
    set(reg::DRIVER_FEATURES, 1);
    set(reg::DRIVER_FEATURES_SEL, 0);
    set(reg::DRIVER_FEATURES, u32::from(input.u8() & 3) << 28);
    set(reg::STATUS, status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
    for queue in 0..2u64 {
        set(reg::QUEUE_SEL, queue as u32);
        set(reg::QUEUE_NUM, 1 << (input.u8() % 7));
        let base = AT as u32 + u32::from(input.u8()) * 64;
        set(reg::QUEUE_DESC, base);
        set(reg::QUEUE_AVAIL, base + 0x400);
        set(reg::QUEUE_USED, base + 0x600);
        set(reg::QUEUE_READY, 1);
    }
    set(reg::STATUS, status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK);
}

/// What holds at all times.
fn check(transport: &MmioTransport) {
    let get = |at: u64| {
        let mut data = [0; 4];
        transport.read(at, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!(get(reg::MAGIC), u32::from_le_bytes(*b"virt"));
    let now = get(reg::STATUS);
    assert!(now & status::DRIVER_OK == 0 || now & status::FEATURES_OK != 0, "runs without features");
    assert!(now & status::FEATURES_OK == 0 || now & status::DRIVER != 0, "features without a driver");
    assert!(now & status::DRIVER == 0 || now & status::ACKNOWLEDGE != 0, "a driver without a guest");
}
