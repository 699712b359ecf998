//! A hostile back end of a vhost-user device.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| krun_devices::vhost_user::fuzz_back_end(data));
