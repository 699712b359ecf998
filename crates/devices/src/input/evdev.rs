//! A device of the host's Linux (`/dev/input/event*`).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::config::{AxisInfo, DeviceIds, InputConfig};
use super::{InputEvent, InputSource, sys};

/// `EV_KEY` to `EV_SND`: the types whose codes a device has.
const KINDS: [u8; 7] = [1, 2, 3, 4, 5, 0x11, 0x12];
const EV_ABS: u8 = 3;
/// Repeats keys by itself.
const EV_REP: u8 = 0x14;

/// A descriptor that is no input device.
#[derive(Debug, thiserror::Error)]
#[error("not an input device (/dev/input/event*): {source}")]
pub struct EvdevError {
    /// The host's answer.
    source: io::Error,
}

/// The events of an input device of the host.
///
/// Whether the host sees them too is for the opener to say (`EVIOCGRAB`).
#[derive(Debug)]
pub struct Evdev {
    fd: OwnedFd,
    waiting: VecDeque<InputEvent>,
    /// The guest's events could not be passed on, and that was said.
    warned: bool,
}

impl Evdev {
    /// Asks the device what it can do.
    ///
    /// # Errors
    /// [`EvdevError`].
    pub fn new(fd: OwnedFd) -> Result<(InputConfig, Self), EvdevError> {
        let config = describe(fd.as_fd()).map_err(|source| EvdevError { source })?;
        Ok((config, Self { fd, waiting: VecDeque::new(), warned: false }))
    }
}

fn has(bits: &[u8], bit: u8) -> bool {
    bits.get(usize::from(bit / 8)).is_some_and(|byte| byte & 1 << (bit % 8) != 0)
}

fn describe(fd: BorrowedFd<'_>) -> io::Result<InputConfig> {
    let [bus, vendor, product, version] = sys::ids(fd)?;
    let text = |mut bytes: Vec<u8>| {
        bytes.truncate(bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len()));
        bytes
    };
    let mut config = InputConfig {
        name: text(sys::name(fd)?),
        // A device need not have one.
        serial: sys::serial(fd).map(text).unwrap_or_default(),
        ids: DeviceIds { bus, vendor, product, version },
        properties: sys::properties(fd)?,
        ..InputConfig::default()
    };
    let kinds = sys::codes(fd, 0)?;
    for kind in KINDS.into_iter().filter(|kind| has(&kinds, *kind)) {
        config.events.insert(kind, sys::codes(fd, kind)?);
    }
    if has(&kinds, EV_REP) {
        // Delay and period; that there are bits is all that a driver looks for.
        config.events.insert(EV_REP, vec![0b11]);
    }
    let axes = config.events.get(&EV_ABS).cloned().unwrap_or_default();
    for axis in (0..64).filter(|axis| has(&axes, *axis)) {
        let [min, max, fuzz, flat, resolution] = sys::axis(fd, axis)?;
        config.axes.insert(axis, AxisInfo { min, max, fuzz, flat, resolution });
    }
    Ok(config)
}

impl InputSource for Evdev {
    fn ready(&self) -> io::Result<BorrowedFd<'_>> {
        Ok(self.fd.as_fd())
    }

    fn next(&mut self) -> io::Result<Option<InputEvent>> {
        if self.waiting.is_empty() && sys::is_readable(self.fd.as_fd())? {
            self.waiting = sys::read(self.fd.as_fd())?.into();
        }
        Ok(self.waiting.pop_front())
    }

    fn send(&mut self, event: InputEvent) {
        if let Err(e) = sys::write(self.fd.as_fd(), event)
            && !self.warned
        {
            tracing::warn!("an input device takes no events, such as lights, from the guest: {e}");
            self.warned = true;
        }
    }

    fn stop(&mut self) {
        self.waiting.clear();
    }
}
