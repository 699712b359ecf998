//! A hostile driver of a socket device.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| krun_devices::vsock::fuzz_one(data));
