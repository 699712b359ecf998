//! One connection: a pair of ports, a stream socket, and what is between them.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;

use bitflags::bitflags;
use krun_event::Interest;
use krun_memory::VolatileSlice;
use krun_virtio::{Cx, Reader};

use super::credit::{Credit, Violation};
use super::packet::{Ended, Header, op};
use super::stream::{Stream, Write};

/// What tells a connection from all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Port of the host.
    pub host_port: u32,
    /// Port of the guest.
    pub guest_port: u32,
}

/// ```text
///  guest's REQUEST ─▶ Connecting ── socket connected, RESPONSE ──▶ Open ── both directions ended ─▶ Over ─▶ (gone)
///  accepted socket ─▶ Requested  ── guest's RESPONSE ───────────▶ Open ── guest will neither send
///                                                                          nor receive ─▶ Draining ─▶ (gone)
/// ```
/// An RST from or to the guest ends it in any state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// There is no socket yet.
    Connecting,
    /// The guest is to answer.
    Requested,
    /// Bytes go both ways.
    Open,
    /// The host's side is gone, the guest was told, and has not agreed yet.
    Over,
    /// The guest is done with it; what it had sent is still to be taken by the host's side.
    Draining,
}

bitflags! {
    /// Packets due to the guest, data apart.
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
    pub(super) struct Due: u8 {
        const REQUEST = 1;
        const RESPONSE = 2;
        const SHUTDOWN = 4;
        const CREDIT = 8;
    }
}

/// What becomes of a connection after a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    Stays,
    /// The guest is done with it, is answered by an RST, and may use its port again.
    Finished,
    /// The guest broke the rules: it is answered by an RST, and all is dropped.
    Refused,
    /// The guest dropped it.
    Dropped,
}

impl From<Violation> for Fate {
    fn from(_: Violation) -> Self {
        Self::Refused
    }
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    pub(super) key: Key,
    pub(super) state: State,
    pub(super) stream: Option<Stream>,
    pub(super) credit: Credit,
    /// Bytes of the guest's that the socket has not taken.
    held: VecDeque<u8>,
    /// What the guest said it will do no more.
    pub(super) guest_ended: Ended,
    /// What the host's side will do no more.
    pub(super) host_ended: Ended,
    pub(super) due: Due,
    /// The socket may have something to read.
    pub(super) readable: bool,
    /// Buffers to have for the next read.
    pub(super) appetite: usize,
    watched: Option<Interest>,
    /// Whether it has a turn with the guest's buffers.
    pub in_turn: bool,
}

impl Connection {
    fn new(key: Key, state: State, room: u32) -> Self {
        Self {
            key,
            state,
            stream: None,
            credit: Credit::new(room),
            held: VecDeque::new(),
            guest_ended: Ended::empty(),
            host_ended: Ended::empty(),
            due: Due::empty(),
            readable: false,
            appetite: 1,
            watched: None,
            in_turn: false,
        }
    }

    /// One that the guest asks for; its socket comes with [`Self::connected`]. `room`: bytes held at most.
    pub fn requested_by_guest(key: Key, room: u32, request: &Header) -> Self {
        let mut this = Self::new(key, State::Connecting, room);
        // Nothing was sent, so this only fails for a guest that cheats, which will get nothing.
        let _ = this.credit.heard(request);
        this
    }

    /// One that the guest is asked for, with the socket of the host's side.
    pub fn requested_by_host(key: Key, room: u32, stream: Stream) -> Self {
        let mut this = Self::new(key, State::Requested, room);
        this.stream = Some(stream);
        this.due = Due::REQUEST;
        this
    }

    /// Its ports.
    pub fn key(&self) -> Key {
        self.key
    }

    /// Bytes that it may hold.
    pub fn room(&self) -> u32 {
        self.credit.room()
    }

    /// Whether it waits for its socket.
    pub fn is_connecting(&self) -> bool {
        self.state == State::Connecting
    }

    /// Whether the host's side is gone and the guest knows.
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// Whether nothing is left to do.
    pub fn is_done(&self) -> bool {
        self.state == State::Draining && self.held.is_empty()
    }

    /// Here is the socket: the guest's request is granted.
    pub fn connected(&mut self, stream: Stream) {
        self.stream = Some(stream);
        self.state = State::Open;
        self.due |= Due::RESPONSE;
    }

    /// A packet of the guest's, its data still in `reader`.
    pub fn receive(&mut self, header: &Header, reader: &mut Reader<'_>) -> Fate {
        if header.op == op::RST {
            return Fate::Dropped;
        }
        if let Err(e) = self.credit.heard(header) {
            return e.into();
        }
        match (header.op, self.state) {
            (op::RESPONSE, State::Requested) => self.state = State::Open,
            (op::RW, State::Open | State::Over) => return self.receive_data(header.len, reader),
            (op::SHUTDOWN, State::Open | State::Over | State::Requested) => {
                return self.receive_end(Ended::from_bits_truncate(header.flags));
            }
            (op::SHUTDOWN, State::Connecting) => return Fate::Finished,
            (op::CREDIT_UPDATE, _) => {}
            (op::CREDIT_REQUEST, State::Open) => self.due |= Due::CREDIT,
            (op::CREDIT_REQUEST, _) => {}
            _ => return Fate::Refused,
        }
        Fate::Stays
    }

    fn receive_data(&mut self, len: u32, reader: &mut Reader<'_>) -> Fate {
        if self.guest_ended.contains(Ended::SEND) || reader.remaining() < len as usize {
            return Fate::Refused;
        }
        if let Err(e) = self.credit.receive(len) {
            return e.into();
        }
        let data = Reader::take(reader, len as usize);
        self.pass_on(&data, len as usize);
        self.note_credit();
        Fate::Stays
    }

    /// Gives the guest's bytes to the socket, and holds what it does not take.
    fn pass_on(&mut self, data: &[VolatileSlice<'_>], len: usize) {
        let mut taken = 0;
        match &self.stream {
            Some(stream) if !self.host_ended.contains(Ended::RECEIVE) => {
                if self.held.is_empty() && len > 0 {
                    match stream.write(data) {
                        Write::Taken(n) => taken = n,
                        Write::Full => {}
                        Write::Gone => {
                            self.credit.forward(len);
                            return self.host_receives_no_more();
                        }
                    }
                }
            }
            // Nobody is there to take it, and the guest is told so.
            _ => taken = len,
        }
        self.credit.forward(taken);
        self.hold(data, taken);
        if taken > 0 && taken < len {
            // It took one part and may take more: there is a limit of pieces for one call.
            self.flush();
        }
    }

    /// Keeps all but the first `skip` bytes.
    fn hold(&mut self, data: &[VolatileSlice<'_>], mut skip: usize) {
        let mut chunk = [0; 4096];
        for piece in data {
            let mut at = skip.min(piece.len());
            skip -= at;
            while at < piece.len()
                && let Ok(part) = piece.subslice(at, chunk.len().min(piece.len() - at))
            {
                let n = part.copy_to(&mut chunk[..]);
                self.held.extend(&chunk[..n]);
                at += n;
            }
        }
    }

    /// Gives held bytes to the socket. Returns whether it took any, or none are left to take.
    pub fn flush(&mut self) -> bool {
        let before = self.held.len();
        while !self.held.is_empty()
            && let Some(stream) = &self.stream
        {
            match stream.write_bytes(self.held.as_slices().0) {
                Write::Taken(n) => {
                    self.held.drain(..n);
                    self.credit.forward(n);
                }
                Write::Full => break,
                Write::Gone => self.host_receives_no_more(),
            }
        }
        if self.held.is_empty() {
            // Memory is for those that need it.
            self.held = VecDeque::new();
            if self.guest_ended.contains(Ended::SEND)
                && let Some(stream) = &self.stream
            {
                stream.end_sending();
            }
        }
        self.note_credit();
        self.held.is_empty() || self.held.len() < before
    }

    pub(super) fn host_receives_no_more(&mut self) {
        self.credit.forward(self.held.len());
        self.held.clear();
        self.host_ends(Ended::RECEIVE);
    }

    pub(super) fn host_ends(&mut self, what: Ended) {
        if !self.host_ended.contains(what) {
            self.host_ended |= what;
            self.due |= Due::SHUTDOWN;
        }
    }

    fn note_credit(&mut self) {
        if self.state == State::Open && self.credit.is_update_due() {
            self.due |= Due::CREDIT;
        }
    }

    /// The guest ends one direction, or both.
    fn receive_end(&mut self, what: Ended) -> Fate {
        let new = what - self.guest_ended;
        self.guest_ended |= what;
        if self.guest_ended.is_all() {
            return Fate::Finished;
        }
        if new.contains(Ended::SEND) && self.held.is_empty() {
            self.flush();
        }
        if new.contains(Ended::RECEIVE) {
            self.readable = false;
            if let Some(stream) = &self.stream {
                stream.end_receiving();
            }
        }
        Fate::Stays
    }

    /// The guest is done: only what it sent before is still to be passed on.
    pub fn drain(&mut self) {
        self.state = State::Draining;
        (self.due, self.readable) = (Due::empty(), false);
        self.flush();
    }

    /// The socket is ready for what it was watched for.
    pub fn ready(&mut self, readable: bool, writable: bool) {
        if writable && !self.held.is_empty() {
            self.flush();
        }
        self.readable |= readable && self.may_read();
    }

    pub(super) fn may_read(&self) -> bool {
        self.state == State::Open
            && self.stream.is_some()
            && !self.host_ended.contains(Ended::SEND)
            && !self.guest_ended.contains(Ended::RECEIVE)
    }

    /// What to wait for on the socket: nothing that could not be dealt with at once.
    fn interest(&self) -> Option<Interest> {
        let read = self.may_read() && !self.readable && self.credit.left() > 0;
        let write = !self.held.is_empty();
        match (read, write) {
            (true, true) => Some(Interest::Both),
            (true, false) => Some(Interest::Read),
            (false, true) => Some(Interest::Write),
            (false, false) => None,
        }
    }

    /// Watches the socket for what is wanted now, or no more; the socket of a connection that is over is closed.
    ///
    /// # Errors
    /// The host cannot watch it.
    pub fn settle(&mut self, cx: &Cx<'_>, token: u64) -> io::Result<()> {
        let wanted = self.interest();
        let Some(stream) = &self.stream else { return Ok(()) };
        if self.watched != wanted {
            match (self.watched, wanted) {
                (_, None) => cx.unwatch(stream)?,
                (None, Some(interest)) => cx.watch(stream, token, interest)?,
                (Some(_), Some(interest)) => cx.rewatch(stream, token, interest)?,
            }
            self.watched = wanted;
        }
        if self.state == State::Over {
            self.stream = None;
        }
        Ok(())
    }

    /// Ends the watch before the socket is closed.
    pub fn unwatch(&mut self, cx: &Cx<'_>) {
        if self.watched.take().is_some()
            && let Some(stream) = &self.stream
        {
            // It was watched, so this cannot fail; and closing it does the same.
            let _ = cx.unwatch(stream);
        }
    }

    /// Whether bytes of the guest's are held.
    pub fn is_holding(&self) -> bool {
        !self.held.is_empty()
    }

    /// The socket.
    pub fn socket(&self) -> Option<&impl AsFd> {
        self.stream.as_ref()
    }
}
