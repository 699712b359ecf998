//! What a connection has for the guest.

use krun_virtio::Writer;

use super::connection::{Connection, Due, State};
use super::packet::{Ended, Header, op};
use super::stream::Read;

impl Connection {
    /// Whether there is something for the guest, or may be.
    pub fn wants_turn(&self) -> bool {
        !self.due.is_empty() || self.readable && self.credit.left() > 0
    }

    /// The next packet for the guest, its data in `body`; `None` when there is none. The ports are filled in, the
    /// context ids are not.
    pub fn next_packet(&mut self, body: &mut Writer<'_>) -> Option<Header> {
        let (op, flags, len) = self.next_contents(body)?;
        let mut header = Header {
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            op,
            flags,
            len,
            ..Header::default()
        };
        self.credit.stamp(&mut header);
        self.due -= Due::CREDIT;
        Some(header)
    }

    fn next_contents(&mut self, body: &mut Writer<'_>) -> Option<(u16, u32, u32)> {
        if let Some(packet) = self.next_due() {
            return Some(packet);
        }
        if let Some(len) = self.read(body) {
            return Some((op::RW, 0, len));
        }
        // Reading may have found the end. Room is told by any packet, so a packet of its own comes last.
        self.next_due().or_else(|| self.due.contains(Due::CREDIT).then_some((op::CREDIT_UPDATE, 0, 0)))
    }

    fn next_due(&mut self) -> Option<(u16, u32, u32)> {
        if self.due.contains(Due::REQUEST) {
            self.due -= Due::REQUEST;
            return Some((op::REQUEST, 0, 0));
        }
        if self.due.contains(Due::RESPONSE) {
            self.due -= Due::RESPONSE;
            return Some((op::RESPONSE, 0, 0));
        }
        if self.due.contains(Due::SHUTDOWN) {
            self.due -= Due::SHUTDOWN;
            if self.host_ended.is_all() {
                self.state = State::Over;
            }
            return Some((op::SHUTDOWN, self.host_ended.bits(), 0));
        }
        None
    }

    /// Reads from the socket what the guest has room for.
    fn read(&mut self, body: &mut Writer<'_>) -> Option<u32> {
        let left = self.credit.left();
        if !self.readable || left == 0 || !self.may_read() {
            return None;
        }
        let stream = self.stream.as_ref()?;
        let room = body.remaining().min(left as usize);
        // The rest of the buffer is not ours to fill.
        body.split_at(room);
        match stream.read(body.room()) {
            Read::Data(n) => {
                // A short read has emptied the socket, most likely; if not, it is reported again.
                self.readable = n == room;
                self.credit.send(n as u32);
                body.advance(n);
                return Some(n as u32);
            }
            Read::NotReady => self.readable = false,
            Read::End => {
                self.readable = false;
                let closed = stream.is_hung_up();
                if closed {
                    self.host_receives_no_more();
                }
                self.host_ends(Ended::SEND);
            }
        }
        None
    }
}
