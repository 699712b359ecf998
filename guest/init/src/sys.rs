//! The few system calls and entry points that need unsafe code.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::process::Pid;

/// The program's entry. It takes the place of the standard library's own, whose preparations (signal
/// handlers, an alternative stack, a look at the standard streams) cost a tenth of init's run.
#[cfg(not(test))]
#[unsafe(no_mangle)]
extern "C" fn main(argc: c_int, argv: *const *const c_char, envp: *const *const c_char) -> c_int {
    // SAFETY: the C runtime passes `argc` arguments and two NULL-terminated arrays of C strings that
    // live as long as the process.
    let (mut args, env) = unsafe { (strings(argv), strings(envp)) };
    args.truncate(usize::try_from(argc).unwrap_or(0));
    crate::run(&args, &env)
}

/// Copies a NULL-terminated array of C strings.
///
/// # Safety
/// `list` is NULL or points to such an array.
#[cfg(not(test))]
unsafe fn strings(mut list: *const *const c_char) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    // SAFETY: by contract every element up to the NULL can be read and is a C string.
    unsafe {
        while !list.is_null() && !(*list).is_null() {
            all.push(CStr::from_ptr(*list).to_bytes().to_vec());
            list = list.add(1);
        }
    }
    all
}

/// `0` or an error number, as the C library returns it.
fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Passes `status` to the host through a file of the root share.
pub fn report_status(file: BorrowedFd<'_>, status: i32) -> io::Result<()> {
    let arg = libc::c_ulong::from(status.cast_unsigned());
    // SAFETY: the request encodes no size, so neither kernel nor file system follows the argument.
    check(unsafe { libc::ioctl(file.as_raw_fd(), krun_wire::EXIT_CODE_IOCTL as _, arg) }).map(drop)
}

/// Sets a network interface's flags to UP, with any socket.
pub fn interface_up(socket: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte less than the field, so that a NUL remains at its end.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.to_bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request reads one `ifreq`, which lives across the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) }).map(drop)
}

/// The link-layer address of everybody, or what [`packet_socket`] binds to, on an interface.
fn packet_address(index: u32) -> libc::sockaddr_ll {
    // SAFETY: all-zero bytes are a valid `sockaddr_ll`.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as libc::c_ushort;
    address.sll_protocol = (libc::ETH_P_IP as u16).to_be();
    address.sll_ifindex = index.cast_signed();
    address.sll_halen = 6;
    address.sll_addr[..6].fill(0xff);
    address
}

/// Bytes of a `sockaddr_ll`.
const PACKET_ADDRESS: libc::socklen_t = size_of::<libc::sockaddr_ll>() as libc::socklen_t;

/// A socket for IPv4 packets on an interface, without blocking.
pub fn packet_socket(index: u32) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // No protocol before it is bound: nothing of other interfaces arrives.
    // SAFETY: no memory is involved.
    let fd = check(unsafe { libc::socket(libc::AF_PACKET, kind, 0) })?;
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let address = packet_address(index);
    // SAFETY: the address lives across the call, and its length is right.
    check(unsafe { libc::bind(fd, (&raw const address).cast(), PACKET_ADDRESS) })?;
    Ok(socket)
}

/// Lets a socket send and receive on one interface only.
pub fn bind_to_device(socket: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    let len = libc::socklen_t::try_from(name.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let (fd, name) = (socket.as_raw_fd(), name.as_ptr().cast());
    // SAFETY: the name lives across the call, and its length is right.
    check(unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, name, len) }).map(drop)
}

/// Sends an IPv4 packet to everybody on an interface's link.
pub fn broadcast(socket: BorrowedFd<'_>, index: u32, packet: &[u8]) -> io::Result<()> {
    let address = packet_address(index);
    let (data, len, fd) = (packet.as_ptr().cast(), packet.len(), socket.as_raw_fd());
    // SAFETY: packet and address live across the call, and their lengths are right.
    let sent = unsafe { libc::sendto(fd, data, len, 0, (&raw const address).cast(), PACKET_ADDRESS) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Blocks SIGCHLD and gives a descriptor from which its arrivals can be read, without blocking.
pub fn child_signals() -> io::Result<OwnedFd> {
    // SAFETY: all-zero bytes are a valid `sigset_t`, and the calls write to that set only.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: as above; the set lives across the calls.
    unsafe {
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        check(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()))?;
    }
    // SAFETY: the set lives across the call.
    let fd = check(unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) })?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets all signals through again, in a process about to become another program.
pub fn unblock_signals() {
    // SAFETY: all-zero bytes are a valid `sigset_t`; both calls get a set that lives across them.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
}

/// Sends a signal to every process but this one.
pub fn signal_everyone(signal: i32) {
    // SAFETY: no memory is involved. Only PID 1 calls this (see `supervise`).
    unsafe { libc::kill(-1, signal) };
}

/// Sends a signal to a process, or to the process group it leads. Any number is passed on.
pub fn signal(pid: Pid, group: bool, signal: i32) {
    let pid = pid.as_raw_nonzero().get();
    // SAFETY: no memory is involved.
    unsafe { libc::kill(if group { -pid } else { pid }, signal) };
}

/// `setrlimit` with any resource number.
pub fn set_limit(limit: &krun_wire::Rlimit) -> io::Result<()> {
    // The kernel's structure is two 64-bit numbers on every architecture, infinity being all ones.
    let values = [limit.soft, limit.hard];
    // SAFETY: the kernel reads two 64-bit numbers, which live across the call.
    let result = unsafe {
        libc::syscall(libc::SYS_prlimit64, 0, libc::c_ulong::from(limit.resource), values.as_ptr(), 0usize)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A NULL-terminated array of pointers to C strings, for `execve`.
pub struct PointerList<'a> {
    pointers: Vec<*const c_char>,
    strings: std::marker::PhantomData<&'a CStr>,
}

impl<'a> PointerList<'a> {
    /// Points to each of `strings`.
    pub fn new<S: AsRef<CStr>>(strings: &'a [S]) -> Self {
        let pointers = strings.iter().map(|s| s.as_ref().as_ptr());
        Self { pointers: pointers.chain([std::ptr::null()]).collect(), strings: std::marker::PhantomData }
    }
}

/// Becomes another program; returns only when that fails.
pub fn execute(program: &CStr, args: &PointerList<'_>, env: &PointerList<'_>) -> io::Error {
    // SAFETY: all three point to C strings that outlive the call, the lists end with NULL.
    unsafe { libc::execve(program.as_ptr(), args.pointers.as_ptr(), env.pointers.as_ptr()) };
    io::Error::last_os_error()
}

/// Bytes of stack for the child of [`run_until_exec`].
const STACK: usize = 64 * 1024;

/// Starts a process that runs `child` in this process's memory, while this process is suspended until
/// the child becomes another program or ends. `child` ends the process with 127 if it returns.
///
/// Compared with `fork` no page tables are copied and no page has to be copied on the first write, and
/// what `child` stores is seen here afterwards.
pub fn run_until_exec(child: &mut dyn FnMut()) -> io::Result<Pid> {
    extern "C" fn start(arg: *mut c_void) -> c_int {
        let child = arg.cast::<&mut dyn FnMut()>();
        // SAFETY: `arg` is the pointer passed to `clone` below, to a value that the suspended parent
        // keeps alive and does not touch.
        unsafe { (*child)() };
        127
    }
    let mut child = child;
    let mut stack = Vec::<u8>::with_capacity(STACK);
    // SAFETY: one past the end of the allocation is a valid pointer to make; aligned down to 16 it
    // stays inside or at the end of it.
    let top = unsafe { stack.as_mut_ptr().add(STACK) };
    let top = top.wrapping_sub(top.addr() % 16);
    let arg = (&raw mut child).cast::<c_void>();
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: this process has one thread, which CLONE_VFORK suspends while the child uses the shared
    // memory, so the child has exclusive use of it, on a stack of its own. `start` does not unwind:
    // the program is built with panic=abort.
    let pid = check(unsafe { libc::clone(start, top.cast(), flags, arg) })?;
    drop(stack);
    Pid::from_raw(pid).ok_or_else(|| io::Error::from(io::ErrorKind::Other))
}

/// The raw number as a descriptor that somebody else owns.
///
/// Only for the standard streams, which are open for the whole life of the process.
pub fn standard_stream(number: RawFd) -> BorrowedFd<'static> {
    debug_assert!((0..3).contains(&number));
    // SAFETY: `run` makes sure at its start that descriptors 0 to 2 are open, and nothing closes them.
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// Makes sure that descriptors 0 to 2 are taken, so that no file opened later becomes one of them.
pub fn reserve_standard_streams() {
    // SAFETY: no memory is involved but the path, a C string that lives across the call. Descriptors
    // made here are left open on purpose.
    unsafe {
        if libc::fcntl(2, libc::F_GETFD) >= 0 {
            return;
        }
        loop {
            let fd = libc::open(c"/".as_ptr(), libc::O_PATH);
            if fd < 0 {
                return;
            }
            if fd > 2 {
                libc::close(fd);
                return;
            }
        }
    }
}

/// Makes `to` (0 to 2) another number of `from`, in a process about to become another program.
pub fn assign_stream(from: RawFd, to: RawFd) -> io::Result<()> {
    // SAFETY: no memory is involved; the child owns its descriptor table.
    check(unsafe { libc::dup2(from, to) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_shares_memory_and_ends() {
        let mut seen = 0;
        let pid = run_until_exec(&mut || seen = 7).unwrap();
        assert_eq!(seen, 7);
        let (_, status) =
            rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()).unwrap().unwrap();
        assert_eq!(status.exit_status(), Some(127));
    }

    #[test]
    fn a_limit_is_set_by_number() {
        let now = rustix::process::getrlimit(rustix::process::Resource::Core);
        let same = krun_wire::Rlimit {
            resource: 4,
            soft: now.current.unwrap_or(u64::MAX),
            hard: now.maximum.unwrap_or(u64::MAX),
        };
        set_limit(&same).unwrap();
        assert!(set_limit(&krun_wire::Rlimit { resource: 99, soft: 0, hard: 0 }).is_err());
    }
}
