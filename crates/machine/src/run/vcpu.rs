//! A vCPU's thread.

use std::panic::{AssertUnwindSafe, catch_unwind};

use krun_devices::legacy::Request;
use krun_event::panic_message;
use krun_hv::{BootState, Exit, Kicker, Reply, SystemEvent, Vcpu, Vm};
use krun_memory::{Bytes, GuestAddress};
use std::sync::mpsc::{Receiver, Sender};

use super::{Inner, Outcome};
use crate::boot::layout::WARM_RESTART_FLAG;

/// What a kernel writes to [`WARM_RESTART_FLAG`] when it panicked and was started with
/// `reboot=panic_warm`.
const WARM: u16 = 0x1234;
/// Exits between two updates of the counters that others can see.
const COUNT_EVERY: u32 = 64;

/// The body of a vCPU's thread: creates the vCPU, tells so on `created`, waits for `go`, runs it.
pub fn body<V: Vm>(
    inner: &Inner<V>,
    id: u32,
    state: &BootState,
    created: &Sender<(u32, krun_hv::Result<Kicker>)>,
    go: &Receiver<()>,
) {
    let mut vcpu = match inner.vm.create_vcpu(id).and_then(|mut vcpu| {
        vcpu.set_boot_state(state)?;
        Ok(vcpu)
    }) {
        Ok(vcpu) => {
            let _ = created.send((id, Ok(vcpu.kicker())));
            vcpu
        }
        Err(e) => {
            let _ = created.send((id, Err(e)));
            return;
        }
    };
    // An error means that another vCPU failed and the machine is given up.
    if go.recv().is_err() {
        return;
    }
    if id == 0 {
        for (at, len) in &inner.prefault {
            vcpu.prefault(*at, *len);
        }
    }
    let outcome = catch_unwind(AssertUnwindSafe(|| run(inner, id, &mut vcpu)));
    inner.end.store_counts(id, vcpu.exits());
    match outcome {
        Ok(Some(outcome)) => inner.end.begin(outcome),
        Ok(None) => {}
        Err(panic) => {
            let message = panic_message(panic.as_ref());
            inner.end.begin(Outcome::Error(format!("the thread of vCPU {id} panicked: {message}")));
        }
    }
}

/// Runs the vCPU until it ends the machine (the outcome) or the machine has ended (none).
fn run<V: Vm>(inner: &Inner<V>, id: u32, vcpu: &mut V::Vcpu) -> Option<Outcome> {
    let mut reply = Reply::None;
    let (mut exits, mut answered, mut mended) = (0u32, 0u64, 0u64);
    loop {
        let exit = match vcpu.run(reply) {
            Ok(exit) => exit,
            // A file in a window has become shorter, say: the guest tries again.
            Err(krun_hv::Error::Memory { .. }) if inner.mend(&mut mended) => {
                reply = Reply::None;
                continue;
            }
            Err(e) => return Some(Outcome::Error(e.to_string())),
        };
        exits = exits.wrapping_add(1);
        if exits.is_multiple_of(COUNT_EVERY) {
            inner.end.store_counts(id, vcpu.exits());
        }
        reply = Reply::None;
        match exit {
            Exit::MmioWrite { at, size, data } => {
                if inner.bus.write(at, size, data) {
                    inner.off.look(&inner.end);
                }
            }
            Exit::MmioRead { at, size } => reply = Reply::Read(inner.bus.read(at, size)),
            Exit::IoIn { port, size } => reply = Reply::Read(inner.bus.port_in(port, size)),
            Exit::IoOut { port, size, data } => {
                if inner.bus.port_out(port, size, data) == Request::Reset {
                    return Some(reset(inner));
                }
            }
            Exit::Interrupted if inner.end.has_begun() => return None,
            Exit::Interrupted => inner.end.answer(&mut answered, || vcpu.is_off()),
            Exit::TripleFault => return Some(Outcome::TripleFault),
            Exit::SystemEvent(SystemEvent::Reset) => return Some(reset(inner)),
            // A vCPU that waits for interrupts nobody will deliver has nothing more to do.
            Exit::SystemEvent(SystemEvent::PowerOff) | Exit::Halted => return Some(Outcome::PowerOff),
            Exit::SystemEvent(SystemEvent::Crash) => return Some(Outcome::Panic),
            other => return Some(Outcome::Error(format!("vCPU {id}: cannot deal with {other:?}"))),
        }
    }
}

/// A restart, or the one that a kernel asks for when it has panicked.
fn reset<V: Vm>(inner: &Inner<V>) -> Outcome {
    match inner.memory.read_obj::<u16>(GuestAddress(WARM_RESTART_FLAG)) {
        Ok(WARM) => Outcome::Panic,
        _ => Outcome::Reset,
    }
}
