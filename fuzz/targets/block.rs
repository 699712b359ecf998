//! Requests of a hostile disk driver.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| krun_devices::block::fuzz_one(data));
