//! A unix socket on which programs of the host connect to a port of the guest.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, accept_with, bind, listen, socket_with};

use super::socket::Socket;
use super::spec::{PortSpec, SocketType, VsockError};

/// Connections that may wait to be accepted: as many as the host lets wait.
const BACKLOG: i32 = i32::MAX;

/// A socket of our own, which goes away with the value, and its file with it.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    kind: SocketType,
    /// Port of the guest.
    port: u32,
    path: PathBuf,
    /// Device and inode of the socket's file.
    file: (u64, u64),
    /// Not watched: no connection can be accepted for now.
    pub paused: bool,
}

fn host(what: &str, path: &Path, source: io::Error) -> VsockError {
    VsockError::Host { what: format!("{what} {}", path.display()), source }
}

/// Checks that a socket can be created at `path`: nothing is there, or the socket of a program that has ended, whose
/// device and inode are returned.
///
/// # Errors
/// [`VsockError::Occupied`], or the host's.
pub fn check_path(path: &Path) -> Result<Option<(u64, u64)>, VsockError> {
    let occupied = |what| Err(VsockError::Occupied { path: path.to_owned(), what });
    let file = match fs::symlink_metadata(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(host("looking for", path, e)),
    };
    if !file.file_type().is_socket() {
        return occupied("a file is there that is no socket; remove it, or name another path");
    }
    match Socket::connect(path, SocketType::Stream) {
        Err(e) if e.raw_os_error() == Some(Errno::CONNREFUSED.raw_os_error()) => {
            Ok(Some((file.dev(), file.ino())))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            occupied("a socket is there that belongs to somebody else; remove it, or name another path")
        }
        _ => occupied("a program listens there; end it, or name another path"),
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

fn create(path: &Path, kind: SocketType) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, kind.of_host(), flags, None)?;
    bind(&socket, &SocketAddrUnix::new(path.as_os_str().as_bytes())?)?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

impl Listener {
    /// Creates the socket, in place of one that a program left behind.
    ///
    /// # Errors
    /// [`check_path`]'s, or the host's.
    pub fn bind(spec: &PortSpec) -> Result<Self, VsockError> {
        let path = &spec.path;
        if let Some(stale) = check_path(path)? {
            // Looked at once more, so that a socket created meanwhile is not the one that goes.
            if identity(path).is_ok_and(|file| file == stale) {
                tracing::debug!("vsock: removing the stale socket {}", path.display());
                fs::remove_file(path).map_err(|e| host("removing the stale socket", path, e))?;
            }
        }
        let fail = |e| host("creating the socket", path, e);
        let socket = create(path, spec.socket).map_err(fail)?;
        let file = identity(path).map_err(fail)?;
        // The working directory may be another one at the end.
        let path = std::path::absolute(path).map_err(fail)?;
        Ok(Self { socket, kind: spec.socket, port: spec.port, path, file, paused: false })
    }

    /// Port of the guest.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// What its connections carry.
    pub fn kind(&self) -> SocketType {
        self.kind
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next connection; `None` when there is none now.
    ///
    /// # Errors
    /// The host's: no descriptor is left, in practice.
    pub fn accept(&self) -> io::Result<Option<Socket>> {
        loop {
            match accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => return Socket::of_type(socket, self.kind).map(Some),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Somebody may have put another socket in its place.
        if identity(&self.path).is_ok_and(|file| file == self.file)
            && let Err(e) = fs::remove_file(&self.path)
        {
            tracing::warn!("vsock: the socket {} stays: {e}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vsock::Direction;
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    fn spec(path: &Path) -> PortSpec {
        PortSpec {
            port: 1,
            path: path.to_owned(),
            direction: Direction::FromHost,
            socket: SocketType::Stream,
        }
    }

    #[test]
    fn a_stale_socket_gives_way_and_ours_goes_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let stale = check_path(&path).unwrap();
        assert!(stale.is_some());
        let listener = Listener::bind(&spec(&path)).unwrap();
        assert!(listener.accept().unwrap().is_none());
        let _client = UnixStream::connect(&path).unwrap();
        assert!(listener.accept().unwrap().is_some());
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn what_lives_or_is_no_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let _alive = UnixListener::bind(at("alive")).unwrap();
        let _datagrams = UnixDatagram::bind(at("datagrams")).unwrap();
        fs::write(at("file"), "x").unwrap();
        std::os::unix::fs::symlink(at("none"), at("link")).unwrap();
        for (name, text) in [
            ("alive", "a program listens there"),
            ("datagrams", "a program listens there"),
            ("file", "no socket"),
            ("link", "no socket"),
        ] {
            let error = Listener::bind(&spec(&at(name))).unwrap_err();
            assert!(matches!(error, VsockError::Occupied { .. }), "{error}");
            assert!(error.to_string().contains(text), "{error}");
            assert!(fs::symlink_metadata(at(name)).is_ok(), "{name} is still there");
        }
        let error = Listener::bind(&spec(&at("no/such"))).unwrap_err();
        assert!(error.to_string().contains("creating the socket"), "{error}");
    }

    #[test]
    fn sockets_of_messages_are_looked_at_as_those_of_streams() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let packets = PortSpec { socket: SocketType::SeqPacket, ..spec(&path) };
        drop(create(&path, SocketType::SeqPacket).unwrap());
        let listener = Listener::bind(&packets).unwrap();
        let error = Listener::bind(&spec(&path)).unwrap_err();
        assert!(error.to_string().contains("a program listens there"), "{error}");
        assert!(UnixStream::connect(&path).is_err());
        assert!(Socket::connect(&path, SocketType::SeqPacket).unwrap().is_some());
        assert!(listener.accept().unwrap().is_some());
    }

    #[test]
    fn another_socket_in_our_place_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::bind(&spec(&path)).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(listener);
        assert!(path.exists());
    }
}
