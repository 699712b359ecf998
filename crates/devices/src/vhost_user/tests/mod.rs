mod good;
mod hostile;
mod peer;

use std::time::Duration;

use krun_virtio::mmio::{reg, status};
use krun_virtio::mock::MmioDriver;

use super::kind::DeviceKind;
use super::spec::VhostUserSpec;
use peer::{Peer, until};

/// Long enough on a busy machine.
const WAIT: Duration = Duration::from_secs(20);

/// A console, for it has a configuration of 12 bytes, two queues that the peer serves, and two that it does not.
fn spec(peer: &Peer) -> VhostUserSpec {
    VhostUserSpec::new(DeviceKind::CONSOLE, peer.path())
}

fn needs_reset(driver: &MmioDriver) -> bool {
    driver.get(reg::STATUS) & status::NEEDS_RESET != 0
}

/// Sends `text` through a queue and takes what comes back.
fn echo(driver: &mut MmioDriver, queue: usize, text: &[u8]) -> Vec<u8> {
    assert!(driver.add(queue, &[text], &[text.len() as u32]));
    driver.kick(queue);
    driver.wait_used(queue, WAIT).expect("an answer").data
}

fn wait_for_reset_wish(driver: &MmioDriver) {
    until("the device wants a reset", || needs_reset(driver));
}
