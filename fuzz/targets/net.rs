//! A hostile driver of a network device.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| krun_devices::net::fuzz_guest(data));
