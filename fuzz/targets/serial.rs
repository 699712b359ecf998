//! A guest at the serial port.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| krun_devices::legacy::fuzz_serial(data));
