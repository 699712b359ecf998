//! Devices whose other half is another process.

use krun_devices::vhost_user::VhostUser as Device;
use krun_virtio::VirtioDevice;

pub use krun_devices::vhost_user::{DeviceKind, VhostUserError, VhostUserSpec as VhostUser};

use crate::{Error, VmConfig};

/// Connects to all back ends, in order.
pub(crate) fn devices(config: &mut VmConfig) -> Result<Vec<Box<dyn VirtioDevice>>, Error> {
    let device = |spec| -> Result<Box<dyn VirtioDevice>, Error> { Ok(Box::new(Device::new(spec)?)) };
    config.vhost_user.drain(..).map(device).collect()
}
