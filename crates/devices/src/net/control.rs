//! The control queue (virtio 1.2, section 5.1.6.5): how many pairs of queues the driver uses.

use std::io::{Read, Write};

use krun_virtio::{Chain, Cx, DeviceError};

/// Class and command that set the number of pairs.
const MQ: [u8; 2] = [4, 0];
const OK: u8 = 0;
const ERR: u8 = 1;

/// The number of pairs that a command sets; `None` for any other command, and for one that makes no sense.
fn pairs(command: &[u8], max: u16) -> Option<u16> {
    let data = command.strip_prefix(&MQ)?;
    let wanted = u16::from_le_bytes(data.try_into().ok()?);
    (1..=max).contains(&wanted).then_some(wanted)
}

/// Answers what the driver asks on `queue`. `set` takes each number of pairs, which is one to `max`, and says whether it
/// holds from now on.
pub fn serve(
    queue: usize,
    max: u16,
    cx: &mut Cx<'_>,
    mut set: impl FnMut(u16, &mut Cx<'_>) -> Result<bool, DeviceError>,
) -> Result<(), DeviceError> {
    while let Some(chain) = cx.pop(queue)? {
        let done = match pairs(command(&chain, cx).as_slice(), max) {
            Some(wanted) => set(wanted, cx)?,
            None => false,
        };
        let mut writer = chain.writer(cx.memory());
        // A command without room for the answer gets none.
        let written = writer.write(&[if done { OK } else { ERR }]).unwrap_or(0);
        cx.complete(queue, chain, written as u32)?;
    }
    Ok(())
}

/// What the driver says, of which more than a command has is as good as one byte too many.
fn command(chain: &Chain, cx: &Cx<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Guest memory does not fail.
    let _ = Read::take(chain.reader(cx.memory()), 5).read_to_end(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_numbers_of_pairs_that_there_are() {
        assert_eq!([1, 4].map(|n| pairs(&[4, 0, n, 0], 4)), [Some(1), Some(4)]);
        for bad in [
            &[4, 0, 0, 0][..],
            &[4, 0, 5, 0],
            &[4, 0, 1, 1],
            &[4, 0, 1],
            &[4, 0],
            &[4, 0, 1, 0, 0],
            &[4, 1, 1, 0],
            &[0, 0, 1, 0],
            &[4],
            &[],
        ] {
            assert_eq!(pairs(bad, 4), None, "{bad:?}");
        }
    }
}
