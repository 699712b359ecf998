//! The data path of a port: from a host stream to the guest's buffers, and from the guest's chains to a
//! host stream. Nothing is copied on the way and nothing is buffered here; what one side does not take
//! stays with the other.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;

use krun_event::Interest;
use krun_memory::VolatileSlice;
use krun_virtio::{Chain, Cx, DeviceError};

use super::spec::{PortSpec, TerminalSize};
use super::stream::{Direction, Read, Stream};
use crate::tty::RawTerminal;

/// Guest buffers filled by one call of the host, and bytes.
const BATCH: usize = 16;
const BATCH_BYTES: usize = 256 << 10;
/// Bytes (or chains, each counted as [`CHAIN_COST`]) handled before other ports have their turn.
const BUDGET: usize = 1 << 20;
/// What an empty chain counts.
const CHAIN_COST: usize = 4096;

/// Where a port's queues are (virtio 1.2, section 5.3.2). Between those of port 0 and port 1 lie the
/// two control queues.
pub fn queues(port: usize) -> (usize, usize) {
    let first = if port == 0 { 0 } else { 2 + 2 * port };
    (first, first + 1)
}

/// Poll tokens of a port's input and output; 0 is the device's own.
pub fn tokens(port: usize) -> (u64, u64) {
    let first = 1 + 2 * port as u64;
    (first, first + 1)
}

/// What the rest of the device must know after a port did some work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// Nothing: the next queue or host event goes on.
    Nothing,
    /// There is more to do at once; others come first.
    More,
    /// The input has ended, and the guest has taken all of it.
    InputEnded,
    /// The host's side is gone for good.
    Gone,
}

/// One port at work.
#[derive(Debug)]
pub struct Port {
    id: usize,
    console: bool,
    input: Option<Stream>,
    output: Option<Stream>,
    terminal: Option<Arc<RawTerminal>>,
    /// The terminal's size when it was last looked at.
    seen: Option<TerminalSize>,
    /// No raw mode, and that was said.
    cooked: bool,
    /// The end of the VM waits for the output.
    waited_for: bool,
    /// Open in the guest: a closed port throws away what it gets.
    open: bool,
    rx: Rx,
    tx: Tx,
}

#[derive(Debug, Default)]
struct Rx {
    /// Guest buffers taken and not yet filled; at most as many as the queue has.
    held: VecDeque<Chain>,
    watched: bool,
    /// The terminal is in the background; wait to be told.
    parked: bool,
    ended: bool,
    /// The end has been reported.
    reported: bool,
    /// Buffers that the guest had put out when it opened the port.
    full: u16,
}

#[derive(Debug, Default)]
struct Tx {
    /// A chain of which so many bytes are written.
    partial: Option<(Chain, usize)>,
    watched: bool,
    /// Output is thrown away.
    dead: bool,
    complained: bool,
}

impl Port {
    /// A port that no driver has seen yet.
    pub fn new(id: usize, spec: PortSpec) -> Self {
        let console = spec.is_console();
        let mut port = Self {
            id,
            console,
            input: spec.input.map(|fd| Stream::new(fd, Direction::Input)),
            output: spec.output.map(|fd| Stream::new(fd, Direction::Output)),
            terminal: spec.terminal,
            seen: None,
            cooked: false,
            waited_for: spec.waited_for,
            open: false,
            rx: Rx::default(),
            tx: Tx::default(),
        };
        port.seen = port.terminal_size();
        port
    }

    /// The size of the terminal that shows the output, else of the one that gives input.
    fn terminal_size(&self) -> Option<TerminalSize> {
        let output = self.output.as_ref().and_then(crate::tty::size);
        output.or_else(|| self.terminal.as_ref()?.size())
    }

    /// Whether anything is on the host's side.
    pub fn is_connected(&self) -> bool {
        self.input.is_some() || self.output.is_some() || self.console
    }

    /// As [`Port::new`] made it.
    pub fn reset(&mut self) {
        self.open = false;
        self.rx = Rx::default();
        self.tx = Tx::default();
    }

    /// The guest opened the port.
    pub fn opened(&mut self, cx: &mut Cx<'_>) -> Result<News, DeviceError> {
        self.open = true;
        if self.input.is_some() && !self.console {
            let mut budget = BUDGET;
            self.take_buffers(cx, usize::MAX, &mut budget)?;
            self.rx.full = u16::try_from(self.rx.held.len()).unwrap_or(u16::MAX);
        }
        self.pump_input(cx)
    }

    /// The guest closed the port.
    pub fn closed(&mut self, cx: &Cx<'_>) -> Result<(), DeviceError> {
        self.open = false;
        self.watch_input(cx, false)
    }

    /// Whether there is a terminal that may change under way.
    pub fn has_terminal(&self) -> bool {
        self.rx.parked || (self.terminal.is_some() && !self.tx.dead)
    }

    /// Sees to it that the terminal is raw, should it be in the foreground, and will try to read it again. Returns its
    /// size if that is another than when this was last called.
    pub fn look(&mut self) -> Option<TerminalSize> {
        self.rx.parked = false;
        let terminal = self.terminal.as_ref().filter(|_| !self.tx.dead)?;
        match terminal.enter() {
            Ok(()) => self.cooked = false,
            Err(e) if !std::mem::replace(&mut self.cooked, true) => {
                tracing::warn!("console port {}: no raw mode: {e}", self.id);
            }
            Err(_) => {}
        }
        let size = self.terminal_size();
        if std::mem::replace(&mut self.seen, size) == size { None } else { size }
    }

    /// Stops all traffic: input is left where it is, output is thrown away.
    pub fn abandon(&mut self, cx: &mut Cx<'_>) -> Result<News, DeviceError> {
        self.rx.ended = true;
        self.rx.reported = true;
        self.tx.dead = true;
        self.watch_input(cx, false)?;
        self.pump_output(cx)
    }

    /// Moves input to the guest until one side has had enough.
    pub fn pump_input(&mut self, cx: &mut Cx<'_>) -> Result<News, DeviceError> {
        if !self.open || self.input.is_none() || self.rx.parked || self.rx.reported {
            return Ok(News::Nothing);
        }
        let mut budget = BUDGET;
        while !self.rx.ended {
            self.take_buffers(cx, BATCH, &mut budget)?;
            if budget == 0 {
                return Ok(News::More);
            }
            if self.rx.held.is_empty() {
                // Goes on when the guest has put buffers out again. It has all of them now, and whoever
                // reads them to the end puts all out: no need to be told of each.
                cx.notify_after(queues(self.id).0, self.rx.full / 2);
                self.watch_input(cx, false)?;
                return Ok(News::Nothing);
            }
            match self.read(cx)? {
                Read::Data(n) => {
                    self.hand_over(cx, n)?;
                    budget = budget.saturating_sub(n);
                }
                Read::NotReady => {
                    self.watch_input(cx, true)?;
                    return Ok(News::Nothing);
                }
                Read::Background => {
                    self.rx.parked = true;
                    self.watch_input(cx, false)?;
                    return Ok(News::Nothing);
                }
                Read::HungUp if self.console => return Ok(News::Gone),
                // An end-of-file character typed at a terminal that is not in raw mode.
                Read::End if self.console && self.input.as_ref().is_some_and(Stream::is_terminal) => {
                    budget = budget.saturating_sub(CHAIN_COST);
                }
                Read::HungUp | Read::End => self.rx.ended = true,
            }
        }
        self.watch_input(cx, false)?;
        self.check_end(cx)
    }

    /// Reports the end of input once the guest has read everything.
    ///
    /// Linux looks for data first and whether the host is connected next, and takes buffers and the news
    /// of the end on different paths; data that arrives together with the end can be missed between the
    /// two. A driver puts a buffer out again when it has been read, so when all are back, no data can be
    /// lost any more.
    fn check_end(&mut self, cx: &mut Cx<'_>) -> Result<News, DeviceError> {
        if self.console {
            self.rx.reported = true;
            return Ok(News::Nothing);
        }
        let mut budget = BUDGET;
        self.take_buffers(cx, usize::MAX, &mut budget)?;
        if budget == 0 {
            return Ok(News::More);
        }
        // Never more than the queue has entries.
        let missing = usize::from(self.rx.full).saturating_sub(self.rx.held.len()) as u16;
        if missing > 0 {
            cx.notify_after(queues(self.id).0, missing);
            return Ok(News::Nothing);
        }
        self.rx.reported = true;
        Ok(News::InputEnded)
    }

    /// Takes buffers until there are `want`, there are no more, or `budget` is used up.
    fn take_buffers(&mut self, cx: &mut Cx<'_>, want: usize, budget: &mut usize) -> Result<(), DeviceError> {
        let queue = queues(self.id).0;
        while *budget > 0 && self.rx.held.len() < want {
            let Some(chain) = cx.pop(queue)? else { return Ok(()) };
            if chain.writable_len() == 0 {
                cx.complete(queue, chain, 0)?;
                *budget = budget.saturating_sub(CHAIN_COST);
            } else {
                self.rx.held.push_back(chain);
            }
        }
        Ok(())
    }

    /// Reads once into as many buffers as one call can fill.
    fn read(&self, cx: &Cx<'_>) -> Result<Read, DeviceError> {
        let Some(input) = &self.input else { return Ok(Read::End) };
        let (mut writers, mut left) = (Vec::with_capacity(BATCH), BATCH_BYTES);
        for chain in self.rx.held.iter().take(BATCH) {
            let mut writer = chain.writer(cx.memory());
            writer.split_at(left);
            left -= writer.remaining();
            writers.push(writer);
        }
        let room: Vec<VolatileSlice<'_>> = writers.iter().flat_map(|w| w.room()).copied().collect();
        Ok(input.read(&room).unwrap_or_else(|error| {
            tracing::warn!("console port {}: reading input failed, taken as its end: {error}", self.id);
            Read::End
        }))
    }

    /// Gives the guest the buffers that hold the `n` bytes read.
    fn hand_over(&mut self, cx: &mut Cx<'_>, n: usize) -> Result<(), DeviceError> {
        let queue = queues(self.id).0;
        let mut left = n;
        while left > 0
            && let Some(chain) = self.rx.held.pop_front()
        {
            let part = left.min(chain.writable_len() as usize);
            left -= part;
            // A part is at most a chain, and that is at most u32::MAX.
            cx.complete(queue, chain, part as u32)?;
        }
        Ok(())
    }

    /// Moves output to the host until one side has had enough.
    pub fn pump_output(&mut self, cx: &mut Cx<'_>) -> Result<News, DeviceError> {
        let queue = queues(self.id).1;
        let mut budget = BUDGET;
        loop {
            let (chain, done) = match self.tx.partial.take() {
                Some(partial) => partial,
                None => match cx.pop(queue)? {
                    Some(chain) => (chain, 0),
                    None => break,
                },
            };
            if budget == 0 {
                self.tx.partial = Some((chain, done));
                return Ok(News::More);
            }
            budget = budget.saturating_sub((chain.readable_len() as usize).max(CHAIN_COST));
            match self.write(cx, &chain, done) {
                Ok(None) => cx.complete(queue, chain, 0)?,
                Ok(Some(done)) => {
                    self.tx.partial = Some((chain, done));
                    self.watch_output(cx, true)?;
                    return Ok(News::Nothing);
                }
                Err(error) => {
                    cx.complete(queue, chain, 0)?;
                    if self.is_lost(&error) {
                        self.tx.dead = true;
                        self.watch_output(cx, false)?;
                        return Ok(News::Gone);
                    }
                }
            }
        }
        self.watch_output(cx, false)?;
        Ok(News::Nothing)
    }

    /// Writes the chain from byte `done` on. `None`: all of it, `Some`: so far.
    fn write(&self, cx: &Cx<'_>, chain: &Chain, done: usize) -> std::io::Result<Option<usize>> {
        let Some(output) = self.output.as_ref().filter(|_| !self.tx.dead) else { return Ok(None) };
        let mut done = done;
        loop {
            let mut rest = chain.reader(cx.memory());
            rest.take(done);
            let data = rest.take(usize::MAX);
            if data.is_empty() {
                return Ok(None);
            }
            match output.write(&data)? {
                Some(n) => done += n,
                None => return Ok(Some(done)),
            }
        }
    }

    /// Whether the port must go after `error`. A console that cannot take a line (a log on a full disk)
    /// loses the line; a stream that lost some bytes is worth nothing.
    fn is_lost(&mut self, error: &std::io::Error) -> bool {
        let gone = Stream::is_gone(error);
        if !gone && !self.tx.complained {
            self.tx.complained = true;
            tracing::warn!("console port {}: writing output failed: {error}", self.id);
        }
        gone || !self.console
    }

    /// The output that a chain waits for, and the end of the VM with it.
    pub fn blocked_output(&self) -> Option<&Stream> {
        self.output.as_ref().filter(|_| self.waited_for && self.tx.partial.is_some())
    }

    fn watch_input(&mut self, cx: &Cx<'_>, on: bool) -> Result<(), DeviceError> {
        let Some(input) = &self.input else { return Ok(()) };
        watch(cx, input, tokens(self.id).0, Interest::Read, &mut self.rx.watched, on)
    }

    fn watch_output(&mut self, cx: &Cx<'_>, on: bool) -> Result<(), DeviceError> {
        let Some(output) = &self.output else { return Ok(()) };
        watch(cx, output, tokens(self.id).1, Interest::Write, &mut self.tx.watched, on)
    }
}

/// Starts or ends a watch. A descriptor that is not to be read now must not be watched at all: a peer
/// that closed is reported whatever the interest.
fn watch(
    cx: &Cx<'_>,
    fd: &impl AsFd,
    token: u64,
    interest: Interest,
    watched: &mut bool,
    on: bool,
) -> Result<(), DeviceError> {
    if *watched == on {
        return Ok(());
    }
    let result = if on { cx.watch(fd, token, interest) } else { cx.unwatch(fd) };
    result.map_err(|source| DeviceError::Host {
        what: format!("watching console descriptor {token}"),
        source,
    })?;
    *watched = on;
    Ok(())
}
