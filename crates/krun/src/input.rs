//! Keyboards, pointers and the like.

use std::os::fd::OwnedFd;

use krun_devices::input::{Evdev, InputConfig, InputSender, InputSource, Queue};

use crate::Error;

/// An input device of the guest, `/dev/input/event*` there.
pub struct Input {
    pub(crate) config: InputConfig,
    pub(crate) source: Box<dyn InputSource>,
}

impl std::fmt::Debug for Input {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Input({:?})", String::from_utf8_lossy(&self.config.name))
    }
}

impl Input {
    /// A device of `config` with events from a source of the caller's own.
    pub fn new(config: InputConfig, source: impl InputSource + 'static) -> Self {
        Self { config, source: Box::new(source) }
    }

    /// A device of `config` whose events are given with the [`InputSender`].
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn queue(config: InputConfig) -> Result<(Self, InputSender), Error> {
        let fail = |source| Error::Host { what: "create a queue of input events", source };
        let (queue, sender) = Queue::new().map_err(fail)?;
        Ok((Self::new(config, queue), sender))
    }

    /// A device of the host, `/dev/input/event*`, opened for reading; for writing too, so that the guest can
    /// switch the lights of a keyboard. The host sees the events as well unless the caller has grabbed the
    /// device (`EVIOCGRAB`).
    ///
    /// # Errors
    /// [`Error::Input`] for a file that is none.
    pub fn evdev(fd: OwnedFd) -> Result<Self, Error> {
        let (config, device) = Evdev::new(fd)?;
        Ok(Self::new(config, device))
    }

    /// What it is, and where its events come from.
    pub fn into_parts(self) -> (InputConfig, Box<dyn InputSource>) {
        (self.config, self.source)
    }
}
