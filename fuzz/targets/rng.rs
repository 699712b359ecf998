//! A hostile driver of the entropy device.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| krun_devices::rng::fuzz_one(data));
