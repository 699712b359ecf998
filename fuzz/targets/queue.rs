//! Rings and descriptors that a hostile driver wrote, with a device at work on them.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| krun_virtio::fuzz::queue(data));
