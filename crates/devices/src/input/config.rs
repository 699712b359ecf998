//! What a device can do, and how its driver asks for that (virtio 1.2, section 5.8.4).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU16, Ordering};

use krun_virtio::ConfigSpace;

/// Most bytes of a name, a serial number or a bitmap.
pub const MAX_BYTES: usize = 128;

/// Identity of a device, as in Linux's `struct input_id`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceIds {
    /// `BUS_USB`, `BUS_VIRTUAL`, ...
    pub bus: u16,
    /// Vendor.
    pub vendor: u16,
    /// Product.
    pub product: u16,
    /// Version.
    pub version: u16,
}

/// An absolute axis, as in Linux's `struct input_absinfo`; negative numbers in two's complement.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AxisInfo {
    /// Least value.
    pub min: u32,
    /// Greatest value.
    pub max: u32,
    /// Changes up to this are noise.
    pub fuzz: u32,
    /// Values up to this around the middle are the middle.
    pub flat: u32,
    /// Units per millimetre, or per radian.
    pub resolution: u32,
}

/// What a device is and can do. Of names and bitmaps the guest sees the first [`MAX_BYTES`] bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InputConfig {
    /// Name, for people.
    pub name: Vec<u8>,
    /// Serial number, or anything that tells it from others of its kind.
    pub serial: Vec<u8>,
    /// Identity.
    pub ids: DeviceIds,
    /// `INPUT_PROP_*`, one bit each, the lowest bit of the first byte first.
    pub properties: Vec<u8>,
    /// For each event type (`EV_KEY`, ...) its codes, one bit each.
    pub events: BTreeMap<u8, Vec<u8>>,
    /// For each code of `EV_ABS` its axis.
    pub axes: BTreeMap<u8, AxisInfo>,
}

impl InputConfig {
    /// A device that knows nothing yet.
    pub fn new(name: &str) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// Adds `codes` of the event type `kind`; codes past the bitmap's 1024 are left out.
    #[must_use]
    pub fn with(mut self, kind: u8, codes: impl IntoIterator<Item = u16>) -> Self {
        let bits = self.events.entry(kind).or_default();
        for code in codes.into_iter().map(usize::from).filter(|code| *code < MAX_BYTES * 8) {
            if bits.len() <= code / 8 {
                bits.resize(code / 8 + 1, 0);
            }
            bits[code / 8] |= 1 << (code % 8);
        }
        self
    }

    /// Adds an absolute axis.
    #[must_use]
    pub fn with_axis(mut self, code: u8, info: AxisInfo) -> Self {
        self.axes.insert(code, info);
        self.with(EV_ABS, [u16::from(code)])
    }

    /// The answer to a question of the driver; empty if there is none.
    fn answer(&self, select: u8, subsel: u8) -> Vec<u8> {
        let mut bytes = match (select, subsel) {
            (select::NAME, 0) => self.name.clone(),
            (select::SERIAL, 0) => self.serial.clone(),
            (select::IDS, 0) => {
                let DeviceIds { bus, vendor, product, version } = self.ids;
                [bus, vendor, product, version].map(u16::to_le_bytes).concat()
            }
            (select::PROPERTIES, 0) => trimmed(&self.properties),
            (select::EVENTS, kind) => self.events.get(&kind).map(|bits| trimmed(bits)).unwrap_or_default(),
            (select::AXIS, code) => self.axes.get(&code).map_or_else(Vec::new, |axis| {
                [axis.min, axis.max, axis.fuzz, axis.flat, axis.resolution].map(u32::to_le_bytes).concat()
            }),
            _ => Vec::new(),
        };
        bytes.truncate(MAX_BYTES);
        bytes
    }
}

/// `EV_ABS`.
const EV_ABS: u8 = 3;

/// A bitmap without the zeroes at its end.
fn trimmed(bits: &[u8]) -> Vec<u8> {
    let len = bits.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
    bits[..len].to_vec()
}

/// Questions of the driver.
mod select {
    pub const NAME: u8 = 0x01;
    pub const SERIAL: u8 = 0x02;
    pub const IDS: u8 = 0x03;
    pub const PROPERTIES: u8 = 0x10;
    pub const EVENTS: u8 = 0x11;
    pub const AXIS: u8 = 0x12;
}

/// Bytes before the answer.
const HEADER: usize = 8;

/// The configuration space: the driver writes a question and reads the answer.
#[derive(Debug)]
pub(super) struct Answers {
    config: InputConfig,
    /// The question: `select`, and in the upper byte `subsel`.
    question: AtomicU16,
}

impl Answers {
    pub fn new(config: InputConfig) -> Self {
        Self { config, question: AtomicU16::new(0) }
    }

    /// Forgets the question.
    pub fn reset(&self) {
        self.question.store(0, Ordering::Relaxed);
    }
}

impl ConfigSpace for Answers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let [select, subsel] = self.question.load(Ordering::Relaxed).to_le_bytes();
        let answer = self.config.answer(select, subsel);
        // At most 128, so it fits.
        let mut all = [0; HEADER + MAX_BYTES];
        all[..3].copy_from_slice(&[select, subsel, answer.len() as u8]);
        all[HEADER..HEADER + answer.len()].copy_from_slice(&answer);
        data.fill(0);
        let from = usize::try_from(offset).ok().and_then(|at| all.get(at..)).unwrap_or_default();
        let known = from.len().min(data.len());
        data[..known].copy_from_slice(&from[..known]);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // Another vCPU that writes at the same time is the driver's own trouble.
        let [select, subsel] = self.question.load(Ordering::Relaxed).to_le_bytes();
        let question = match (offset, data) {
            (0, [select]) => [*select, subsel],
            (1, [subsel]) => [select, *subsel],
            (0, [select, subsel]) => [*select, *subsel],
            _ => return,
        };
        self.question.store(u16::from_le_bytes(question), Ordering::Relaxed);
    }
}
