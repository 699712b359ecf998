//! How connections begin: the guest asks for one, or a program of the host does.

use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use krun_event::Interest;
use krun_virtio::{Cx, DeviceError};

use super::connection::{Connection, Key};
use super::device::{FIRST_LISTENER, Vsock, reset, serves};
use super::packet::Header;
use super::socket::Socket;
use super::spec::SocketType;

/// Connections accepted before others have their turn.
const ACCEPT_BATCH: u32 = 64;
/// Time after which something is tried again of which no event tells: connecting where as many wait as fit, accepting
/// when no descriptor was left.
const RETRY_AFTER: Duration = Duration::from_millis(20);

impl Vsock {
    /// The guest wants to connect.
    pub(super) fn request(&mut self, key: Key, kind: SocketType, header: &Header) {
        let Some(connector) = self.connectors.get_mut(&key.host_port) else {
            return self.refuse(header);
        };
        if self.table.is_full() {
            tracing::debug!("vsock: a connection to port {} is one too many", key.host_port);
            return self.refuse(header);
        }
        let connection = Connection::requested_by_guest(key, kind, self.table.room(), header);
        let id = self.table.insert(connection);
        let table = &self.table;
        // Each of those that are wanted is a connection.
        let wanted = |id| table.get(id).is_some_and(Connection::is_connecting);
        connector.push(id, kind, 2 * table.limit(), wanted);
        self.connect(key.host_port);
    }

    /// Makes the connections to `port` that can be made now.
    fn connect(&mut self, port: u32) {
        let cid = self.config.cid;
        let Some(connector) = self.connectors.get_mut(&port) else { return };
        loop {
            let table = &self.table;
            let next = connector.next(|id| table.get(id).is_some_and(Connection::is_connecting));
            let Some((id, result)) = next else { break };
            match (self.table.get_mut(id), result) {
                (Some(connection), Ok(socket)) if socket.as_fd().as_raw_fd() < self.top => {
                    connection.connected(socket);
                    self.table.line_up(id);
                    self.touched.push(id);
                }
                _ => {
                    if let Some(connection) = self.table.remove(id) {
                        self.resets.push_back(reset(cid, &connection));
                    }
                }
            }
        }
        if connector.is_waiting() {
            self.retry_later();
        }
    }

    /// Asks the guest for a connection with one that was accepted.
    fn call_guest(&mut self, guest_port: u32, kind: SocketType, socket: Socket) {
        let key = Key { host_port: self.table.free_port(guest_port), guest_port };
        let connection = Connection::requested_by_host(key, kind, self.table.room(), socket);
        let id = self.table.insert(connection);
        self.touch(id);
    }

    pub(super) fn accept(&mut self, index: usize, cx: &Cx<'_>) {
        let Some(listener) = self.listeners.get(index) else { return };
        let (port, kind) = (listener.port(), listener.kind());
        for _ in 0..ACCEPT_BATCH {
            if self.table.is_full() {
                return self.pause(index, cx);
            }
            match self.listeners[index].accept() {
                // The guest's driver knows no such sockets, so nobody can listen there.
                Ok(Some(_)) if !serves(cx, kind) => {}
                Ok(Some(socket)) => {
                    let last = socket.as_fd().as_raw_fd() >= self.top;
                    self.call_guest(port, kind, socket);
                    if last {
                        return self.pause(index, cx);
                    }
                }
                Ok(None) => return,
                Err(e) => {
                    tracing::warn!("vsock: accepting at {}: {e}", self.listeners[index].path().display());
                    return self.pause(index, cx);
                }
            }
        }
    }

    /// Accepts nothing for a while.
    fn pause(&mut self, index: usize, cx: &Cx<'_>) {
        let listener = &mut self.listeners[index];
        if !std::mem::replace(&mut listener.paused, true) {
            // It was watched.
            let _ = cx.unwatch(listener);
        }
        self.retry_later();
    }

    fn retry_later(&mut self) {
        if !std::mem::replace(&mut self.timing, true)
            && let Err(e) = self.timer.set(RETRY_AFTER)
        {
            tracing::warn!("vsock: setting a timer: {e}");
        }
    }

    pub(super) fn retry(&mut self, cx: &Cx<'_>) -> Result<(), DeviceError> {
        self.timer.take();
        self.timing = false;
        let ports: Vec<_> = self.connectors.iter().filter(|c| c.1.is_waiting()).map(|c| *c.0).collect();
        for port in ports {
            self.connect(port);
        }
        for index in 0..self.listeners.len() {
            if std::mem::take(&mut self.listeners[index].paused) {
                self.watch_listener(index, cx)?;
                self.accept(index, cx);
            }
        }
        Ok(())
    }

    pub(super) fn watch_listener(&self, index: usize, cx: &Cx<'_>) -> Result<(), DeviceError> {
        let listener = &self.listeners[index];
        cx.watch(listener, FIRST_LISTENER + index as u64, Interest::Read).map_err(|source| {
            DeviceError::Host { what: format!("watching the socket {}", listener.path().display()), source }
        })
    }
}
