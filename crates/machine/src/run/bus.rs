//! Where an access of a vCPU goes.

use krun_devices::legacy::{Ports, Request};
use krun_memory::GuestAddress;
use krun_virtio::MmioTransport;
use krun_virtio::mmio::{reg, status};

use crate::board::{MMIO_BASE, MMIO_SIZE};

/// All that answers accesses. No lock: vCPUs share it as it is.
#[derive(Debug)]
pub struct Bus {
    /// I/O ports.
    pub ports: Ports,
    /// Devices by slot: window `n` starts at `MMIO_BASE + n * MMIO_SIZE`.
    pub slots: Vec<MmioTransport>,
}

impl Bus {
    fn slot(&self, at: GuestAddress) -> Option<(&MmioTransport, u64)> {
        let offset = at.0.checked_sub(MMIO_BASE)?;
        let slot = self.slots.get(usize::try_from(offset / MMIO_SIZE).ok()?)?;
        Some((slot, offset % MMIO_SIZE))
    }

    /// The guest reads memory that is none; nothing there reads as all ones.
    pub fn read(&self, at: GuestAddress, size: u8) -> [u8; 8] {
        let mut data = [0xff; 8];
        let size = usize::from(size).min(8);
        if let Some((slot, offset)) = self.slot(at) {
            slot.read(offset, &mut data[..size]);
        }
        data
    }

    /// The guest writes memory that is none. True if that took a running device out of service.
    pub fn write(&self, at: GuestAddress, size: u8, data: [u8; 8]) -> bool {
        let Some((slot, offset)) = self.slot(at) else { return false };
        let data = &data[..usize::from(size).min(8)];
        let was_running = offset == reg::STATUS && data == [0; 4] && {
            let mut before = [0; 4];
            slot.read(offset, &mut before);
            u32::from_le_bytes(before) & status::DRIVER_OK != 0
        };
        slot.write(offset, data);
        was_running
    }

    /// The guest reads an I/O port.
    pub fn port_in(&self, port: u16, size: u8) -> [u8; 8] {
        let mut data = [0; 8];
        self.ports.read(port, &mut data[..usize::from(size).min(4)]);
        data
    }

    /// The guest writes an I/O port.
    pub fn port_out(&self, port: u16, size: u8, data: [u8; 4]) -> Request {
        self.ports.write(port, &data[..usize::from(size).min(4)])
    }
}
