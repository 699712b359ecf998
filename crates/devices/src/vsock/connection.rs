//! One connection: a pair of ports, a socket, and what is between them.

use std::io;
use std::os::fd::AsFd;

use bitflags::bitflags;
use krun_event::Interest;
use krun_memory::VolatileSlice;
use krun_virtio::{Cx, Reader};

use super::credit::{Credit, Violation};
use super::held::{self, Held};
use super::packet::{END_OF_MESSAGE, END_OF_RECORD, Ended, Header, op};
use super::socket::{Socket, Write};
use super::spec::SocketType;
use crate::sys::MAX_PIECES;
use crate::sys::messages::Contents;

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
    pub(super) kind: SocketType,
    pub(super) state: State,
    pub(super) socket: Option<Socket>,
    pub(super) credit: Credit,
    /// Bytes of the guest's that the socket has not taken.
    held: Held,
    /// What the guest said it will do no more.
    pub(super) guest_ended: Ended,
    /// What the host's side will do no more.
    pub(super) host_ended: Ended,
    pub(super) due: Due,
    /// The socket may have something to read.
    pub(super) readable: bool,
    /// The guest has a part of the message that is first in the socket.
    pub(super) in_message: bool,
    /// One side sent what the other can never take: it is to end.
    pub(super) broken: bool,
    /// Buffers to have for the next read.
    pub(super) appetite: usize,
    watched: Option<Interest>,
    /// Whether it has a turn with the guest's buffers.
    pub in_turn: bool,
}

impl Connection {
    fn new(key: Key, kind: SocketType, state: State, room: u32) -> Self {
        Self {
            key,
            kind,
            state,
            socket: None,
            credit: Credit::new(room),
            held: Held::new(room),
            guest_ended: Ended::empty(),
            host_ended: Ended::empty(),
            due: Due::empty(),
            readable: false,
            in_message: false,
            broken: false,
            appetite: 1,
            watched: None,
            in_turn: false,
        }
    }

    /// One that the guest asks for; its socket comes with [`Self::connected`]. `room`: bytes held at most.
    pub fn requested_by_guest(key: Key, kind: SocketType, room: u32, request: &Header) -> Self {
        let mut this = Self::new(key, kind, State::Connecting, room);
        // Nothing was sent, so this only fails for a guest that cheats, which will get nothing.
        let _ = this.credit.heard(request);
        this
    }

    /// One that the guest is asked for, with the socket of the host's side.
    pub fn requested_by_host(key: Key, kind: SocketType, room: u32, socket: Socket) -> Self {
        let mut this = Self::new(key, kind, State::Requested, room);
        this.socket = Some(socket);
        this.due = Due::REQUEST;
        this
    }

    /// Its ports.
    pub fn key(&self) -> Key {
        self.key
    }

    /// What it carries.
    pub fn kind(&self) -> SocketType {
        self.kind
    }

    /// Bytes that it may hold.
    pub fn room(&self) -> u32 {
        self.credit.room()
    }

    /// Memory that it may take for them.
    pub fn cost(&self) -> u64 {
        held::cost(self.kind, self.room())
    }

    /// Whether it waits for its socket.
    pub fn is_connecting(&self) -> bool {
        self.state == State::Connecting
    }

    /// Whether the host's side is gone and the guest knows.
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// Whether it cannot go on.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether nothing is left to do.
    pub fn is_done(&self) -> bool {
        self.state == State::Draining && self.held.is_empty()
    }

    /// Here is the socket: the guest's request is granted.
    pub fn connected(&mut self, socket: Socket) {
        self.socket = Some(socket);
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
            (op::RW, State::Open | State::Over) => return self.receive_data(header, reader),
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

    fn receive_data(&mut self, header: &Header, reader: &mut Reader<'_>) -> Fate {
        let len = header.len;
        if self.guest_ended.contains(Ended::SEND) || reader.remaining() < len as usize {
            return Fate::Refused;
        }
        if let Err(e) = self.credit.receive(len) {
            return e.into();
        }
        let data = Reader::take(reader, len as usize);
        let fate = if self.socket.is_none() || self.host_ended.contains(Ended::RECEIVE) {
            // Nobody is there to take it, and the guest is told so.
            self.credit.forward(len as usize);
            Fate::Stays
        } else {
            match self.kind {
                SocketType::Stream => {
                    self.pass_on(&data, len as usize);
                    Fate::Stays
                }
                SocketType::SeqPacket => self.pass_part_on(&data, header),
            }
        };
        self.note_credit();
        fate
    }

    /// Gives the guest's bytes to the socket, and holds what it does not take.
    fn pass_on(&mut self, data: &[VolatileSlice<'_>], len: usize) {
        let mut taken = 0;
        if let Some(socket) = &self.socket
            && self.held.is_empty()
            && len > 0
        {
            match socket.write(data) {
                Write::Taken(n) => taken = n,
                Write::Full => {}
                Write::Gone | Write::TooLong => {
                    self.credit.forward(len);
                    return self.host_receives_no_more();
                }
            }
        }
        self.credit.forward(taken);
        self.held.push(data, taken);
        if taken > 0 && taken < len {
            // It took one part and may take more: there is a limit of pieces for one call.
            self.flush();
        }
    }

    /// Gives a message to the socket, or holds this part of it.
    fn pass_part_on(&mut self, data: &[VolatileSlice<'_>], header: &Header) -> Fate {
        let len = header.len;
        let is_end = header.flags & END_OF_MESSAGE != 0;
        let end_of_record = header.flags & END_OF_RECORD != 0;
        let was_waiting = self.held.is_waiting();
        if let Some(socket) = &self.socket
            && is_end
            && self.held.is_empty()
            && data.len() <= MAX_PIECES
        {
            match socket.send(Contents::Guest(data), end_of_record) {
                Write::Full => {}
                answer => {
                    self.credit.forward(len as usize);
                    self.sent(answer);
                    return Fate::Stays;
                }
            }
        }
        if !self.held.push_part(data, is_end, end_of_record) {
            return Fate::Refused;
        }
        if is_end && !was_waiting {
            self.flush();
        }
        Fate::Stays
    }

    /// What became of a message; false when the socket takes no more now.
    fn sent(&mut self, answer: Write) -> bool {
        match answer {
            Write::Taken(_) => {}
            Write::Full => return false,
            Write::Gone => self.host_receives_no_more(),
            Write::TooLong => {
                tracing::debug!("vsock: a connection is dropped: its message is too long for a socket here");
                self.broken = true;
                self.host_receives_no_more();
            }
        }
        true
    }

    /// Gives held bytes to the socket.
    pub fn flush(&mut self) {
        while self.held.is_waiting()
            && let Some(socket) = &self.socket
        {
            if let Some((message, a, b)) = self.held.first() {
                let answer = socket.send(Contents::Own(a, b), message.end_of_record);
                if !self.sent(answer) {
                    break;
                }
                let len = self.held.pop();
                self.credit.forward(len);
                continue;
            }
            match socket.write_bytes(self.held.bytes()) {
                Write::Taken(n) => {
                    self.held.advance(n);
                    self.credit.forward(n);
                }
                Write::Full => break,
                Write::Gone | Write::TooLong => self.host_receives_no_more(),
            }
        }
        if self.held.is_empty() {
            // Memory is for those that need it.
            self.held.clear();
            if self.guest_ended.contains(Ended::SEND)
                && let Some(socket) = &self.socket
            {
                socket.end_sending();
            }
        }
        self.note_credit();
    }

    pub(super) fn host_receives_no_more(&mut self) {
        let dropped = self.held.clear();
        self.credit.forward(dropped);
        self.host_ends(Ended::RECEIVE);
    }

    pub(super) fn host_ends(&mut self, what: Ended) {
        if !self.host_ended.contains(what) {
            self.host_ended |= what;
            // A guest that is done is told nothing: its port may belong to another connection.
            if self.state != State::Draining {
                self.due |= Due::SHUTDOWN;
            }
        }
    }

    fn note_credit(&mut self) {
        if self.state == State::Open && self.credit.is_update_due(self.held.is_partial()) {
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
        if new.contains(Ended::SEND) {
            self.end_partial();
            if !self.held.is_waiting() {
                self.flush();
            }
        }
        if new.contains(Ended::RECEIVE) {
            self.readable = false;
            if let Some(socket) = &self.socket {
                socket.end_receiving();
            }
        }
        Fate::Stays
    }

    /// There will be no more of a message that is not complete.
    fn end_partial(&mut self) {
        let dropped = self.held.drop_partial();
        self.credit.forward(dropped);
    }

    /// The guest is done: only what it sent before is still to be passed on.
    pub fn drain(&mut self) {
        self.state = State::Draining;
        (self.due, self.readable) = (Due::empty(), false);
        self.end_partial();
        self.flush();
    }

    /// The socket is ready for what it was watched for.
    pub fn ready(&mut self, readable: bool, writable: bool) {
        if writable && self.held.is_waiting() {
            self.flush();
        }
        self.readable |= readable && self.may_read();
    }

    pub(super) fn may_read(&self) -> bool {
        self.state == State::Open
            && self.socket.is_some()
            && !self.host_ended.contains(Ended::SEND)
            && !self.guest_ended.contains(Ended::RECEIVE)
    }

    /// What to wait for on the socket: nothing that could not be dealt with at once.
    fn interest(&self) -> Option<Interest> {
        let read = self.may_read() && !self.readable && self.credit.left() > 0;
        let write = self.held.is_waiting();
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
        let Some(socket) = &self.socket else { return Ok(()) };
        if self.watched != wanted {
            match (self.watched, wanted) {
                (_, None) => cx.unwatch(socket)?,
                (None, Some(interest)) => cx.watch(socket, token, interest)?,
                (Some(_), Some(interest)) => cx.rewatch(socket, token, interest)?,
            }
            self.watched = wanted;
        }
        if self.state == State::Over {
            self.socket = None;
        }
        Ok(())
    }

    /// Ends the watch before the socket is closed.
    pub fn unwatch(&mut self, cx: &Cx<'_>) {
        if self.watched.take().is_some()
            && let Some(socket) = &self.socket
        {
            // It was watched, so this cannot fail; and closing it does the same.
            let _ = cx.unwatch(socket);
        }
    }

    /// Whether bytes of the guest's are held.
    pub fn is_holding(&self) -> bool {
        self.held.is_waiting()
    }

    /// The socket.
    pub fn socket(&self) -> Option<&impl AsFd> {
        self.socket.as_ref()
    }
}
