//! The device.

use std::io::{Read, Write};
use std::sync::Arc;

use krun_event::{Interest, Ready};
use krun_virtio::{Chain, ConfigSpace, Cx, DeviceError, DeviceInfo, VirtioDevice};

use super::config::Answers;
use super::{InputConfig, InputEvent, InputSource};

const EVENTS: usize = 0;
const STATUS: usize = 1;
const QUEUE_SIZE: u16 = 64;
const SOURCE: u64 = 0;
/// A source that is ready this often without an event is broken, and would keep the thread busy.
const PATIENCE: u32 = 64;

/// Where the device stands with its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watch {
    /// Waiting for events.
    On,
    /// Waiting for buffers of the driver.
    Off,
    /// There will be no more events.
    Ended,
}

/// An input device.
pub struct Input {
    answers: Arc<Answers>,
    source: Box<dyn InputSource>,
    watch: Watch,
    /// How often the source was ready without an event.
    empty: u32,
}

impl std::fmt::Debug for Input {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Input").field("answers", &self.answers).field("watch", &self.watch).finish()
    }
}

impl Input {
    /// Virtio device id.
    pub const ID: u32 = 18;

    /// A device of `config` with the events of `source`.
    pub fn new(config: InputConfig, source: Box<dyn InputSource>) -> Self {
        Self { answers: Arc::new(Answers::new(config)), source, watch: Watch::Ended, empty: 0 }
    }

    /// Passes events on while there are some and the driver has room. Events wait in the source.
    fn pump(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let mut passed = false;
        while self.watch != Watch::Ended {
            let Some(chain) = cx.pop(EVENTS)? else {
                self.set(cx, Watch::Off);
                return Ok(());
            };
            match self.source.next() {
                Ok(Some(event)) => {
                    passed = true;
                    give(chain, event, cx)?;
                }
                Ok(None) => {
                    cx.unpop(EVENTS, chain);
                    self.empty = if passed { 0 } else { self.empty + 1 };
                    let on = if self.empty < PATIENCE { Watch::On } else { Watch::Ended };
                    if on == Watch::Ended {
                        tracing::warn!(
                            "an input device is ready again and again without an event; left alone"
                        );
                    }
                    self.set(cx, on);
                    return Ok(());
                }
                Err(e) => {
                    cx.unpop(EVENTS, chain);
                    tracing::warn!("an input device has no more events: {e}");
                    self.set(cx, Watch::Ended);
                }
            }
        }
        Ok(())
    }

    fn set(&mut self, cx: &Cx<'_>, wanted: Watch) {
        let result = match (self.watch, wanted) {
            (Watch::Off, Watch::On) => {
                self.source.ready().and_then(|fd| cx.watch(&fd, SOURCE, Interest::Read))
            }
            (Watch::On, Watch::Off | Watch::Ended) => self.source.ready().and_then(|fd| cx.unwatch(&fd)),
            _ => Ok(()),
        };
        self.watch = wanted;
        if let Err(e) = result {
            tracing::warn!("an input device cannot be waited for: {e}");
            self.watch = Watch::Ended;
        }
    }
}

/// Stores an event in a buffer of the driver.
fn give(chain: Chain, event: InputEvent, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
    let mut writer = chain.writer(cx.memory());
    if writer.remaining() < InputEvent::SIZE {
        let text = format!("a buffer of {} bytes for an event of {}", writer.remaining(), InputEvent::SIZE);
        return Err(DeviceError::Driver(text));
    }
    let _ = writer.write_all(&event.to_bytes());
    let written = writer.written();
    cx.complete(EVENTS, chain, written)
}

impl VirtioDevice for Input {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: Self::ID,
            name: "input".into(),
            features: 0,
            queue_sizes: vec![QUEUE_SIZE; 2],
            shm: Vec::new(),
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.answers) as Arc<dyn ConfigSpace>
    }

    fn start(&mut self, _cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        self.empty = 0;
        // The driver's first buffers bring the first look at the source.
        self.watch = match self.source.start() {
            Ok(()) => Watch::Off,
            Err(e) => {
                tracing::warn!("an input device has no events: {e}");
                Watch::Ended
            }
        };
        Ok(())
    }

    fn on_queue(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        if queue == EVENTS {
            // Not a sign of trouble if there is no event now.
            self.empty = 0;
            return self.pump(cx);
        }
        while let Some(chain) = cx.pop(STATUS)? {
            let mut bytes = [0; InputEvent::SIZE];
            if chain.reader(cx.memory()).read_exact(&mut bytes).is_ok() {
                self.source.send(InputEvent::from_bytes(bytes));
            }
            cx.complete(STATUS, chain, 0)?;
        }
        Ok(())
    }

    fn on_event(&mut self, _ready: Ready, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        self.pump(cx)
    }

    fn stop(&mut self) {
        self.watch = Watch::Ended;
        self.answers.reset();
        self.source.stop();
    }
}
