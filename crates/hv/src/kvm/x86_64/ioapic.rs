//! The I/O APIC when only local APICs live in the kernel (82093AA data sheet; 24 pins).
//!
//! Lines reach the kernel as irqfds whatever this does. What it decides is which message each
//! interrupt number becomes: every unmasked redirection entry is a route to one.

use std::ops::Range;

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;

use crate::kvm::irq::LINES;
use crate::{Error, Result};

/// Where it is in guest physical space.
pub(in crate::kvm) const WINDOW: Range<u64> = 0xfec0_0000..0xfec0_1000;

const SELECT: u64 = 0x00;
const DATA: u64 = 0x10;

const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const TABLE: u8 = 0x10;

/// Version 0x11: ends of level interrupts come from the local APICs.
const VERSION_VALUE: u32 = 0x11 | (LINES - 1) << 16;

const MASKED: u64 = 1 << 16;
/// Delivery status and remote request, which the guest cannot write.
const READ_ONLY: u64 = 1 << 12 | 1 << 14;
const LEVEL: u64 = 1 << 15;
const LOGICAL: u64 = 1 << 11;

/// State of the controller.
#[derive(Debug)]
pub(in crate::kvm) struct Ioapic {
    select: u8,
    id: u8,
    table: [u64; LINES as usize],
}

impl Default for Ioapic {
    fn default() -> Self {
        Self { select: 0, id: 0, table: [MASKED; LINES as usize] }
    }
}

impl Ioapic {
    /// A 32-bit read at `offset` of the window.
    pub(in crate::kvm) fn read(&self, offset: u64) -> u32 {
        match offset {
            SELECT => self.select.into(),
            DATA => match self.select {
                ID | ARBITRATION => u32::from(self.id) << 24,
                VERSION => VERSION_VALUE,
                _ => self.entry().map_or(0, |(pin, shift)| (self.table[pin] >> shift) as u32),
            },
            _ => 0,
        }
    }

    /// A 32-bit write at `offset` of the window; true when routes changed.
    pub(in crate::kvm) fn write(&mut self, offset: u64, value: u32) -> bool {
        match (offset, self.select) {
            (SELECT, _) => self.select = value as u8,
            (DATA, ID) => self.id = (value >> 24) as u8 & 0xf,
            (DATA, _) => {
                let Some((pin, shift)) = self.entry() else { return false };
                let before = self.table[pin];
                let kept = before & !(0xffff_ffff << shift);
                self.table[pin] = kept | (u64::from(value) << shift) & !READ_ONLY;
                return message(before) != message(self.table[pin]);
            }
            _ => {}
        }
        false
    }

    /// Pin and shift of the half of its entry that is selected.
    fn entry(&self) -> Option<(usize, u32)> {
        let half = self.select.checked_sub(TABLE)?;
        let pin = usize::from(half / 2);
        (pin < self.table.len()).then_some((pin, u32::from(half % 2) * 32))
    }

    fn routes(&self) -> Vec<kvm_irq_routing_entry> {
        let unmasked = self.table.iter().enumerate().filter_map(|(pin, entry)| Some((pin, message(*entry)?)));
        unmasked.map(|(pin, message)| message.route(pin as u32)).collect()
    }

    /// Tells the kernel which message each line is.
    pub(in crate::kvm) fn set_routes(&self, vm: &VmFd) -> Result<()> {
        let hint = "interrupt routes of the I/O APIC";
        let routes = KvmIrqRouting::from_entries(&self.routes())
            .map_err(|_| super::too_many("KVM_SET_GSI_ROUTING", hint))?;
        vm.set_gsi_routing(&routes).map_err(|e| Error::call("KVM_SET_GSI_ROUTING", hint, e))
    }
}

/// A message-signalled interrupt (Intel SDM vol. 3, 11.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Message {
    address: u32,
    data: u32,
}

/// The message an entry stands for: destination and its mode in the address; vector, delivery mode
/// and trigger mode in the data. None when masked.
fn message(entry: u64) -> Option<Message> {
    if entry & MASKED != 0 {
        return None;
    }
    let destination = (entry >> 56) as u32;
    let mode = u32::from(entry & LOGICAL != 0) << 2;
    let trigger = if entry & LEVEL != 0 { 1 << 15 | 1 << 14 } else { 0 };
    Some(Message { address: 0xfee0_0000 | destination << 12 | mode, data: (entry & 0x7ff) as u32 | trigger })
}

impl Message {
    fn route(self, line: u32) -> kvm_irq_routing_entry {
        let msi = kvm_irq_routing_msi { address_lo: self.address, data: self.data, ..Default::default() };
        kvm_irq_routing_entry {
            gsi: line,
            type_: KVM_IRQ_ROUTING_MSI,
            u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
            ..Default::default()
        }
    }
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use super::*;

    fn set(io: &mut Ioapic, register: u8, value: u32) -> bool {
        assert!(!io.write(SELECT, register.into()));
        io.write(DATA, value)
    }

    fn get(io: &mut Ioapic, register: u8) -> u32 {
        io.write(SELECT, register.into());
        io.read(DATA)
    }

    #[test]
    fn describes_itself() {
        let mut io = Ioapic::default();
        assert_eq!(get(&mut io, VERSION), 0x0017_0011);
        assert!(!set(&mut io, ID, 0x0f00_0000));
        assert_eq!(get(&mut io, ID), 0x0f00_0000);
        assert_eq!(get(&mut io, 0x10), 0x1_0000);
        assert_eq!(get(&mut io, 0x40), 0);
        assert!(!set(&mut io, 0x40, 1));
        assert!(!set(&mut io, 0xff, 1));
        assert_eq!(io.read(0x20), 0);
    }

    #[test]
    fn an_unmasked_entry_is_a_route() {
        let mut io = Ioapic::default();
        assert!(!set(&mut io, TABLE + 11, 3 << 24));
        assert!(io.routes().is_empty());
        assert!(set(&mut io, TABLE + 10, 0x931 | READ_ONLY as u32));
        assert_eq!(get(&mut io, TABLE + 10), 0x931);
        assert!(!set(&mut io, TABLE + 10, 0x931));
        let routes = io.routes();
        assert_eq!((routes.len(), routes[0].gsi, routes[0].type_), (1, 5, KVM_IRQ_ROUTING_MSI));
        // SAFETY: the field that `type_` names.
        let msi = unsafe { routes[0].u.msi };
        assert_eq!((msi.address_lo, msi.address_hi, msi.data), (0xfee0_3004, 0, 0x131));
        assert!(set(&mut io, TABLE + 10, 0x931 | MASKED as u32));
        assert!(io.routes().is_empty());
    }

    proptest::proptest! {
        /// Whatever a guest writes: a change of routes is told, and only unmasked pins have one.
        #[test]
        fn routes_are_the_unmasked_pins(writes: Vec<(u8, u32)>, offsets: [u64; 4]) {
            let mut io = Ioapic::default();
            let list = |io: &Ioapic| -> Vec<_> {
                // SAFETY: every route is a message.
                io.routes().iter().map(|r| unsafe { (r.gsi, r.u.msi.address_lo, r.u.msi.data) }).collect()
            };
            for (register, value) in writes {
                let before = list(&io);
                let register = register % 0x44;
                proptest::prop_assert_eq!(set(&mut io, register, value), before != list(&io));
            }
            let pins: Vec<u32> = (0..LINES).filter(|p| get(&mut io, TABLE + 2 * *p as u8) >> 16 & 1 == 0).collect();
            proptest::prop_assert_eq!(list(&io).iter().map(|r| r.0).collect::<Vec<_>>(), pins);
            for offset in offsets {
                io.read(offset);
                io.write(offset, 0xffff_ffff);
            }
        }
    }

    #[test]
    fn level_entries_say_so() {
        let mut io = Ioapic::default();
        assert!(set(&mut io, TABLE, 0x8040));
        // SAFETY: the field that `type_` names.
        assert_eq!(unsafe { io.routes()[0].u.msi }.data, 0xc040);
    }
}
