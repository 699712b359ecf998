//! Offsets of the registers (virtio 1.2, section 4.2.2).

/// "virt". Read only.
pub const MAGIC: u64 = 0x000;
/// 2. Read only.
pub const VERSION: u64 = 0x004;
/// What kind of device. Read only.
pub const DEVICE_ID: u64 = 0x008;
/// Who made it. Read only.
pub const VENDOR_ID: u64 = 0x00c;
/// 32 of the offered features. Read only.
pub const DEVICE_FEATURES: u64 = 0x010;
/// Which 32. Write only.
pub const DEVICE_FEATURES_SEL: u64 = 0x014;
/// 32 of the accepted features. Write only.
pub const DRIVER_FEATURES: u64 = 0x020;
/// Which 32. Write only.
pub const DRIVER_FEATURES_SEL: u64 = 0x024;
/// Which queue the following are about. Write only.
pub const QUEUE_SEL: u64 = 0x030;
/// Largest size; 0 when there is no such queue. Read only.
pub const QUEUE_NUM_MAX: u64 = 0x034;
/// Size. Write only.
pub const QUEUE_NUM: u64 = 0x038;
/// 1: in use.
pub const QUEUE_READY: u64 = 0x044;
/// The doorbell: takes the index of a queue. Write only.
pub const QUEUE_NOTIFY: u64 = 0x050;
/// Why there was an interrupt. Read only.
pub const INTERRUPT_STATUS: u64 = 0x060;
/// Clears bits of it. Write only.
pub const INTERRUPT_ACK: u64 = 0x064;
/// Device status; writing 0 resets.
pub const STATUS: u64 = 0x070;
/// Descriptor table, low half; the high half follows. Write only.
pub const QUEUE_DESC: u64 = 0x080;
/// Available ring, low half; the high half follows. Write only.
pub const QUEUE_AVAIL: u64 = 0x090;
/// Used ring, low half; the high half follows. Write only.
pub const QUEUE_USED: u64 = 0x0a0;
/// Which shared memory region. Write only.
pub const SHM_SEL: u64 = 0x0ac;
/// Its length, low half; the high half follows. All ones: no such region. Read only.
pub const SHM_LEN: u64 = 0x0b0;
/// Its address, low half; the high half follows. Read only.
pub const SHM_BASE: u64 = 0x0b8;
/// Changes with the configuration space. Read only.
pub const CONFIG_GENERATION: u64 = 0x0fc;
/// First byte of the configuration space.
pub const CONFIG: u64 = 0x100;
