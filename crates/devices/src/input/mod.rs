//! Input devices (virtio 1.2, section 5.8): keyboards, pointers, touch screens and the like, as Linux's evdev
//! describes them.

mod config;
mod device;
mod evdev;
#[cfg(any(test, feature = "mock"))]
mod fuzz;
mod queue;
mod sys;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::BorrowedFd;

pub use config::{AxisInfo, DeviceIds, InputConfig, MAX_BYTES};
pub use device::Input;
pub use evdev::{Evdev, EvdevError};
#[cfg(any(test, feature = "mock"))]
#[doc(hidden)]
pub use fuzz::fuzz_one;
pub use queue::{InputSender, Queue, QueueFull};

/// An event, as evdev has them (Linux: Documentation/input/event-codes.rst).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InputEvent {
    /// `EV_KEY`, `EV_REL`, ...
    pub kind: u16,
    /// The key, axis, ...
    pub code: u16,
    /// 1 and 0 for a key pressed and released, the distance or position of an axis; negative ones in two's
    /// complement.
    pub value: u32,
}

impl InputEvent {
    /// Bytes of an event in a queue.
    pub(crate) const SIZE: usize = 8;

    pub(crate) fn to_bytes(self) -> [u8; Self::SIZE] {
        let ([a, b], [c, d], [e, f, g, h]) =
            (self.kind.to_le_bytes(), self.code.to_le_bytes(), self.value.to_le_bytes());
        [a, b, c, d, e, f, g, h]
    }

    pub(crate) fn from_bytes([a, b, c, d, e, f, g, h]: [u8; Self::SIZE]) -> Self {
        Self {
            kind: u16::from_le_bytes([a, b]),
            code: u16::from_le_bytes([c, d]),
            value: u32::from_le_bytes([e, f, g, h]),
        }
    }
}

/// Where a device's events come from. All but `new` of an implementation is called on the device's thread; `start`
/// and `stop` in turns, the others between them.
pub trait InputSource: Send {
    /// The guest's driver is ready.
    ///
    /// # Errors
    /// There will be no events.
    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// A descriptor that can be read from while there are events.
    ///
    /// # Errors
    /// There is none, and there will be no events.
    fn ready(&self) -> io::Result<BorrowedFd<'_>>;

    /// The next event; `None` while there is none. Does not block. After it said `None` the descriptor is not
    /// ready until there is another.
    ///
    /// # Errors
    /// There will be no more.
    fn next(&mut self) -> io::Result<Option<InputEvent>>;

    /// An event from the guest, such as a light on a keyboard. Does not block.
    fn send(&mut self, event: InputEvent) {
        let _ = event;
    }

    /// The driver is gone.
    fn stop(&mut self) {}
}
