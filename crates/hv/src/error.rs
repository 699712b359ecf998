//! What can go wrong, each with what was tried and what to do.

use std::fmt;
use std::io;

/// Failures of the hypervisor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device of the hypervisor cannot be opened.
    #[error("cannot open {path}: {source}")]
    Open {
        /// The device.
        path: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// The device speaks another language than ours.
    #[error("/dev/kvm speaks API version {found}, this program needs version 12")]
    ApiVersion {
        /// What it answered.
        found: i32,
    },
    /// The host kernel lacks something this program cannot do without.
    #[error("this host's KVM lacks {}; a newer kernel has it", missing.join(", "))]
    Missing {
        /// Names of the KVM capabilities.
        missing: Vec<&'static str>,
    },
    /// More vCPUs than the host can run, or none.
    #[error("{asked} vCPUs asked for, this host's KVM allows 1 to {max}")]
    Vcpus {
        /// What was asked for.
        asked: u32,
        /// The limit.
        max: u32,
    },
    /// A vCPU number outside the VM's configuration.
    #[error("vCPU {id} does not exist: the VM was made for {vcpus}")]
    VcpuId {
        /// What was asked for.
        id: u32,
        /// How many there are.
        vcpus: u32,
    },
    /// Guest memory that cannot be placed there.
    #[error("cannot place {size:#x} bytes of memory at guest address {at:#x}: {why}")]
    Placement {
        /// Guest physical address.
        at: u64,
        /// Bytes.
        size: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// An interrupt line that does not exist.
    #[error("no interrupt line {line}: the lines are 0 to {last}")]
    Line {
        /// What was asked for.
        line: u32,
        /// The highest line.
        last: u32,
    },
    /// The host kernel refused a request.
    #[error("{call} failed: {source} ({hint})")]
    Call {
        /// The request's name.
        call: &'static str,
        /// What it was for, or what to do.
        hint: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// Memory that is mapped for the guest could not be had. Once something is in its place, [`crate::Vcpu::run`] tries
    /// again; else the guest cannot go on.
    #[error("vCPU {vcpu} stopped: {stop}")]
    Memory {
        /// Which vCPU.
        vcpu: u32,
        /// Why and where.
        stop: Box<Stop>,
    },
    /// The guest cannot go on.
    #[error("vCPU {vcpu} stopped: {stop}")]
    Stopped {
        /// Which vCPU.
        vcpu: u32,
        /// Why and where.
        stop: Box<Stop>,
    },
}

/// A vCPU that cannot go on, with what is known about where it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop {
    /// Why, in words.
    pub reason: String,
    /// Registers at that point, one line per group; empty when they cannot be read.
    pub registers: String,
    /// Instruction bytes at that point, as far as known.
    pub instruction: Vec<u8>,
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)?;
        if !self.instruction.is_empty() {
            f.write_str("; instruction bytes")?;
            for byte in &self.instruction {
                write!(f, " {byte:02x}")?;
            }
        }
        if !self.registers.is_empty() {
            write!(f, "; {}", self.registers)?;
        }
        Ok(())
    }
}

impl Error {
    pub(crate) fn call(call: &'static str, hint: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Call { call, hint, source: source.into() }
    }
}
