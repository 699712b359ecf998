//! A device that answers each chain with the bytes it brought.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::device::{ConfigSpace, Cx, DeviceError, DeviceInfo, ShmRegion, VirtioDevice};

/// Copies the readable part of each chain to its writable part, on every queue. A chain that begins
/// with [`Echo::ERROR`] fails it, one with [`Echo::PANIC`] makes it panic, and one with [`Echo::STALL`]
/// fails in [`VirtioDevice::drain`] if it is still there.
#[derive(Debug, Default)]
pub struct Echo {
    config: Arc<EchoConfig>,
    queues: usize,
    /// Whether it is started; a wrong order of calls panics.
    started: bool,
}

/// Four writable bytes.
#[derive(Debug, Default)]
struct EchoConfig {
    word: AtomicU32,
}

impl Echo {
    /// Fails the device.
    pub const ERROR: u8 = 0xe1;
    /// Makes it panic.
    pub const PANIC: u8 = 0xe2;
    /// Is left in the queue.
    pub const STALL: u8 = 0xe3;
    /// Size of its queues.
    pub const QUEUE_SIZE: u16 = 64;
    /// Feature bits of its own.
    pub const FEATURES: u64 = 0x5;

    /// One with `queues` queues.
    pub fn new(queues: usize) -> Self {
        Self { queues, ..Self::default() }
    }
}

impl ConfigSpace for EchoConfig {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let word = self.word.load(Ordering::Relaxed).to_le_bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = usize::try_from(offset).ok().and_then(|o| word.get(o + i)).copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Ok(word)) = (offset, <[u8; 4]>::try_from(data)) {
            self.word.store(u32::from_le_bytes(word), Ordering::Relaxed);
        }
    }
}

impl VirtioDevice for Echo {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: 42,
            name: "echo".into(),
            features: Self::FEATURES,
            queue_sizes: vec![Self::QUEUE_SIZE; self.queues],
            shm: vec![ShmRegion { id: 3, size: 0x2_0000_1000 }],
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::<EchoConfig>::clone(&self.config)
    }

    fn start(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        assert!(!std::mem::replace(&mut self.started, true), "started twice");
        assert_eq!(cx.queue_count(), self.queues);
        Ok(())
    }

    fn on_queue(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        assert!(self.started, "called while stopped");
        while let Some(chain) = cx.pop(queue)? {
            let mut data = Vec::new();
            // A hostile chain may name the same page thousands of times; an echo of some of it will do.
            let reader = chain.reader(cx.memory());
            reader.take(1 << 20).read_to_end(&mut data).map_err(|e| DeviceError::Driver(e.to_string()))?;
            match data.first() {
                Some(&Self::ERROR) => return Err(DeviceError::Driver("told to fail".into())),
                Some(&Self::PANIC) => panic!("told to panic"),
                Some(&Self::STALL) => {
                    cx.unpop(queue, chain);
                    return Ok(());
                }
                _ => {}
            }
            let mut writer = chain.writer(cx.memory());
            data.truncate(writer.remaining());
            writer.write_all(&data).map_err(|e| DeviceError::Driver(e.to_string()))?;
            cx.complete(queue, chain, writer.written())?;
        }
        Ok(())
    }

    fn drain(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        assert!(self.started, "drained while stopped");
        for queue in 0..self.queues {
            if let Some(chain) = cx.pop(queue)? {
                cx.unpop(queue, chain);
                return Err(DeviceError::Driver(format!("queue {queue} is stalled")));
            }
        }
        Ok(())
    }

    fn stop(&mut self) {
        assert!(std::mem::replace(&mut self.started, false), "stopped while stopped");
    }
}
