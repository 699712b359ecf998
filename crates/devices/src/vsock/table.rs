//! All connections, and whose turn it is.

use std::collections::{HashMap, VecDeque};

use super::connection::{Connection, Key};

/// Memory for what all connections together hold, as long as there are few of them.
const POOL: u64 = 128 << 20;
/// Bytes that one may hold.
const MOST: u64 = 256 << 10;
/// Bytes that each may hold however many there are.
const LEAST: u64 = 4 << 10;
/// Part of the pool's rest that a new connection gets.
const PART: u64 = 256;

/// Ports of the host for connections to the guest; those of programs are lower, by custom.
const FIRST_PORT: u32 = 1 << 30;

/// Highest number of a connection.
const LAST_ID: u32 = (1 << 31) - 1;

/// Connections by number and by ports.
#[derive(Debug)]
pub struct Table {
    limit: usize,
    by_id: HashMap<u32, Connection>,
    by_key: HashMap<Key, u32>,
    last_id: u32,
    last_port: u32,
    /// Memory promised to all.
    promised: u64,
    /// Those with something for the guest, in turn.
    turn: VecDeque<u32>,
}

impl Table {
    /// For at most `limit` connections.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            by_id: HashMap::new(),
            by_key: HashMap::new(),
            last_id: 0,
            last_port: FIRST_PORT,
            promised: 0,
            turn: VecDeque::new(),
        }
    }

    /// Most connections.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Whether there can be no more.
    pub fn is_full(&self) -> bool {
        self.by_id.len() >= self.limit
    }

    /// Bytes that the next connection may hold.
    pub fn room(&self) -> u32 {
        let part = POOL.saturating_sub(self.promised) / PART;
        // Far below 32 bits.
        part.clamp(LEAST, MOST) as u32
    }

    /// Adds a connection whose ports are not in use, and returns its number.
    pub fn insert(&mut self, connection: Connection) -> u32 {
        let id =
            (1..).map(|n| self.last_id.wrapping_add(n) & LAST_ID).find(|id| !self.by_id.contains_key(id));
        // There are fewer connections than numbers.
        let id = id.unwrap_or_default();
        self.last_id = id;
        self.promised += connection.cost();
        self.by_key.insert(connection.key(), id);
        self.by_id.insert(id, connection);
        id
    }

    /// A port of the host that has no connection with `guest_port`.
    pub fn free_port(&mut self, guest_port: u32) -> u32 {
        loop {
            self.last_port = self.last_port.wrapping_add(1).max(FIRST_PORT);
            let key = Key { host_port: self.last_port, guest_port };
            if self.last_port != u32::MAX && !self.by_key.contains_key(&key) {
                return self.last_port;
            }
        }
    }

    /// The connection of these ports.
    pub fn find(&self, key: &Key) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    /// A connection by its number.
    pub fn get(&self, id: u32) -> Option<&Connection> {
        self.by_id.get(&id)
    }

    /// The same, to change it.
    pub fn get_mut(&mut self, id: u32) -> Option<&mut Connection> {
        self.by_id.get_mut(&id)
    }

    /// All of them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Connection> {
        self.by_id.values_mut()
    }

    /// Frees the ports of a connection that goes on without them.
    pub fn free_key(&mut self, id: u32) {
        if let Some(connection) = self.by_id.get(&id)
            && self.by_key.get(&connection.key()) == Some(&id)
        {
            self.by_key.remove(&connection.key());
        }
    }

    /// Takes a connection out.
    pub fn remove(&mut self, id: u32) -> Option<Connection> {
        self.free_key(id);
        let connection = self.by_id.remove(&id)?;
        self.promised -= connection.cost();
        Some(connection)
    }

    /// Removes all.
    pub fn clear(&mut self) {
        *self = Self::new(self.limit);
    }

    /// Lines a connection up if it has something for the guest.
    pub fn line_up(&mut self, id: u32) {
        if let Some(connection) = self.by_id.get_mut(&id)
            && connection.wants_turn()
            && !std::mem::replace(&mut connection.in_turn, true)
        {
            if self.turn.len() >= 2 * self.limit {
                // A guest that takes nothing makes and drops connections.
                self.turn.retain(|id| self.by_id.contains_key(id));
            }
            self.turn.push_back(id);
        }
    }

    /// Whose turn it is.
    pub fn first(&mut self) -> Option<(u32, &mut Connection)> {
        while let Some(&id) = self.turn.front() {
            if self.by_id.contains_key(&id) {
                return self.by_id.get_mut(&id).map(|c| (id, c));
            }
            self.turn.pop_front();
        }
        None
    }

    /// Ends the turn of the first; it lines up again if it has more.
    pub fn next(&mut self) {
        if let Some(id) = self.turn.pop_front()
            && let Some(connection) = self.by_id.get_mut(&id)
        {
            connection.in_turn = false;
            self.line_up(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vsock::SocketType;
    use crate::vsock::packet::Header;
    use crate::vsock::socket::Socket;

    fn add(table: &mut Table, guest_port: u32) -> u32 {
        add_of(table, guest_port, SocketType::Stream)
    }

    fn add_of(table: &mut Table, guest_port: u32, kind: SocketType) -> u32 {
        let host_port = table.free_port(guest_port);
        let key = Key { host_port, guest_port };
        let room = table.room();
        table.insert(Connection::requested_by_guest(key, kind, room, &Header::default()))
    }

    #[test]
    fn promises_are_bounded_and_given_back() {
        let mut table = Table::new(1 << 14);
        let mut ids = Vec::new();
        while !table.is_full() {
            ids.push(add(&mut table, 1));
        }
        assert_eq!(ids.len(), 1 << 14);
        assert_eq!(table.get(ids[255]).unwrap().room(), 256 << 10);
        assert!((8 << 10..=16 << 10).contains(&table.get(ids[1024]).unwrap().room()));
        assert_eq!(u64::from(table.get(ids[16000]).unwrap().room()), LEAST);
        assert!(table.promised <= POOL + (LEAST << 14));
        for id in ids {
            table.remove(id).unwrap();
        }
        assert_eq!((table.promised, table.by_key.len()), (0, 0));
    }

    #[test]
    fn messages_are_promised_their_marks_too() {
        let mut table = Table::new(1 << 14);
        let first = add_of(&mut table, 1, SocketType::SeqPacket);
        assert_eq!(table.get(first).unwrap().room(), 256 << 10);
        assert!(table.promised > 2 * (256 << 10));
        let mut last = first;
        while table.promised < POOL {
            last = add_of(&mut table, 1, SocketType::SeqPacket);
        }
        assert!(last > 500 && u64::from(table.get(last).unwrap().room()) == LEAST);
        assert!(table.promised <= POOL + table.get(last).unwrap().cost());
        for id in first..=last {
            table.remove(id).unwrap();
        }
        assert_eq!(table.promised, 0);
    }

    #[test]
    fn who_is_gone_has_no_turn() {
        let mut table = Table::new(10);
        for _ in 0..1000 {
            let id = add(&mut table, 1);
            let connection = table.get_mut(id).unwrap();
            connection.connected(
                Socket::of_type(std::os::unix::net::UnixStream::pair().unwrap().0.into(), SocketType::Stream)
                    .unwrap(),
            );
            table.line_up(id);
            table.remove(id).unwrap();
        }
        assert!(!table.turn.is_empty() && table.turn.len() <= 21);
        assert!(table.first().is_none() && table.turn.is_empty());
    }

    #[test]
    fn ports_and_numbers_go_round() {
        let mut table = Table::new(10);
        (table.last_id, table.last_port) = (LAST_ID - 2, u32::MAX - 2);
        let ids: Vec<_> = (0..4).map(|_| add(&mut table, 1)).collect();
        assert_eq!(ids, [LAST_ID - 1, LAST_ID, 0, 1]);
        let ports: Vec<_> = ids.iter().map(|id| table.get(*id).unwrap().key().host_port).collect();
        assert_eq!(ports, [u32::MAX - 1, FIRST_PORT, FIRST_PORT + 1, FIRST_PORT + 2]);
        table.last_port = FIRST_PORT;
        assert_eq!(table.free_port(1), FIRST_PORT + 3);
        let key = table.get(0).unwrap().key();
        table.free_key(0);
        assert_eq!(table.find(&key), None);
        let again =
            table.insert(Connection::requested_by_guest(key, SocketType::Stream, 1, &Header::default()));
        table.remove(0).unwrap();
        assert_eq!(table.find(&key), Some(again));
    }
}
