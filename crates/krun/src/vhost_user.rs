//! Devices whose other half is another process.

use krun_devices::console::Numbered;
use krun_devices::vhost_user::{VhostUser as Device, VhostUserHandle};
use krun_virtio::VirtioDevice;

pub use krun_devices::vhost_user::{DeviceKind, VhostUserError, VhostUserSpec as VhostUser};

use crate::{Error, VmConfig};

/// A device and what speaks to it.
pub(crate) type Made = (Box<dyn VirtioDevice>, VhostUserHandle);

/// Connects to all back ends, in order. Their terminals get their numbers after those of `consoles`, and in any order among
/// themselves: when the guest has numbered those of another process is not seen here.
pub(crate) fn devices(config: &mut VmConfig, consoles: Option<&Numbered>) -> Result<Vec<Made>, Error> {
    let device = |spec: VhostUser| -> Result<Made, Error> {
        let kind = spec.kind;
        let mut device = Device::new(spec)?;
        if let Some(before) = consoles.filter(|_| kind == DeviceKind::CONSOLE) {
            device.after(before.next().map_err(|source| Error::Host { what: "create a timer", source })?);
        }
        let handle = device.handle();
        Ok((Box::new(device), handle))
    };
    config.vhost_user.drain(..).map(device).collect()
}
