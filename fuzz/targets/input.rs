//! A hostile driver of an input device.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| krun_devices::input::fuzz_one(data));
