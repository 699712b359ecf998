//! The device: ports and control protocol put together on a worker thread.

use std::io::Read as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use krun_event::{Interest, Ready, Wake};
use krun_virtio::{ConfigSpace, Cx, DeviceError, DeviceInfo, VirtioDevice};
use rustix::event::{PollFd, PollFlags, poll};

use super::control::{Change, Control, HEADER, PortFacts};
use super::port::{News, Port, queues, tokens};
use super::spec::{ConsoleError, ConsoleSpec, TerminalSize};
use super::turn::{Numbered, Turn};
use crate::sys::{Timer, signals};

const F_SIZE: u32 = 0;
const F_MULTIPORT: u32 = 1;

const CONTROL_RX: usize = 2;
const CONTROL_TX: usize = 3;
/// Token of the device's own wake-up.
const WAKE: u64 = 0;
/// Token of the timer.
const RETRY: u64 = 1 << 16;
/// Token of the wait for the device before.
const TURN: u64 = RETRY + 1;
/// Time after which terminals are looked at again: their size and mode, and whether one that was in the background
/// can be read. A library cannot handle signals, and a shell tells a job that it is in the foreground only if it was
/// stopped.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Messages of the driver handled before others have their turn.
const CONTROL_BUDGET: usize = 64;

/// Queue sizes. Linux fills each receive queue with pages at boot, whether or not it will be used.
const CONTROL_QUEUE: u16 = 16;
const INPUT_QUEUE: u16 = 32;
const TERMINAL_QUEUE: u16 = 8;
const OUTPUT_QUEUE: u16 = 16;
const UNUSED_QUEUE: u16 = 1;

/// A virtio console with several ports.
#[derive(Debug)]
pub struct Console {
    ports: Vec<Port>,
    facts: Vec<PortFacts>,
    queue_sizes: Vec<u16>,
    control: Control,
    /// Whether the driver knows of ports other than the first.
    multiport: bool,
    /// Directions with more to do at once: tokens as in [`tokens`], bit by bit.
    more: u128,
    more_control: bool,
    /// How many of [`Shared::resizes`] the driver was told of.
    told: u32,
    /// Made when first needed.
    timer: Option<Timer>,
    /// The timer is set and has not been heard of.
    timing: bool,
    /// When to tell the driver of ports; `None`: at once.
    turn: Option<Turn>,
    numbered: Numbered,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    wake: Wake,
    /// Per port: `cols | rows << 16`; 0 when unknown.
    sizes: Vec<AtomicU32>,
    /// How often a size was set.
    resizes: AtomicU32,
    refresh: AtomicBool,
    abandon: AtomicBool,
}

/// Speaks to a console from any thread while the VM runs. Clones speak to the same console.
#[derive(Debug, Clone)]
pub struct ConsoleHandle {
    shared: Arc<Shared>,
    consoles: Arc<[bool]>,
}

impl ConsoleHandle {
    /// Tells the guest the new size of the terminal at console port `port`: columns and rows. False when
    /// there is no such port, or it is no terminal. Not needed for a [`PortSpec::terminal`](super::PortSpec::terminal).
    pub fn resize(&self, port: usize, cols: u16, rows: u16) -> bool {
        let console = self.consoles.get(port).is_some_and(|c| *c);
        if console {
            self.shared.set_size(port, TerminalSize { cols, rows });
            self.shared.wake.wake();
        }
        console
    }

    /// Looks at once at the size and mode of terminals, and for input from those that this process could not read
    /// from the background. Without this it is done twice a second.
    pub fn refresh(&self) {
        self.shared.refresh.store(true, Ordering::Release);
        self.shared.wake.wake();
    }

    /// Ends the wait for a host that takes no output at the end of the VM: what is left is lost.
    pub fn abandon(&self) {
        self.shared.abandon.store(true, Ordering::Release);
        self.shared.wake.wake();
    }
}

impl Shared {
    fn set_size(&self, port: usize, size: TerminalSize) {
        if let Some(place) = self.sizes.get(port) {
            place.store(u32::from(size.cols) | u32::from(size.rows) << 16, Ordering::Release);
            self.resizes.fetch_add(1, Ordering::Release);
        }
    }

    fn size(&self, port: usize) -> Option<TerminalSize> {
        let packed = self.sizes.get(port)?.load(Ordering::Acquire);
        let size = TerminalSize { cols: packed as u16, rows: (packed >> 16) as u16 };
        (packed != 0).then_some(size)
    }
}

/// `le16 cols, le16 rows, le32 max_nr_ports, le32 emerg_wr` (virtio 1.2, section 5.3.4). The size is that
/// of port 0; emergency writes are not offered.
impl ConfigSpace for Shared {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let size = self.size(0).unwrap_or_default();
        let mut all = [0u8; 12];
        all[0..2].copy_from_slice(&size.cols.to_le_bytes());
        all[2..4].copy_from_slice(&size.rows.to_le_bytes());
        all[4..8].copy_from_slice(&u32::try_from(self.sizes.len()).unwrap_or(u32::MAX).to_le_bytes());
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (n, byte) in data.iter_mut().enumerate() {
            *byte = start.checked_add(n).and_then(|at| all.get(at)).copied().unwrap_or(0);
        }
    }
}

impl Console {
    /// Virtio device id.
    pub const ID: u32 = 3;

    /// Checks `spec` and takes over its descriptors.
    ///
    /// # Errors
    /// [`ConsoleSpec::validate`]'s, or no descriptor is left.
    pub fn new(spec: ConsoleSpec) -> Result<Self, ConsoleError> {
        spec.validate()?;
        let wake =
            Wake::new().map_err(|source| ConsoleError::Host { what: "creating an eventfd", source })?;
        let count = spec.ports.len();
        let shared = Arc::new(Shared {
            wake,
            sizes: (0..count).map(|_| AtomicU32::new(0)).collect(),
            resizes: AtomicU32::new(0),
            refresh: AtomicBool::new(false),
            abandon: AtomicBool::new(false),
        });
        let (mut ports, mut facts) = (Vec::with_capacity(count), Vec::with_capacity(count));
        let mut queue_sizes = vec![CONTROL_QUEUE; 2 * count + 2];
        for (id, port) in spec.ports.into_iter().enumerate() {
            if let Some(size) = port.initial_size() {
                shared.set_size(id, size);
            }
            let (rx, tx) = queues(id);
            queue_sizes[rx] = match port.input {
                Some(_) if port.is_console() => TERMINAL_QUEUE,
                Some(_) => INPUT_QUEUE,
                None => UNUSED_QUEUE,
            };
            queue_sizes[tx] = if port.output.is_some() { OUTPUT_QUEUE } else { UNUSED_QUEUE };
            let (name, console) = (port.name.clone(), port.is_console());
            let port = Port::new(id, port);
            facts.push(PortFacts { name, console, connected: port.is_connected() });
            ports.push(port);
        }
        let control = Control::new(facts.iter().cloned(), |_| None);
        let (multiport, more, more_control, told) = (false, 0, false, 0);
        Ok(Self {
            ports,
            facts,
            queue_sizes,
            control,
            multiport,
            more,
            more_control,
            told,
            timer: None,
            timing: false,
            turn: None,
            numbered: Numbered::default(),
            shared,
        })
    }

    /// Makes this device tell of its ports only when the terminals of another one have their numbers in the guest. A
    /// driver that leaves those alone delays it by some seconds. What [`Self::numbered`] said before is about nothing then.
    pub fn after(&mut self, turn: Turn) {
        self.numbered = turn.numbered();
        self.turn = Some(turn);
    }

    /// Whether the terminals of this device have their numbers.
    pub fn numbered(&self) -> &Numbered {
        &self.numbered
    }

    /// A handle to speak to the console while it runs.
    pub fn handle(&self) -> ConsoleHandle {
        let consoles = self.facts.iter().map(|f| f.console).collect();
        ConsoleHandle { shared: Arc::clone(&self.shared), consoles }
    }

    /// Takes what a port did to the control protocol.
    fn take(&mut self, id: usize, token: u64, news: News, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        match news {
            News::Nothing => {}
            News::More => {
                self.more |= 1 << token;
                self.shared.wake.wake();
            }
            News::InputEnded => self.control.close(id),
            News::Gone => {
                self.control.remove(id);
                // Nothing is written any more, so this comes back with `Nothing` or `More`.
                let news = self.ports[id].abandon(cx)?;
                if news == News::More {
                    self.more |= 1 << tokens(id).1;
                    self.shared.wake.wake();
                }
            }
        }
        Ok(())
    }

    fn input(&mut self, id: usize, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let news = self.ports[id].pump_input(cx)?;
        self.take(id, tokens(id).0, news, cx)
    }

    /// Looks at the mode and size of terminals.
    fn look(&mut self) {
        for (id, port) in self.ports.iter_mut().enumerate() {
            if let Some(size) = port.look() {
                self.shared.set_size(id, size);
                self.shared.wake.wake();
            }
        }
    }

    /// The same, and tries those again that were in the background.
    fn retry(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        self.look();
        (0..self.ports.len()).try_for_each(|id| self.input(id, cx))
    }

    /// Sets the timer if there is a terminal, unless it is set: a console that is busy otherwise must not put it off.
    fn look_again_later(&mut self, cx: &Cx<'_>) -> Result<(), DeviceError> {
        if self.timing || !self.ports.iter().any(Port::has_terminal) {
            return Ok(());
        }
        let fail = |source| DeviceError::Host { what: "setting the console's timer".into(), source };
        let timer = match &self.timer {
            Some(timer) => timer,
            None => {
                let timer = Timer::new().map_err(fail)?;
                cx.watch(&timer, RETRY, Interest::Read).map_err(fail)?;
                self.timer.insert(timer)
            }
        };
        timer.set(RETRY_AFTER).map_err(fail)?;
        self.timing = true;
        Ok(())
    }

    fn output(&mut self, id: usize, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        let news = self.ports[id].pump_output(cx)?;
        self.take(id, tokens(id).1, news, cx)
    }

    /// Handles the driver's control messages.
    fn receive(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        for _ in 0..CONTROL_BUDGET {
            let Some(chain) = cx.pop(CONTROL_TX)? else { return Ok(()) };
            let mut message = [0u8; HEADER];
            let complete = chain.reader(cx.memory()).read_exact(&mut message).is_ok();
            cx.complete(CONTROL_TX, chain, 0)?;
            let change = match complete.then(|| self.control.receive(message)) {
                Some(Ok(change)) => change,
                Some(Err(why)) => {
                    tracing::debug!("console: control message ignored: {why}");
                    None
                }
                None => {
                    tracing::debug!("console: control message shorter than {HEADER} bytes ignored");
                    None
                }
            };
            match change {
                Some(Change::Opened(id)) => {
                    let news = self.ports[id].opened(cx)?;
                    self.take(id, tokens(id).0, news, cx)?;
                }
                Some(Change::Closed(id)) => self.ports[id].closed(cx)?,
                None => {}
            }
        }
        self.more_control = true;
        self.shared.wake.wake();
        Ok(())
    }

    /// Tells the driver what it does not know yet, as far as it has buffers for it.
    fn tell(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        while self.multiport && self.control.has_message() && self.has_turn()? {
            let Some(chain) = cx.pop(CONTROL_RX)? else { return Ok(()) };
            let mut out = chain.writer(cx.memory());
            if let Some(message) = self.control.next_message() {
                // A driver with buffers too small for a name gets a part of it.
                let part = message.len().min(out.remaining());
                let stored = std::io::Write::write_all(&mut out, &message[..part]);
                debug_assert!(stored.is_ok());
            }
            let written = out.written();
            cx.complete(CONTROL_RX, chain, written)?;
        }
        Ok(())
    }

    fn has_turn(&mut self) -> Result<bool, DeviceError> {
        let fail = |source| DeviceError::Host { what: "waiting for another console".into(), source };
        self.turn.as_mut().map_or(Ok(true), Turn::has_come).map_err(fail)
    }

    /// After every callback.
    fn finish(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        self.numbered.set(!self.multiport || self.control.are_terminals_settled());
        self.tell(cx)?;
        self.look_again_later(cx)
    }

    /// Tells a driver without the control protocol when the size in the configuration is not the one it may
    /// have read.
    fn tell_size(&mut self, cx: &Cx<'_>) {
        let resizes = self.shared.resizes.load(Ordering::Acquire);
        if std::mem::replace(&mut self.told, resizes) != resizes && !self.multiport {
            cx.interrupt().config_changed();
        }
    }

    /// What other threads and unfinished work want.
    fn woken(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        for id in 0..self.ports.len() {
            if let Some(size) = self.shared.size(id) {
                self.control.resize(id, size);
            }
        }
        self.tell_size(cx);
        if self.shared.refresh.swap(false, Ordering::AcqRel) {
            self.retry(cx)?;
        }
        if std::mem::take(&mut self.more_control) {
            self.receive(cx)?;
        }
        let more = std::mem::take(&mut self.more);
        for id in 0..self.ports.len() {
            let (input, output) = tokens(id);
            if more & 1 << input != 0 {
                self.input(id, cx)?;
            }
            if more & 1 << output != 0 {
                self.output(id, cx)?;
            }
        }
        Ok(())
    }

    /// Waits until one of the blocked outputs takes more. False: given up.
    fn wait_for_outputs(&self) -> Result<bool, DeviceError> {
        let mut fds: Vec<PollFd<'_>> = self
            .ports
            .iter()
            .filter_map(Port::blocked_output)
            .map(|o| PollFd::new(o, PollFlags::OUT))
            .collect();
        if fds.is_empty() {
            return Ok(true);
        }
        fds.push(PollFd::new(&self.shared.wake, PollFlags::IN));
        loop {
            if self.shared.abandon.load(Ordering::Acquire) {
                return Ok(false);
            }
            match poll(&mut fds, None) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => {
                    let what = "waiting for the console's output".into();
                    return Err(DeviceError::Host { what, source: e.into() });
                }
            }
        }
        // Whatever else set it: the guest is gone and nothing else matters.
        self.shared.wake.take();
        Ok(true)
    }
}

impl VirtioDevice for Console {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: Self::ID,
            name: "console".into(),
            features: 1 << F_SIZE | 1 << F_MULTIPORT,
            queue_sizes: self.queue_sizes.clone(),
            shm: Vec::new(),
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.shared) as Arc<dyn ConfigSpace>
    }

    fn start(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        // A pipe without a reader is an error to handle, not a reason to end the program.
        signals::block(libc::SIGPIPE);
        self.multiport = cx.has_feature(F_MULTIPORT);
        let shared = Arc::clone(&self.shared);
        self.look();
        self.tell_size(cx);
        self.control = Control::new(self.facts.iter().cloned(), |id| shared.size(id));
        cx.watch(&self.shared.wake, WAKE, Interest::Read)
            .map_err(|source| DeviceError::Host { what: "watching the console's eventfd".into(), source })?;
        if let Some(turn) = &self.turn {
            cx.watch(turn, TURN, Interest::Read)
                .map_err(|source| DeviceError::Host { what: "watching a console's turn".into(), source })?;
        }
        if !self.multiport {
            // Without the control protocol port 0 is always open, and has its number.
            self.numbered.set(true);
            let news = self.ports[0].opened(cx)?;
            self.take(0, tokens(0).0, news, cx)?;
        }
        self.look_again_later(cx)
    }

    fn on_queue(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        match queue {
            CONTROL_RX => {}
            CONTROL_TX => self.receive(cx)?,
            _ => {
                let id = if queue < CONTROL_RX { 0 } else { queue / 2 - 1 };
                if queue == queues(id).0 { self.input(id, cx)? } else { self.output(id, cx)? }
            }
        }
        self.finish(cx)
    }

    fn on_event(&mut self, ready: Ready, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        match ready.token {
            WAKE => {
                self.shared.wake.take();
                self.woken(cx)?;
            }
            RETRY => {
                if let Some(timer) = &self.timer {
                    timer.take();
                }
                self.timing = false;
                self.retry(cx)?;
            }
            TURN => {
                // What is to be told then is told after every callback.
                if let Some(turn) = &mut self.turn {
                    turn.look();
                }
            }
            token => {
                let id = (token as usize - 1) / 2;
                if token == tokens(id).0 { self.input(id, cx)? } else { self.output(id, cx)? }
            }
        }
        self.finish(cx)
    }

    fn drain(&mut self, cx: &mut Cx<'_>) -> Result<(), DeviceError> {
        signals::block(libc::SIGPIPE);
        loop {
            let mut idle = true;
            for id in 0..self.ports.len() {
                loop {
                    match self.ports[id].pump_output(cx)? {
                        News::More => {}
                        News::Gone => {
                            self.ports[id].abandon(cx)?;
                        }
                        News::Nothing | News::InputEnded => break,
                    }
                }
                idle &= self.ports[id].blocked_output().is_none();
            }
            if idle || !self.wait_for_outputs()? {
                return Ok(());
            }
        }
    }

    fn stop(&mut self) {
        for port in &mut self.ports {
            port.reset();
        }
        self.control = Control::new(self.facts.iter().cloned(), |_| None);
        self.numbered.restart();
        (self.more, self.more_control) = (0, false);
        // It is watched for the driver that is gone.
        (self.timer, self.timing) = (None, false);
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
