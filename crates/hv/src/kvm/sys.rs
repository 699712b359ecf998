//! The few KVM requests that `kvm-ioctls` does not offer in the form needed here, and the shared
//! page through which a vCPU talks to the host kernel.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::{NonNull, addr_of};
use std::sync::atomic::AtomicU8;

use kvm_bindings::{self as kvm, kvm_ioeventfd, kvm_irqfd, kvm_pre_fault_memory, kvm_run};

const KVMIO: u64 = 0xae;

/// Request number of a call that hands `size` bytes to the kernel (`_IOW` of the kernel's headers).
const fn iow(nr: u64, size: usize) -> u64 {
    (1 << 30) | ((size as u64) << 16) | (KVMIO << 8) | nr
}

const KVM_RUN: u64 = (KVMIO << 8) | 0x80;
const KVM_GET_TSC_KHZ: u64 = (KVMIO << 8) | 0xa3;
const KVM_IRQFD: u64 = iow(0x76, size_of::<kvm_irqfd>());
const KVM_IOEVENTFD: u64 = iow(0x79, size_of::<kvm_ioeventfd>());
const KVM_PRE_FAULT_MEMORY: u64 = (3 << 30) | iow(0xd5, size_of::<kvm_pre_fault_memory>());
const KVM_SET_SIGNAL_MASK: u64 = iow(0x8b, size_of::<u32>());

fn check(ret: libc::c_int) -> io::Result<()> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// KVM_RUN: runs guest code until the next exit.
pub(super) fn run(vcpu: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: takes no argument; the descriptor is a vCPU's, so the kernel writes to its shared
    // page only, and to guest memory, which is never borrowed as a slice.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_RUN as _, 0) })
}

/// KVM_IRQFD: the kernel raises interrupt `gsi` whenever `event` is set.
pub(super) fn irqfd(vm: &impl AsRawFd, event: RawFd, gsi: u32) -> io::Result<()> {
    let arg = kvm_irqfd { fd: event as u32, gsi, ..Default::default() };
    // SAFETY: `arg` is the structure this request reads and outlives the call.
    check(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_IRQFD as _, addr_of!(arg)) })
}

/// KVM_IOEVENTFD: the kernel sets an eventfd on a guest's write, or stops doing so.
pub(super) fn ioeventfd(vm: &impl AsRawFd, arg: &kvm_ioeventfd) -> io::Result<()> {
    // SAFETY: `arg` is the structure this request reads and outlives the call.
    check(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_IOEVENTFD as _, std::ptr::from_ref(arg)) })
}

/// KVM_GET_TSC_KHZ on a VM: the frequency its vCPUs will have.
pub(super) fn tsc_khz(vm: &impl AsRawFd) -> io::Result<u32> {
    // SAFETY: takes no argument and writes nothing.
    let khz = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_GET_TSC_KHZ as _, 0) };
    check(khz)?;
    Ok(khz.unsigned_abs())
}

/// KVM_PRE_FAULT_MEMORY (Linux 6.11): maps guest memory for the guest before it is touched.
pub(super) fn pre_fault(vcpu: &impl AsRawFd, gpa: u64, size: u64) -> io::Result<()> {
    let mut arg = kvm_pre_fault_memory { gpa, size, ..Default::default() };
    while arg.size > 0 {
        // SAFETY: `arg` is the structure this request reads and advances; it outlives the call.
        let ret = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_PRE_FAULT_MEMORY as _, &raw mut arg) };
        match check(ret) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => other?,
        }
    }
    Ok(())
}

/// KVM_SET_SIGNAL_MASK: the thread's signal mask while it runs guest code, bit n-1 for signal n.
pub(super) fn set_signal_mask(vcpu: &impl AsRawFd, mask: u64) -> io::Result<()> {
    #[repr(C, packed)]
    struct Arg {
        len: u32,
        mask: u64,
    }
    let arg = Arg { len: size_of::<u64>() as u32, mask };
    // SAFETY: the kernel reads the length and that many bytes after it, all inside `arg`.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK as _, addr_of!(arg)) })
}

pub(super) type FailEntry = kvm::kvm_run__bindgen_ty_1__bindgen_ty_2;
pub(super) type PortAccess = kvm::kvm_run__bindgen_ty_1__bindgen_ty_4;
pub(super) type MmioAccess = kvm::kvm_run__bindgen_ty_1__bindgen_ty_6;
pub(super) type InternalError = kvm::kvm_run__bindgen_ty_1__bindgen_ty_13;
pub(super) type MemoryFault = kvm::kvm_run__bindgen_ty_1__bindgen_ty_27;

/// The description of an event for the whole machine, without its data.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct EventKind {
    pub(super) kind: u32,
    count: u32,
}

/// The description of an instruction that KVM could not emulate.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct EmulationFailure {
    suberror: u32,
    pub(super) count: u32,
    pub(super) flags: u64,
    pub(super) insn_size: u8,
    pub(super) insn_bytes: [u8; 15],
}

/// A field of the union in `struct kvm_run`, valid for any bytes.
///
/// # Safety
/// The type is no larger and no more aligned than that union and has no invalid values.
pub(super) unsafe trait Detail: Copy {}
// SAFETY: fields of the union, integers only.
unsafe impl Detail for FailEntry {}
// SAFETY: as above.
unsafe impl Detail for PortAccess {}
// SAFETY: as above.
unsafe impl Detail for MmioAccess {}
// SAFETY: as above.
unsafe impl Detail for InternalError {}
// SAFETY: as above.
unsafe impl Detail for MemoryFault {}
// SAFETY: 8 bytes of integers, the head of the union's `system_event`.
unsafe impl Detail for EventKind {}
// SAFETY: 32 bytes of integers, the same as the union's `emulation_failure`.
unsafe impl Detail for EmulationFailure {}

/// A mapping of a vCPU's `struct kvm_run` and the data behind it. The kernel writes to it during
/// KVM_RUN only; other threads touch nothing but `immediate_exit`.
#[derive(Debug)]
pub(super) struct RunPage {
    at: NonNull<kvm_run>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread. All access but the atomic `immediate_exit` is through
// `&RunPage` methods that copy in and out, which only the vCPU's own thread calls.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps `len` bytes (KVM_GET_VCPU_MMAP_SIZE) of `vcpu`.
    pub(super) fn map(vcpu: &impl AsRawFd, len: usize) -> io::Result<Self> {
        if len < size_of::<kvm_run>() {
            return Err(io::Error::other("the vCPU's shared area is smaller than struct kvm_run"));
        }
        // SAFETY: a fresh shared mapping at an address the kernel chooses.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let at = NonNull::new(at.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { at, len })
    }

    /// Not zero: KVM_RUN finishes what is pending and returns at once.
    pub(super) fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: inside the mapping, which lives as long as `self`; both this process and the
        // kernel access the byte as a whole.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.at.as_ptr()).immediate_exit) }
    }

    /// KVM_EXIT_*.
    pub(super) fn exit_reason(&self) -> u32 {
        // SAFETY: inside the mapping; volatile because the kernel writes it.
        unsafe { (&raw const (*self.at.as_ptr()).exit_reason).read_volatile() }
    }

    /// A copy of the part that describes the exit; which type counts, [`Self::exit_reason`] says.
    pub(super) fn detail<T: Detail>(&self) -> T {
        // SAFETY: a `Detail` is a field of the union that starts here, so the bytes are inside the
        // mapping and aligned, and any bytes are a valid value. The kernel writes them in KVM_RUN
        // only, on this thread.
        unsafe { (&raw const (*self.at.as_ptr()).__bindgen_anon_1).cast::<T>().read_volatile() }
    }

    /// Writes the answer to an MMIO read.
    pub(super) fn set_mmio_data(&self, data: [u8; 8]) {
        // SAFETY: inside the mapping; the kernel reads it in the next KVM_RUN, on this thread.
        unsafe { (&raw mut (*self.at.as_ptr()).__bindgen_anon_1.mmio.data).write_volatile(data) }
    }

    fn bytes(&self, offset: u64, len: usize) -> Option<NonNull<u8>> {
        let offset = usize::try_from(offset).ok()?;
        (offset.checked_add(len)? <= self.len).then_some(())?;
        // SAFETY: just checked to lie inside the mapping.
        Some(unsafe { self.at.cast::<u8>().add(offset) })
    }

    /// Copies bytes at `offset` of the mapping; zeros where it would leave it.
    pub(super) fn read_data<const N: usize>(&self, offset: u64, len: usize) -> [u8; N] {
        let mut out = [0u8; N];
        let len = len.min(N);
        if let Some(from) = self.bytes(offset, len) {
            for (i, byte) in out[..len].iter_mut().enumerate() {
                // SAFETY: `bytes` checked `len` bytes from here; i < len.
                *byte = unsafe { from.add(i).read_volatile() };
            }
        }
        out
    }

    /// Writes `data` at `offset` of the mapping, if it fits there.
    pub(super) fn write_data(&self, offset: u64, data: &[u8]) {
        if let Some(to) = self.bytes(offset, data.len()) {
            for (i, byte) in data.iter().enumerate() {
                // SAFETY: `bytes` checked `data.len()` bytes from here; i is below that.
                unsafe { to.add(i).write_volatile(*byte) };
            }
        }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; no reference outlives `self`.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_numbers_are_those_of_the_kernel_headers() {
        assert_eq!(KVM_RUN, 0xae80);
        assert_eq!(KVM_IRQFD, 0x4020_ae76);
        assert_eq!(KVM_IOEVENTFD, 0x4040_ae79);
        assert_eq!(KVM_SET_SIGNAL_MASK, 0x4004_ae8b);
    }

    #[test]
    fn data_outside_the_page_is_neither_read_nor_written() {
        use std::os::fd::FromRawFd;
        // SAFETY: a new descriptor that nothing else owns.
        let fd = unsafe {
            let raw = libc::memfd_create(c"run".as_ptr(), 0);
            assert!(raw >= 0 && libc::ftruncate(raw, 0x3000) == 0);
            std::os::fd::OwnedFd::from_raw_fd(raw)
        };
        assert!(RunPage::map(&fd, 16).is_err());
        let page = RunPage::map(&fd, 0x3000).unwrap();
        page.write_data(0x2ffe, &[1, 2, 3]);
        page.write_data(u64::MAX, &[1]);
        assert_eq!(page.read_data::<2>(0x2ffe, 2), [0, 0]);
        page.write_data(0x2ffe, &[1, 2]);
        assert_eq!(page.read_data::<4>(0x2ffe, 2), [1, 2, 0, 0]);
        assert_eq!(page.read_data::<4>(0x2ffe, 4), [0; 4]);
    }
}
