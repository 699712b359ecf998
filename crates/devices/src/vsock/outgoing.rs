//! What a connection has for the guest.

use super::buffers::Buffers;
use super::connection::{Connection, Due, State};
use super::packet::{END_OF_MESSAGE, END_OF_RECORD, Ended, Header, op};
use super::socket::{Look, Read, Socket};
use super::spec::SocketType;

/// Most buffers that are filled at once.
pub const MOST_BUFFERS: usize = 64;

impl Connection {
    /// Whether there is something for the guest, or may be.
    pub fn wants_turn(&self) -> bool {
        !self.due.is_empty() || self.readable && self.credit.left() > 0
    }

    /// How many buffers to have for the next packets, and for how many bytes of data.
    pub fn appetite(&self) -> (usize, usize) {
        match self.due - Due::CREDIT {
            due if due.is_empty() => (self.appetite, self.credit.left() as usize),
            _ => (1, 0),
        }
    }

    /// The next packets for the guest, their data in `buffers`, of which there is one at least; none is added when there
    /// is none. The ports are filled in, the context ids are not.
    pub fn next_packets(&mut self, buffers: &Buffers<'_>, out: &mut Vec<Header>) {
        let first = out.len();
        if let Some(header) = self.next_due() {
            out.push(header);
        } else {
            self.read(buffers, out);
            if out.len() == first {
                // Reading may have found the end. Room is told by any packet, so a packet of its own comes last.
                let update = self.due.contains(Due::CREDIT).then(|| self.header(op::CREDIT_UPDATE, 0, 0));
                out.extend(self.next_due().or(update));
            }
        }
        for header in &mut out[first..] {
            self.credit.stamp(header);
            self.due -= Due::CREDIT;
        }
    }

    fn header(&self, op: u16, flags: u32, len: u32) -> Header {
        let (src_port, dst_port) = (self.key.host_port, self.key.guest_port);
        Header { src_port, dst_port, op, flags, len, ..Header::default() }
    }

    fn next_due(&mut self) -> Option<Header> {
        if self.due.contains(Due::REQUEST) {
            self.due -= Due::REQUEST;
            return Some(self.header(op::REQUEST, 0, 0));
        }
        if self.due.contains(Due::RESPONSE) {
            self.due -= Due::RESPONSE;
            return Some(self.header(op::RESPONSE, 0, 0));
        }
        if self.due.contains(Due::SHUTDOWN) {
            self.due -= Due::SHUTDOWN;
            if self.host_ended.is_all() {
                self.state = State::Over;
            }
            return Some(self.header(op::SHUTDOWN, self.host_ended.bits(), 0));
        }
        None
    }

    /// Reads from the socket what the guest has room for.
    fn read(&mut self, buffers: &Buffers<'_>, out: &mut Vec<Header>) {
        if !self.readable || self.credit.left() == 0 || !self.may_read() {
            return;
        }
        match self.kind {
            SocketType::Stream => self.read_bytes(buffers, out),
            SocketType::SeqPacket => self.read_message(buffers, out),
        }
    }

    fn read_bytes(&mut self, buffers: &Buffers<'_>, out: &mut Vec<Header>) {
        let Some(socket) = &self.socket else { return };
        let room = buffers.room(self.credit.left() as usize);
        match socket.read(&room.pieces) {
            Read::Data(n) => {
                // A short read has emptied the socket, most likely; if not, it is reported again.
                self.readable = n == room.len;
                self.add_data(n, self.readable, buffers, out);
            }
            Read::NotReady => self.readable = false,
            Read::End => self.host_sends_no_more(),
        }
    }

    /// Reads a message, or a part of one: it stays in the socket until the guest has all of it.
    fn read_message(&mut self, buffers: &Buffers<'_>, out: &mut Vec<Header>) {
        let Some(socket) = &self.socket else { return };
        let room = buffers.room(self.credit.left() as usize);
        let peeked = match socket.look(&room.pieces) {
            Look::Message(peeked) => peeked,
            Look::NotReady => {
                self.readable = false;
                return;
            }
            Look::End => return self.host_sends_no_more(),
        };
        if !self.in_message && peeked.len > self.credit.guest_room() as usize {
            tracing::debug!(
                "vsock: a connection is dropped: a message of {} bytes, and the guest has room for {}",
                peeked.len,
                self.credit.guest_room()
            );
            (self.broken, self.readable) = (true, false);
            return;
        }
        self.in_message = peeked.len > room.len;
        if !self.in_message {
            socket.discard();
        }
        self.add_data(peeked.len.min(room.len), self.in_message, buffers, out);
        if !self.in_message
            && let Some(last) = out.last_mut()
        {
            last.flags = END_OF_MESSAGE | if peeked.end_of_record { END_OF_RECORD } else { 0 };
        }
    }

    /// The host's side has ended.
    fn host_sends_no_more(&mut self) {
        self.readable = false;
        if self.socket.as_ref().is_some_and(Socket::is_hung_up) {
            self.host_receives_no_more();
        }
        self.host_ends(Ended::SEND);
    }

    /// Headers for `len` bytes that are in `buffers`, with `more` to come.
    fn add_data(&mut self, len: usize, more: bool, buffers: &Buffers<'_>, out: &mut Vec<Header>) {
        let mut rest = len;
        let mut used = 0;
        while let Some(capacity) = buffers.capacity(used) {
            let n = rest.min(capacity);
            // A buffer is less than 4 GiB.
            out.push(self.header(op::RW, 0, n as u32));
            (used, rest) = (used + 1, rest - n);
            if rest == 0 {
                break;
            }
        }
        self.credit.send(len as u32);
        // Buffers that are taken in vain cost time, and so does every call that could have read more.
        self.appetite = if more { (4 * used).min(MOST_BUFFERS) } else { used };
    }
}
