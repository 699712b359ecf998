//! Bits of the device status (virtio 1.2, section 2.1).

/// The guest has seen the device.
pub const ACKNOWLEDGE: u32 = 1;
/// The guest has a driver for it.
pub const DRIVER: u32 = 2;
/// The driver is set up; the device may run.
pub const DRIVER_OK: u32 = 4;
/// Features are agreed.
pub const FEATURES_OK: u32 = 8;
/// The device cannot go on without a reset.
pub const NEEDS_RESET: u32 = 64;
/// The driver gave up.
pub const FAILED: u32 = 128;
