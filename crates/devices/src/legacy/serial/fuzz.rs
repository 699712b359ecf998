//! Body of the fuzz target: a guest that reads and writes registers as the input says, and a host that types.
//! Panics when a promise is broken.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::{DATA, IER, IER_ROOM, INPUT, LSR, LSR_DATA, MCR, MCR_LOOP, Uart};

/// One input: pairs of an operation and its value.
pub fn fuzz_one(data: &[u8]) {
    let mut uart = Uart::default();
    for pair in data.chunks_exact(2) {
        let (register, value) = (u16::from(pair[0] & 7), pair[1]);
        match pair[0] >> 3 & 3 {
            0 => {
                let divisor = uart.lcr & super::LCR_DIVISOR != 0;
                let first = uart.input.front().copied();
                let left = uart.input.len();
                let read = uart.read(register);
                if register == DATA && !divisor {
                    assert_eq!(read, first.unwrap_or(0), "bytes come in their order");
                    assert_eq!(uart.input.len(), left.saturating_sub(1));
                }
                if register == LSR {
                    assert_eq!(read & LSR_DATA != 0, left > 0, "the guest is told of what waits");
                }
            }
            1 => {
                let sent = uart.write(register, value);
                assert!(sent.is_none_or(|b| b == value && register == DATA && uart.mcr & MCR_LOOP == 0));
            }
            2 if uart.input.len() < INPUT => uart.input.push_back(value),
            _ => {
                // What a driver does first makes it work, whatever was before.
                uart.write(MCR, 0x0b);
                uart.write(super::LCR, 3);
                uart.write(IER, IER_ROOM);
                assert!(uart.line(), "room is told as soon as it is asked for");
                assert_eq!(uart.write(DATA, value), Some(value));
            }
        }
        assert!(uart.input.len() <= INPUT, "what waits is bounded");
        assert!(!uart.line() || uart.mcr & MCR_LOOP == 0);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn promises_hold(data in prop::collection::vec(any::<u8>(), 0..2000)) {
            super::fuzz_one(&data);
        }
    }
}
