//! A 16550A serial port (National Semiconductor PC16550D data sheet), as much of it as drivers use.

#[cfg(any(test, feature = "mock"))]
mod fuzz;

#[cfg(any(test, feature = "mock"))]
#[doc(hidden)]
pub use fuzz::fuzz_one;

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use krun_event::{Failure, Interest, Poll, Wake, Worker};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Register offsets.
const DATA: u16 = 0;
const IER: u16 = 1;
const IIR_FCR: u16 = 2;
const LCR: u16 = 3;
const MCR: u16 = 4;
const LSR: u16 = 5;
const MSR: u16 = 6;
const SCR: u16 = 7;

const IER_DATA: u8 = 1;
const IER_ROOM: u8 = 2;
const IIR_NONE: u8 = 1;
const IIR_ROOM: u8 = 2;
const IIR_DATA: u8 = 4;
const IIR_FIFO: u8 = 0xc0;
const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_INPUT: u8 = 2;
const LCR_DIVISOR: u8 = 0x80;
const MCR_OUT2: u8 = 8;
const MCR_LOOP: u8 = 0x10;
const LSR_DATA: u8 = 1;
/// Transmitter and its holding register are empty, always: a byte is gone as soon as it is written.
const LSR_ROOM: u8 = 0x60;
/// Carrier, data set ready, clear to send.
const MSR_READY: u8 = 0xb0;

/// Input bytes kept for the guest.
const INPUT: usize = 256;
/// How often a blocked output looks whether the machine has ended.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// The registers. Pure: bytes and interrupts are what its methods return.
#[derive(Debug, Default)]
struct Uart {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    divisor: [u8; 2],
    /// The interrupt for room was not yet seen.
    room: bool,
    input: VecDeque<u8>,
}

impl Uart {
    fn cause(&self) -> u8 {
        if self.ier & IER_DATA != 0 && !self.input.is_empty() {
            IIR_DATA
        } else if self.ier & IER_ROOM != 0 && self.room {
            IIR_ROOM
        } else {
            IIR_NONE
        }
    }

    /// Whether the interrupt line is high.
    fn line(&self) -> bool {
        // OUT2 gates the line on PC hardware, and drivers rely on it.
        self.mcr & MCR_OUT2 != 0 && self.mcr & MCR_LOOP == 0 && self.cause() != IIR_NONE
    }

    fn read(&mut self, register: u16) -> u8 {
        let divisor = self.lcr & LCR_DIVISOR != 0;
        match register {
            DATA if divisor => self.divisor[0],
            DATA => self.input.pop_front().unwrap_or(0),
            IER if divisor => self.divisor[1],
            IER => self.ier,
            IIR_FCR => {
                let cause = self.cause();
                if cause == IIR_ROOM {
                    self.room = false;
                }
                cause | if self.fcr & FCR_ENABLE != 0 { IIR_FIFO } else { 0 }
            }
            LCR => self.lcr,
            MCR => self.mcr,
            LSR => LSR_ROOM | if self.input.is_empty() { 0 } else { LSR_DATA },
            MSR if self.mcr & MCR_LOOP != 0 => {
                // RTS, DTR, OUT1 and OUT2 come back as CTS, DSR, RI and DCD.
                let m = self.mcr;
                (m & 2) << 3 | (m & 1) << 5 | (m & 4) << 4 | (m & 8) << 4
            }
            MSR => MSR_READY,
            _ => self.scr,
        }
    }

    /// Returns a byte that leaves.
    fn write(&mut self, register: u16, value: u8) -> Option<u8> {
        let divisor = self.lcr & LCR_DIVISOR != 0;
        match register {
            DATA if divisor => self.divisor[0] = value,
            DATA => {
                self.room = true;
                if self.mcr & MCR_LOOP == 0 {
                    return Some(value);
                }
                if self.input.len() < INPUT {
                    self.input.push_back(value);
                }
            }
            IER if divisor => self.divisor[1] = value,
            IER => {
                // Enabling it again raises it again; drivers start a transmission that way.
                self.room |= value & IER_ROOM != 0;
                self.ier = value & 0x0f;
            }
            IIR_FCR => {
                if value & FCR_CLEAR_INPUT != 0 {
                    self.input.clear();
                }
                self.fcr = value;
            }
            LCR => self.lcr = value,
            MCR => self.mcr = value & 0x1f,
            SCR => self.scr = value,
            _ => {}
        }
        None
    }
}

/// A serial port that cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SerialError {
    /// The host refused a thread or a descriptor.
    #[error("cannot start the serial port: {0}")]
    Host(#[from] io::Error),
}

struct Shared {
    uart: Mutex<Uart>,
    raise: Box<dyn Fn() + Send + Sync>,
    /// Set when the guest has made room for input.
    room: Wake,
    closed: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Uart> {
        // Every state of the registers is a valid one.
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the registers and raises an interrupt on the line's rising edge.
    fn with<T>(&self, change: impl FnOnce(&mut Uart) -> T) -> T {
        let (value, edge) = {
            let mut uart = self.lock();
            let before = uart.line();
            let value = change(&mut uart);
            (value, uart.line() && !before)
        };
        if edge {
            (self.raise)();
        }
        value
    }
}

/// A serial port with its two ends on this side.
pub struct Serial {
    shared: Arc<Shared>,
    output: Mutex<Option<File>>,
    worker: Mutex<Option<Worker<()>>>,
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Serial")
    }
}

impl Serial {
    /// A port whose input comes from `input` and whose output goes to `output`. `raise` pulses its
    /// interrupt line; `fail` is told of a panic on its input thread.
    ///
    /// # Errors
    /// No thread or descriptor is left.
    pub fn new(
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
        raise: impl Fn() + Send + Sync + 'static,
        fail: impl Fn(String) + Send + Sync + 'static,
    ) -> Result<Self, SerialError> {
        let shared = Arc::new(Shared {
            uart: Mutex::default(),
            raise: Box::new(raise),
            room: Wake::new()?,
            closed: AtomicBool::new(false),
        });
        let worker = match input {
            None => None,
            Some(fd) => {
                let shared = Arc::clone(&shared);
                let on_panic = move |failure: Failure| fail(failure.to_string());
                Some(Worker::spawn("serial", on_panic, move |stop| {
                    if let Err(e) = feed(File::from(fd), &shared, stop) {
                        tracing::warn!("serial input ends: {e}");
                    }
                })?)
            }
        };
        Ok(Self { shared, output: Mutex::new(output.map(File::from)), worker: Mutex::new(worker) })
    }

    /// The guest reads a register.
    pub fn read(&self, register: u16) -> u8 {
        self.access(|uart| uart.read(register))
    }

    /// Changes the registers and wakes the input thread when half of its room is free again: not at each
    /// byte.
    fn access<T>(&self, change: impl FnOnce(&mut Uart) -> T) -> T {
        let (value, room) = self.shared.with(|uart| {
            let before = uart.input.len();
            let value = change(uart);
            (value, before > INPUT / 2 && uart.input.len() <= INPUT / 2)
        });
        if room {
            self.shared.room.wake();
        }
        value
    }

    /// The guest writes a register. Waits while the other side of the output takes nothing.
    pub fn write(&self, register: u16, value: u8) {
        if let Some(byte) = self.access(|uart| uart.write(register, value)) {
            let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
            let result = match output.as_mut() {
                Some(file) => send(file, byte, &self.shared.closed),
                None => return,
            };
            if let Err(e) = result {
                tracing::warn!("serial output ends: {e}");
                *output = None;
            }
        }
    }

    /// Ends waits and the input thread. Writes do nothing from now on.
    pub fn close(&self) {
        (self.canceller())();
        *self.output.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.worker.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Makes a write that waits for the other side give up. Does not wait itself; may be called after the
    /// port is gone.
    pub fn canceller(&self) -> impl Fn() + Send + Sync + use<> {
        let shared = Arc::downgrade(&self.shared);
        move || {
            if let Some(shared) = shared.upgrade() {
                shared.closed.store(true, Ordering::Release);
            }
        }
    }
}

/// Writes a byte once that would not block, so that an end of the machine is noticed meanwhile.
fn send(file: &mut File, byte: u8, closed: &AtomicBool) -> io::Result<()> {
    while !closed.load(Ordering::Acquire) {
        let mut set = [PollFd::new(file, PollFlags::OUT)];
        match poll(&mut set, Some(&PATIENCE)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(e) => return Err(e.into()),
        }
        match file.write(&[byte]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(_) => return Ok(()),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The input thread's body: moves bytes from `file` to the guest until `stop` or the end of the file.
fn feed(mut file: File, shared: &Shared, stop: &Wake) -> io::Result<()> {
    const STOP: u64 = 0;
    const ROOM: u64 = 1;
    const FILE: u64 = 2;
    let mut poll = Poll::new()?;
    poll.add(stop, STOP, Interest::Read)?;
    poll.add(&shared.room, ROOM, Interest::Read)?;
    // A regular file cannot be watched and never blocks.
    let watched = poll.add(&file.as_fd(), FILE, Interest::Read).is_ok();
    let (mut listening, mut ready) = (watched, Vec::new());
    let mut chunk = [0u8; INPUT];
    loop {
        let free = INPUT - shared.lock().input.len();
        if watched && listening != (free > 0) {
            listening = free > 0;
            if listening {
                poll.add(&file.as_fd(), FILE, Interest::Read)?
            } else {
                poll.remove(&file.as_fd())?
            }
        }
        let mut readable = !watched && free > 0;
        ready.clear();
        poll.wait(&mut ready, readable.then_some(std::time::Duration::ZERO))?;
        for r in &ready {
            match r.token {
                STOP => return Ok(()),
                ROOM => {
                    shared.room.take();
                }
                _ => readable = true,
            }
        }
        if !readable || free == 0 {
            continue;
        }
        match file.read(&mut chunk[..free]) {
            Ok(0) => return Ok(()),
            Ok(n) => shared.with(|uart| uart.input.extend(&chunk[..n])),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::time::{Duration, Instant};

    fn serial(input: Option<OwnedFd>, output: Option<OwnedFd>) -> (Serial, Arc<AtomicUsize>) {
        let raised = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&raised);
        let raise = move || {
            count.fetch_add(1, Ordering::SeqCst);
        };
        (Serial::new(input, output, raise, |e| panic!("{e}")).unwrap(), raised)
    }

    fn until(what: impl Fn() -> bool) {
        let start = Instant::now();
        while !what() {
            assert!(start.elapsed() < Duration::from_secs(10));
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn output_arrives_and_raises_the_room_interrupt() {
        let (mut reader, writer) = io::pipe().unwrap();
        let (s, raised) = serial(None, Some(writer.into()));
        s.write(MCR, MCR_OUT2);
        s.write(IER, IER_ROOM);
        assert_eq!(raised.load(Ordering::SeqCst), 1);
        assert_eq!((s.read(IIR_FCR), s.read(IIR_FCR)), (IIR_ROOM, IIR_NONE));
        for b in b"hello" {
            s.write(DATA, *b);
        }
        // One edge for five bytes: nobody has looked since.
        assert_eq!(raised.load(Ordering::SeqCst), 2);
        let mut got = [0; 5];
        reader.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");
    }

    #[test]
    fn input_longer_than_the_buffer_arrives_in_order() {
        let (reader, mut writer) = io::pipe().unwrap();
        let (s, raised) = serial(Some(reader.into()), None);
        s.write(MCR, MCR_OUT2);
        s.write(IER, IER_DATA);
        let sent: Vec<u8> = (0..5000u32).map(|n| n as u8).collect();
        writer.write_all(&sent).unwrap();
        let mut got = Vec::new();
        until(|| raised.load(Ordering::SeqCst) > 0);
        assert_eq!(s.read(IIR_FCR), IIR_DATA);
        let start = Instant::now();
        while got.len() < sent.len() {
            if s.read(LSR) & LSR_DATA != 0 {
                got.push(s.read(DATA));
            }
            assert!(start.elapsed() < Duration::from_secs(10));
        }
        assert_eq!(got, sent);
        s.close();
    }

    #[test]
    fn a_blocked_output_ends_with_the_port() {
        let (_reader, writer) = io::pipe().unwrap();
        let (s, _) = serial(None, Some(writer.into()));
        let s = Arc::new(s);
        let inner = Arc::clone(&s);
        let thread = std::thread::spawn(move || (0..1 << 20).for_each(|_| inner.write(DATA, b'x')));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!thread.is_finished());
        s.close();
        thread.join().unwrap();
    }

    #[test]
    fn a_reader_that_goes_away_ends_the_output_only() {
        let (reader, writer) = io::pipe().unwrap();
        let (s, _) = serial(None, Some(writer.into()));
        drop(reader);
        s.write(DATA, b'x');
        s.write(DATA, b'y');
        assert!(s.output.lock().unwrap().is_none());
        assert_eq!(s.read(LSR), LSR_ROOM);
    }

    #[test]
    fn a_regular_file_is_input_too() {
        let dir = std::env::current_exe().unwrap();
        let (s, _) = serial(Some(File::open(dir).unwrap().into()), None);
        until(|| s.read(LSR) & LSR_DATA != 0);
        assert_eq!(s.read(DATA), 0x7f);
    }

    #[test]
    fn loop_back_and_scratch_let_drivers_find_it() {
        let (s, raised) = serial(None, None);
        s.write(SCR, 0xa5);
        assert_eq!(s.read(SCR), 0xa5);
        s.write(MCR, MCR_LOOP | 0x0a);
        assert_eq!(s.read(MSR) & 0xf0, 0x90);
        s.write(DATA, 0x42);
        assert_eq!((s.read(LSR) & LSR_DATA, s.read(DATA)), (LSR_DATA, 0x42));
        s.write(IIR_FCR, FCR_ENABLE);
        assert_eq!(s.read(IIR_FCR) & IIR_FIFO, IIR_FIFO);
        s.write(LCR, LCR_DIVISOR);
        s.write(DATA, 1);
        s.write(IER, 2);
        assert_eq!((s.read(DATA), s.read(IER)), (1, 2));
        s.write(LCR, 0);
        assert_eq!(s.read(IER), 0);
        assert_eq!(raised.load(Ordering::SeqCst), 0);
    }
}
