//! A hostile driver of the memory balloon.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| krun_devices::balloon::fuzz_one(data));
