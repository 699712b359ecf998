//! The entropy device (virtio 1.2, section 5.4): random bytes from the host's kernel.

#[cfg(any(test, feature = "mock"))]
mod fuzz;

#[cfg(any(test, feature = "mock"))]
#[doc(hidden)]
pub use fuzz::fuzz_one;

use std::io::{self, Write};
use std::sync::Arc;

use krun_virtio::{ConfigSpace, Cx, DeviceError, DeviceInfo, VirtioDevice, Writer};
use rustix::rand::{GetRandomFlags, getrandom};

const QUEUE_SIZE: u16 = 8;
/// Most bytes for one request; the driver has to cope with fewer than it asked for.
const LIMIT: usize = 64 << 10;

/// The entropy device. It has no state.
#[derive(Debug, Default)]
pub struct Rng {
    _private: (),
}

struct NoConfig;

impl ConfigSpace for NoConfig {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
}

impl Rng {
    /// Virtio device id.
    pub const ID: u32 = 4;

    /// Creates one.
    pub fn new() -> Self {
        Self::default()
    }
}

/// Fills `out` up to the limit.
fn fill(out: &mut Writer<'_>) -> io::Result<()> {
    let mut bytes = [0u8; 4096];
    let mut left = out.remaining().min(LIMIT);
    while left > 0 {
        let part = left.min(bytes.len());
        let n = match getrandom(&mut bytes[..part], GetRandomFlags::empty()) {
            Ok(n) => n,
            Err(rustix::io::Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
        };
        out.write_all(&bytes[..n])?;
        left -= n;
    }
    Ok(())
}

impl VirtioDevice for Rng {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: Self::ID,
            name: "rng".into(),
            features: 0,
            queue_sizes: vec![QUEUE_SIZE],
            shm: Vec::new(),
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::new(NoConfig)
    }

    fn start(&mut self, _cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn on_queue(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        while let Some(chain) = cx.pop(queue)? {
            let mut out = chain.writer(cx.memory());
            fill(&mut out).map_err(|source| DeviceError::Host { what: "getrandom".into(), source })?;
            let written = out.written();
            cx.complete(queue, chain, written)?;
        }
        Ok(())
    }

    fn stop(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use krun_virtio::mock::Harness;

    #[test]
    fn fills_what_was_asked_for_up_to_the_limit() {
        let mut h = Harness::new(Rng::new());
        let a = h.request(0, &[], &[64]).unwrap().data;
        let b = h.request(0, &[], &[32, 32]).unwrap().data;
        assert_eq!((a.len(), b.len()), (64, 64));
        assert_ne!(a, b);
        let big = h.request(0, &[], &[1 << 20]).unwrap();
        assert_eq!(big.written as usize, LIMIT);
        assert!(big.data[LIMIT - 64..].iter().any(|x| *x != 0));
    }

    #[test]
    fn requests_without_room_come_back_empty() {
        let mut h = Harness::new(Rng::new());
        assert_eq!(h.request(0, &[b"?"], &[]).unwrap().written, 0);
        assert_eq!(h.request(0, &[b"?"], &[5]).unwrap().written, 5);
        h.restart().unwrap();
        assert_eq!(h.request(0, &[], &[7]).unwrap().written, 7);
    }
}
