//! Kinds of devices, and what a front end has to know of each.

use std::fmt;
use std::str::FromStr;

/// What a device is: its virtio device id (virtio 1.3, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DeviceKind(u32);

/// What is known of a kind.
struct Facts {
    id: u32,
    name: &'static str,
    /// Sizes of the queues that a driver expects, which all back ends of this kind take.
    queues: &'static [u16],
    /// Lengths of the configuration space: the newest first, then those of older back ends.
    config: &'static [usize],
    /// Queues with what the driver wants to get out.
    outputs: &'static [usize],
}

const KINDS: &[Facts] = &[
    Facts { id: 1, name: "net", queues: &[256; 2], config: &[24, 20, 12, 10, 8], outputs: &[] },
    Facts { id: 2, name: "block", queues: &[256], config: &[96, 72, 60, 36, 24, 8], outputs: &[] },
    Facts { id: 3, name: "console", queues: &[128, 128, 64, 64], config: &[12], outputs: &[1] },
    Facts { id: 4, name: "rng", queues: &[256], config: &[], outputs: &[] },
    Facts { id: 8, name: "scsi", queues: &[128; 3], config: &[36], outputs: &[] },
    Facts { id: 17, name: "rtc", queues: &[1024; 2], config: &[], outputs: &[] },
    Facts { id: 18, name: "input", queues: &[1024; 2], config: &[136], outputs: &[] },
    Facts { id: 19, name: "vsock", queues: &[128; 3], config: &[8], outputs: &[1] },
    Facts { id: 25, name: "snd", queues: &[64; 4], config: &[16, 12], outputs: &[] },
    Facts { id: 26, name: "fs", queues: &[128, 1024], config: &[44, 40], outputs: &[] },
    Facts { id: 32, name: "scmi", queues: &[256; 2], config: &[], outputs: &[] },
    Facts { id: 34, name: "i2c", queues: &[256], config: &[], outputs: &[] },
    Facts { id: 36, name: "can", queues: &[64; 3], config: &[2], outputs: &[] },
    Facts { id: 41, name: "gpio", queues: &[256; 2], config: &[8], outputs: &[] },
];

/// Size of a queue of which nothing is known.
const QUEUE_SIZE: u16 = 256;

impl DeviceKind {
    /// A network interface.
    pub const NET: Self = Self(1);
    /// A disk.
    pub const BLOCK: Self = Self(2);
    /// Consoles.
    pub const CONSOLE: Self = Self(3);
    /// Random numbers.
    pub const RNG: Self = Self(4);
    /// A clock.
    pub const RTC: Self = Self(17);
    /// An input device.
    pub const INPUT: Self = Self(18);
    /// Sockets.
    pub const VSOCK: Self = Self(19);
    /// Sound.
    pub const SND: Self = Self(25);
    /// A share.
    pub const FS: Self = Self(26);
    /// A CAN bus.
    pub const CAN: Self = Self(36);

    /// The kind with a virtio device id; `None` for 0, which is no device.
    pub fn from_id(id: u32) -> Option<Self> {
        (id != 0).then_some(Self(id))
    }

    /// Its virtio device id.
    pub fn id(self) -> u32 {
        self.0
    }

    fn facts(self) -> Option<&'static Facts> {
        KINDS.iter().find(|f| f.id == self.0)
    }

    /// How many queues a driver expects at least.
    pub(super) fn least_queues(self) -> usize {
        self.facts().map_or(1, |f| f.queues.len())
    }

    /// Size of a queue, unless somebody says otherwise.
    pub(super) fn queue_size(self, queue: usize) -> u16 {
        let queues = self.facts().map_or(&[][..], |f| f.queues);
        *queues.get(queue).or(queues.last()).unwrap_or(&QUEUE_SIZE)
    }

    /// Lengths of the configuration space to ask for; `None` when nothing is known of the kind.
    pub(super) fn config_lengths(self) -> Option<&'static [usize]> {
        self.facts().map(|f| f.config)
    }

    /// Queues that must be empty before the device stops in good order.
    pub(super) fn outputs(self) -> &'static [usize] {
        self.facts().map_or(&[], |f| f.outputs)
    }

    /// Whether the back end is to be told of what the driver has put into a queue before the start. Not of buffers for
    /// events of a sound device: no driver tells of them either, and vhost-device-sound 0.3, once it is told, looks for
    /// requests there and does nothing else any more. The price: a back end that takes a ring as started with its first
    /// notification only, as the protocol's text has long had it, can never send an event of a sound device. Those that
    /// begin when they get the descriptor can.
    pub(super) fn is_told(self, queue: usize) -> bool {
        (self, queue) != (Self::SND, 1)
    }

    /// Names of the kinds that have one.
    pub fn names() -> impl Iterator<Item = &'static str> {
        KINDS.iter().map(|f| f.name)
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.facts() {
            Some(facts) => f.write_str(facts.name),
            None => write!(f, "{}", self.0),
        }
    }
}

/// There is no such kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no kind of device {0:?}")]
pub struct KindError(String);

/// A name, or a virtio device id.
impl FromStr for DeviceKind {
    type Err = KindError;

    fn from_str(text: &str) -> Result<Self, KindError> {
        let named = KINDS.iter().find(|f| f.name == text).map(|f| Self(f.id));
        let number = || text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten();
        named.or_else(|| number().and_then(Self::from_id)).ok_or_else(|| KindError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_names_or_numbers() {
        for name in DeviceKind::names() {
            assert_eq!(name.parse::<DeviceKind>().unwrap().to_string(), name);
        }
        assert_eq!("19".parse(), Ok(DeviceKind::VSOCK));
        assert_eq!("99".parse::<DeviceKind>().unwrap().to_string(), "99");
        for bad in ["", "0", "+4", "blk", "4294967296"] {
            assert!(bad.parse::<DeviceKind>().is_err(), "{bad}");
        }
    }

    #[test]
    fn queues_have_sizes_whatever_the_kind() {
        assert_eq!([0, 1, 3, 9].map(|q| DeviceKind::CONSOLE.queue_size(q)), [128, 128, 64, 64]);
        let unknown = DeviceKind::from_id(99).unwrap();
        assert_eq!((unknown.least_queues(), unknown.queue_size(5)), (1, 256));
        assert_eq!([0, 1, 2, 3].map(|q| DeviceKind::SND.is_told(q)), [true, false, true, true]);
    }
}
