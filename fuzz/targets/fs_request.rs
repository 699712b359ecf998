//! Requests of a hostile file system driver.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| krun_devices::fs::fuzz_one(data));
