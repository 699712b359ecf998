//! Flow control of one connection (virtio 1.2, section 5.10.6.3): each side tells how much room it has and how much its
//! user has taken, and the other sends no more than fits. All counts are modulo 2^32.

use super::packet::Header;

/// More room than this is not believed in, so that a count that ran ahead can be told from one that lags behind.
const MOST: u32 = 1 << 30;

/// The peer broke the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Violation;

/// Counts of both directions.
#[derive(Debug, Default)]
pub struct Credit {
    /// Bytes from the guest for which there is room here.
    room: u32,
    /// Bytes from the guest, and those of them that the host's side has taken.
    received: u32,
    forwarded: u32,
    /// What `forwarded` was when the guest last heard of it.
    told: u32,
    /// Bytes to the guest for which it has room.
    guest_room: u32,
    /// Bytes to the guest, and those of them that its user has taken.
    sent: u32,
    taken: u32,
}

impl Credit {
    /// With `room` bytes for what comes from the guest.
    pub fn new(room: u32) -> Self {
        Self { room, ..Self::default() }
    }

    /// Bytes from the guest for which there is room.
    pub fn room(&self) -> u32 {
        self.room
    }

    /// The guest sent `len` bytes.
    ///
    /// # Errors
    /// There was no room for them.
    pub fn receive(&mut self, len: u32) -> Result<(), Violation> {
        let held = self.received.wrapping_sub(self.forwarded);
        if len > self.room.saturating_sub(held) {
            return Err(Violation);
        }
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// The host's side took `len` bytes.
    pub fn forward(&mut self, len: usize) {
        // Never more than was received, which is 32 bits.
        self.forwarded = self.forwarded.wrapping_add(len as u32);
    }

    /// Whether the guest should be told that there is room again: it knows of less than half, and a quarter can be added.
    /// When nothing is held this is so at the latest when the guest believes in half, so it never waits in vain. While a
    /// message is `incomplete`, which is held until its end has come, there may be no quarter to add, and anything counts.
    pub fn is_update_due(&self, incomplete: bool) -> bool {
        let known = self.room.saturating_sub(self.received.wrapping_sub(self.told));
        let more = self.forwarded.wrapping_sub(self.told);
        known < self.room / 2 && more > 0 && (incomplete || more >= self.room / 4)
    }

    /// Fills in what the guest should know.
    pub fn stamp(&mut self, header: &mut Header) {
        (header.buf_alloc, header.fwd_cnt) = (self.room, self.forwarded);
        self.told = self.forwarded;
    }

    /// The guest tells its side. Its packets may overtake one another after they were filled in, so an older count than
    /// one heard before means nothing.
    ///
    /// # Errors
    /// It claims to have taken what was not sent.
    pub fn heard(&mut self, header: &Header) -> Result<(), Violation> {
        let behind = self.sent.wrapping_sub(header.fwd_cnt);
        if behind > i32::MAX as u32 {
            return Err(Violation);
        }
        self.guest_room = header.buf_alloc.min(MOST);
        if behind < self.sent.wrapping_sub(self.taken) {
            self.taken = header.fwd_cnt;
        }
        Ok(())
    }

    /// Bytes for which the guest has room when its user has taken all.
    pub fn guest_room(&self) -> u32 {
        self.guest_room
    }

    /// Bytes that may be sent to the guest.
    pub fn left(&self) -> u32 {
        self.guest_room.saturating_sub(self.sent.wrapping_sub(self.taken))
    }

    /// `len` bytes were sent, at most [`Self::left`].
    pub fn send(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_guest(buf_alloc: u32, fwd_cnt: u32) -> Header {
        Header { buf_alloc, fwd_cnt, ..Header::default() }
    }

    #[test]
    fn the_guest_can_send_what_there_is_room_for() {
        let mut c = Credit::new(1000);
        c.receive(600).unwrap();
        assert_eq!(c.receive(401), Err(Violation));
        assert_eq!(c.receive(u32::MAX), Err(Violation));
        c.receive(400).unwrap();
        assert!(!c.is_update_due(false));
        c.forward(249);
        assert!(!c.is_update_due(false));
        c.forward(1);
        assert!(c.is_update_due(false));
        let mut header = Header::default();
        c.stamp(&mut header);
        assert_eq!((header.buf_alloc, header.fwd_cnt, c.is_update_due(false)), (1000, 250, false));
        assert_eq!(c.receive(251), Err(Violation));
        c.receive(250).unwrap();
    }

    #[test]
    fn an_incomplete_message_may_fill_the_room() {
        let mut c = Credit::new(1000);
        c.receive(100).unwrap();
        c.forward(100);
        c.receive(900).unwrap();
        assert!(!c.is_update_due(false) && c.is_update_due(true));
        c.stamp(&mut Header::default());
        assert!(!c.is_update_due(true), "there is nothing new");
        c.receive(100).unwrap();
    }

    #[test]
    fn counts_go_round() {
        let mut c = Credit::new(1 << 20);
        c.heard(&from_guest(1 << 20, 0)).unwrap();
        for n in 1..=10_000u32 {
            c.receive(1 << 20).unwrap();
            c.forward(1 << 20);
            assert!(c.is_update_due(false));
            c.stamp(&mut Header::default());
            assert_eq!(c.left(), 1 << 20);
            c.send(1 << 20);
            assert_eq!(c.left(), 0);
            c.heard(&from_guest(1 << 20, n.wrapping_mul(1 << 20))).unwrap();
        }
    }

    #[test]
    fn a_guest_cannot_take_what_was_not_sent() {
        let mut c = Credit::new(0);
        c.heard(&from_guest(u32::MAX, 0)).unwrap();
        assert_eq!(c.left(), MOST);
        assert_eq!(c.heard(&from_guest(100, 1)), Err(Violation));
        c.send(50);
        c.heard(&from_guest(100, 20)).unwrap();
        assert_eq!(c.left(), 70);
        // Less room than is in use already.
        c.heard(&from_guest(10, 20)).unwrap();
        assert_eq!(c.left(), 0);
        // One that was overtaken.
        c.heard(&from_guest(100, 19)).unwrap();
        assert_eq!(c.left(), 70);
        c.heard(&from_guest(100, 50)).unwrap();
        assert_eq!(c.left(), 100);
    }
}
