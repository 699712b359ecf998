//! Messages of a hostile console driver.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| krun_devices::console::fuzz_one(data));
