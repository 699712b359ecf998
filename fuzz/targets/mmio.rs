//! A hostile guest's accesses to the registers of a device.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| krun_virtio::fuzz::mmio(data));
