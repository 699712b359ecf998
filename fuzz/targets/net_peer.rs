//! A hostile peer of a network device on a stream socket.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| krun_devices::net::fuzz_peer(data));
